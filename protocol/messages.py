"""Requests and replies of the open mode: one frozen model for each body.

| Request | Path under `/v1/federations/{federation}` | Body | Reply |
| --- | --- | --- | --- |
| GET | `/v1/federation` (no id yet) | | `Discovery` |
| POST | `/enrolments` | `Signed[Enrolment]` | `Signed[Credential]` |
| POST | `/enrolments/revoke` | `Signed[Revocation]` | `Acknowledged` |
| GET | `/task?after=R&wait=S` | | `TaskReply` |
| GET | `/releases?after=N` | | `ReleasePage` |
| GET | `/blobs/{sha256 in hex}` | | bytes; `Range` is honoured |
| POST | `/uploads` | `Signed[UploadHeader]` | `UploadStatus` |
| GET | `/uploads/{round}/{attempt}` | | `UploadStatus` |
| PUT | `/uploads/{round}/{attempt}/parts/{n}` | part n, raw | `UploadStatus` |
| POST | `/uploads/{round}/{attempt}/complete` | | `UploadStatus` |
| POST | `/withdrawals` | `Signed[Withdrawal]` | `Acknowledged` |
| GET | `/status` | | `FederationStatus` |

Every request but the discovery, the releases, the blobs and the status carries a transport
signature. A body that changes something is idempotent under (federation, round, attempt, agent,
type, part): the same digest gets the stored answer, another one gets `conflict`.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from protocol import limits
from protocol.chain import BlobRef, Release, RoundManifest
from protocol.manifest import FederationManifest
from protocol.numbers import Count, RoundNumber, UnixSeconds, UnixTime
from protocol.phases import RoundPhase
from protocol.signing import InviteProof, Signed
from protocol.wire import (
    Bytes16,
    Digest,
    Identity,
    WireModel,
    b64u_encode,
    domain_hash,
    sha256,
)

Attempt = Annotated[int, Field(ge=1, le=2**31 - 1)]
RetryAfter = Annotated[float, Field(ge=0.0, le=3600.0)]


class Enrolment(WireModel):
    """An agent asks to join (message name `enrolment`)."""

    version: Literal[1] = 1
    federation: Bytes16
    federation_digest: Digest
    agent: Identity
    invite: InviteProof | None


class Credential(WireModel):
    """The registrar's word that an agent is a member (message name `credential`)."""

    version: Literal[1] = 1
    federation: Bytes16
    agent: Identity
    expires_at: UnixSeconds


class Discovery(WireModel):
    """What anyone may ask a server: its federation."""

    federation: Signed[FederationManifest]
    enrolment: Literal["open", "invite"]
    server_time: UnixTime


class Revocation(WireModel):
    """An agent leaves (message name `revocation`)."""

    version: Literal[1] = 1
    federation: Bytes16
    agent: Identity


class Acknowledged(WireModel):
    """Journalled."""

    acknowledged: Literal[True] = True


class WaitReason(StrEnum):
    """Why there is nothing to do."""

    GATHERING_AGENTS = "gathering-agents"
    NOT_SELECTED = "not-selected"
    SET_ASIDE = "set-aside"
    """The operator's server draws this agent for no round; its owner may ask the operator why."""
    ROUND_ENDING = "round-ending"
    FINISHED = "finished"
    NO_SPACE = "no-space"


class TrainTask(WireModel):
    """Train this round."""

    kind: Literal["train"] = "train"
    round: Signed[RoundManifest]


class WaitTask(WireModel):
    """Poll again after `retry_after_s`."""

    kind: Literal["wait"] = "wait"
    reason: WaitReason
    retry_after_s: RetryAfter


class TaskReply(WireModel):
    """What to do now, and the newest release so that an idle agent can follow the chain."""

    task: Annotated[TrainTask | WaitTask, Field(discriminator="kind")]
    newest_release: Count


class ReleasePage(WireModel):
    """Consecutive releases, oldest first; `newest` tells whether there are more."""

    releases: Annotated[
        tuple[Signed[Release], ...], Field(max_length=limits.MAX_RELEASES_PER_REPLY)
    ]
    newest: Count


class BodyHead(WireModel):
    """What the head of an upload says of its body, which travels in numbered parts."""

    body_sha256: Digest
    body_n_bytes: Annotated[int, Field(ge=1, le=limits.MAX_UPDATE_BYTES)]

    @property
    def n_parts(self) -> int:
        """Number of parts of `limits.PART_BYTES`, the last one shorter."""
        return -(-self.body_n_bytes // limits.PART_BYTES)

    def part_n_bytes(self, part: int) -> int:
        """Size of part `part` (from 0)."""
        return min(limits.PART_BYTES, self.body_n_bytes - part * limits.PART_BYTES)


class UploadHeader(BodyHead):
    """The signed head of an upload (message name `upload`): one for each (round, attempt).

    `weight` is the FedAvg weight, 1 to the manifest's `max_weight`; in the open mode it is the
    number of examples trained on, which the owner was told.
    """

    version: Literal[1] = 1
    federation: Bytes16
    round: RoundNumber
    attempt: Attempt
    agent: Identity
    round_digest: Digest
    layout: Digest
    weight: Annotated[int, Field(ge=1, le=limits.MAX_WEIGHT)]

    def digest(self) -> bytes:
        """The hash that U3 carries for this agent."""
        return domain_hash("upload", self.as_json())


def member_of_one(signed: Signed[UploadHeader]) -> list[str]:
    """The only member of a cell of one, as U3 names it: identity and digest of its signed header.

    Of the signed header: nobody without the agent's key can compute it from a guessed update, and
    everybody sees it, in the release (under P3, too, where the update itself is protected).
    """
    return [b64u_encode(signed.body.agent), b64u_encode(sha256(signed.canonical()))]


def transcript_of_one(signed: Signed[UploadHeader]) -> bytes:
    """What stands for the transcript of a cell of one in the release of its round."""
    return domain_hash("roster", b64u_encode(signed.body.round_digest), member_of_one(signed))


class UploadState(StrEnum):
    """Where an upload stands."""

    RECEIVING = "receiving"
    ACCEPTED = "accepted"


class UploadStatus(WireModel):
    """Where an upload stands; `missing` lists the parts that have not arrived, ascending."""

    state: UploadState
    missing: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=limits.MAX_PARTS)], ...],
        Field(max_length=limits.MAX_PARTS),
    ]


class WithdrawalReason(StrEnum):
    """Why an agent cannot finish a round: a code, so that no text of the machine leaves it."""

    OWNER_STOPPED = "owner-stopped"
    OUT_OF_MEMORY = "out-of-memory"
    TRAINING_FAILED = "training-failed"
    REFUSED_BY_POLICY = "refused-by-policy"


class Withdrawal(WireModel):
    """An agent gives its place in a round to another (message name `withdrawal`)."""

    version: Literal[1] = 1
    federation: Bytes16
    round: RoundNumber
    agent: Identity
    reason: WithdrawalReason


class EvaluationTask(WireModel):
    """Adapters that the evaluator is asked about (message name `evaluation-task`)."""

    version: Literal[1] = 1
    federation: Bytes16
    round: RoundNumber
    round_digest: Digest
    attempt: Attempt
    """1: all cells that the filter kept; 2: without some of them, each candidate without others."""
    current: BlobRef
    """The adapter that the round started from."""
    candidates: Annotated[
        tuple[BlobRef, ...], Field(min_length=1, max_length=limits.MAX_CANDIDATES)
    ]

    def digest(self) -> bytes:
        """The hash that the report names."""
        return domain_hash("evaluation-task", self.as_json())


class EvaluationReply(WireModel):
    """What the evaluator is to do now."""

    task: Signed[EvaluationTask] | None
    finished: bool
    """The federation has had its last round."""


class RoundStatus(WireModel):
    """A round as anyone may see it."""

    round: RoundNumber
    phase: RoundPhase
    n_selected: Count
    n_uploads: Count
    n_uploading: Count
    bytes_received: Count
    opened_at: UnixTime
    deadline_at: UnixTime
    n_ready: Count = 0
    """Agents that hold a finished update and wait for a cell, or have been given one."""
    n_cells: Count = 0
    n_cells_failed: Count = 0
    failure: Annotated[str, Field(max_length=limits.MAX_TEXT_CHARS)] | None = None


class FederationStatus(WireModel):
    """The federation as anyone may see it: counts, no identities."""

    name: str
    n_enrolled: Count
    n_present: Count
    newest_release: Count
    n_rounds: Count
    n_releases_of_rounds: Count
    finished: bool
    round: RoundStatus | None
    bytes_up: Count
    bytes_down: Count
    server_time: UnixTime
