"""Messages of helper masks, the second trust model (PROTOCOL, "Helper masks").

| # | Message | Direction | Signed as | Path |
| --- | --- | --- | --- | --- |
| 1 | `HelperUpload` | agent → server | its header as `helper-upload` | POST `/helped`, then parts |
| 2 | `HelperRequest` | server → helper | `helper-request` | POST `/v1/helper/sums` |
| 3 | `HelperAnswer` | helper → server | `helper-answer` | its reply |
| 4 | the mask sums | helper → server | by digest in the answer | GET `/v1/helper/sums/{sha256}` |

The agent adds one mask to its encoded update, and seals the mask's seed to the helper. The helper
never sees an update; the server never sees a seed. The helper adds the masks of a cell up, once.
"""

from typing import Annotated, Literal

from pydantic import Field

from protocol import limits
from protocol.chain import BlobRef, RoundManifest
from protocol.manifest import FederationManifest
from protocol.masked import Entries, ReadyAttempt, ReadyList
from protocol.messages import BodyHead, Credential
from protocol.numbers import Count, RoundNumber
from protocol.signing import Signed
from protocol.wire import Bytes16, Bytes1168, Bytes1216, Digest, Identity, WireModel, domain_hash


class HelperDescription(WireModel):
    """A helper's two public keys, which a manifest pins; GET `/v1/helper`."""

    version: Literal[1] = 1
    helper: Identity
    helper_key: Bytes1216


class HelperHeader(BodyHead):
    """The signed head of an upload under a helper's mask: one for each round."""

    version: Literal[1] = 1
    federation: Bytes16
    round: RoundNumber
    attempt: ReadyAttempt
    agent: Identity
    round_digest: Digest
    credential: Signed[Credential]
    sealed_sha256: Digest

    def digest(self) -> bytes:
        """The hash that the list of uploads carries for this agent."""
        return domain_hash("helper-upload", self.as_json())


class HelperUpload(WireModel):
    """A signed head with the seed that is sealed to the helper."""

    header: Signed[HelperHeader]
    sealed: Bytes1168


class HelperRequest(WireModel):
    """All uploads of a closed round, for their mask sums; one for each (federation, round)."""

    version: Literal[1] = 1
    federation: Signed[FederationManifest]
    round: Signed[RoundManifest]
    uploads_list: ReadyList
    """Sorted [identity, header digest]; the cells follow from it as from a READY LIST."""
    uploads: Annotated[tuple[HelperUpload, ...], Field(max_length=limits.MAX_WAVE)]

    def digest(self) -> bytes:
        """The hash that the answer names."""
        return domain_hash("helper-request", self.as_json())


class MaskSum(WireModel):
    """The sum of the masks of one cell."""

    cell: Count
    members: Annotated[Entries, Field(min_length=1, max_length=limits.MAX_CELL)]
    """Whose masks are in it: the cell, less those whose seed did not open."""
    words: BlobRef


class HelperAnswer(WireModel):
    """What the helper gives for a round: one sum for each cell that is large enough."""

    version: Literal[1] = 1
    request: Digest
    sums: tuple[MaskSum, ...]
    unopened: tuple[Identity, ...]
    """Agents whose sealed seed does not open; their vectors are in no sum."""
