"""Messages of a masked round: one frozen model for each row of the table (PROTOCOL).

| Message | Direction | Signed as | Path under `/v1/federations/{federation}` |
| --- | --- | --- | --- |
| `Ready` | A→S | `ready` | POST `/readies` |
| `ReadyList`, `Roster` | S→A | `ready-list`, `roster` | GET `/cells/{round}/{attempt}` |
| `Shares` | A→S | its header as `shares` | POST `/cells/{transcript}/shares` |
| `Bundle` | S→A | each header by its dealer | GET `/cells/{round}/{attempt}` |
| `MaskedHeader` | A→S | `masked-upload` | POST `/cells/{transcript}/uploads`, then parts |
| `Survivors` | S→A | each header by its sender | GET `/cells/{round}/{attempt}` |
| `Confirm` | A→S | over H("confirm", T2, U3) | POST `/cells/{transcript}/confirm` |
| `Confirmed` | S→A | each by its sender | GET `/cells/{round}/{attempt}` |
| `Reveal` | A→S | `reveal` | POST `/cells/{transcript}/reveal` |
| `Complaint` | A→S | `complaint` | POST `/cells/{transcript}/complaints` |
| `Failed` | S→A | `failed` | GET `/cells/{round}/{attempt}` |

`T` is the transcript: H("roster", the roster). `T2` is H("bundle", T, U2). U2 and U3 are arrays of
[identity, digest of what it signed], sorted by identity. Every field of what an agent sends has a
fixed width, so that requests of one type have one size within a cell.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field

from protocol import limits
from protocol.messages import BodyHead, Credential, RetryAfter
from protocol.numbers import Count, PositiveInt, RoundNumber, UnixSeconds
from protocol.phases import AgentPhase
from protocol.signing import Signed
from protocol.wire import (
    Bytes16,
    Bytes32,
    Bytes33,
    Bytes64,
    Bytes82,
    Digest,
    Identity,
    JsonValue,
    WireModel,
    b64u_encode,
    domain_hash,
)

ReadyAttempt = Annotated[int, Field(ge=1, le=limits.MAX_READY_ATTEMPTS)]
Entry = tuple[Identity, Digest]
"""An identity and the digest of what it signed."""
Entries = tuple[Entry, ...]

MISSING_SHARE: Final = b"\xff" * 33
"""Stands in a REVEAL for a share that its dealer did not give; no share has this value."""


def entries_json(entries: Sequence[Entry]) -> JsonValue:
    """An array of entries as it is hashed."""
    return [[b64u_encode(identity), b64u_encode(digest)] for identity, digest in entries]


class Ready(WireModel):
    """An agent holds its finished update and asks for a cell (message 2).

    `sealing_key` and `masking_key` are fresh X25519 public keys, and never the same key.
    """

    version: Literal[1] = 1
    federation: Bytes16
    round: RoundNumber
    attempt: ReadyAttempt
    agent: Identity
    round_digest: Digest
    credential: Signed[Credential]
    sealing_key: Bytes32
    masking_key: Bytes32
    nonce: Bytes32
    expires_at: UnixSeconds

    def digest(self) -> bytes:
        """The hash that the READY LIST carries for this agent."""
        return domain_hash("ready", self.as_json())


class ReadyList(WireModel):
    """Who is cut into cells, before it is known how (message 3a); sorted by identity."""

    version: Literal[1] = 1
    federation: Bytes16
    round: RoundNumber
    round_digest: Digest
    wave: PositiveInt
    """1 for the round's first list; a failed cell that tries again has a list of its own."""
    entries: Annotated[Entries, Field(min_length=1, max_length=limits.MAX_WAVE)]
    beacon: Digest | None = None

    def digest(self) -> bytes:
        """The hash that rosters name, and from which the cells are drawn."""
        return domain_hash("ready-list", self.as_json())


class Roster(WireModel):
    """A cell: the whole READY messages of its members, sorted by identity (message 3b)."""

    version: Literal[1] = 1
    federation: Bytes16
    round: RoundNumber
    round_digest: Digest
    list_digest: Digest
    cell: Count
    formed_at: UnixSeconds
    members: Annotated[tuple[Signed[Ready], ...], Field(min_length=1, max_length=limits.MAX_CELL)]
    threshold: PositiveInt
    colluders: PositiveInt

    def transcript(self) -> bytes:
        """T, the cell's transcript hash: 32 bytes."""
        return domain_hash("roster", self.as_json())

    def identities(self) -> tuple[bytes, ...]:
        """The members in the roster's order; member i has Shamir's x = i + 1."""
        return tuple(member.body.agent for member in self.members)


OtherDigests = Annotated[tuple[Digest, ...], Field(max_length=limits.MAX_CELL)]


class SharesHeader(WireModel):
    """What a dealer signs of its shares (message 4); tuples are in roster order without it."""

    version: Literal[1] = 1
    transcript: Digest
    agent: Identity
    commitment: Digest
    ciphertexts: OtherDigests
    """SHA-256 of each ciphertext."""
    self_shares: OtherDigests
    mask_shares: OtherDigests

    def digest(self) -> bytes:
        """The hash that U2 carries for this agent."""
        return domain_hash("shares", self.as_json())


class Shares(WireModel):
    """A dealer's shares, each sealed to its receiver (message 4)."""

    header: Signed[SharesHeader]
    ciphertexts: Annotated[tuple[Bytes82, ...], Field(max_length=limits.MAX_CELL)]


class Bundle(WireModel):
    """Who shared, and what they sealed to one receiver (message 5).

    `ciphertexts` follow `headers`, without the receiver's own.
    """

    transcript: Digest
    headers: Annotated[
        tuple[Signed[SharesHeader], ...], Field(min_length=1, max_length=limits.MAX_CELL)
    ]
    ciphertexts: Annotated[tuple[Bytes82, ...], Field(max_length=limits.MAX_CELL)]

    def entries(self) -> Entries:
        """U2."""
        return tuple((header.body.agent, header.body.digest()) for header in self.headers)


class MaskedHeader(BodyHead):
    """The signed head of a masked upload (message 6): one for each transcript."""

    version: Literal[1] = 1
    transcript: Digest
    bundle: Digest
    """T2."""
    agent: Identity

    def digest(self) -> bytes:
        """The hash that U3 carries for this agent."""
        return domain_hash("masked-upload", self.as_json())


class Survivors(WireModel):
    """Whose masked updates arrived (message 7), sorted by identity."""

    transcript: Digest
    headers: Annotated[
        tuple[Signed[MaskedHeader], ...], Field(min_length=1, max_length=limits.MAX_CELL)
    ]

    def entries(self) -> Entries:
        """U3."""
        return tuple((header.body.agent, header.body.digest()) for header in self.headers)


class Confirm(WireModel):
    """An agent's word on who survived (message 8): a signature over H("confirm", T2, U3)."""

    transcript: Digest
    agent: Identity
    signature: Bytes64


class Confirmed(WireModel):
    """At least t of the survivors confirmed the same U3 (message 9)."""

    transcript: Digest
    confirmations: Annotated[tuple[Confirm, ...], Field(min_length=1, max_length=limits.MAX_CELL)]


GivenShares = Annotated[tuple[tuple[Identity, Bytes33], ...], Field(max_length=limits.MAX_CELL)]


class Reveal(WireModel):
    """What lets the server remove the masks of the sum, and of nothing else (message 10).

    `self_shares` are of the other survivors, `mask_shares` of those who shared and did not survive;
    each a dealer and the share that it gave, sorted by dealer.
    """

    version: Literal[1] = 1
    transcript: Digest
    agent: Identity
    self_seed: Bytes32
    self_shares: GivenShares
    mask_shares: GivenShares


class Complaint(WireModel):
    """A dealer's ciphertext did not open, or holds other shares than its header says."""

    version: Literal[1] = 1
    transcript: Digest
    agent: Identity
    dealer: Signed[SharesHeader]
    ciphertext: Bytes82


class FailureReason(StrEnum):
    """Why a cell failed."""

    TOO_FEW_SHARED = "too-few-shared"
    TOO_FEW_UPLOADED = "too-few-uploaded"
    TOO_FEW_CONFIRMED = "too-few-confirmed"
    TOO_FEW_REVEALED = "too-few-revealed"
    BAD_SHARES = "bad-shares"
    BAD_SUM = "bad-sum"
    ROUND_OVER = "round-over"


class Failed(WireModel):
    """A cell failed; its vectors are deleted and never unmasked (message FAILED)."""

    version: Literal[1] = 1
    federation: Bytes16
    round: RoundNumber
    transcript: Digest
    reason: FailureReason
    blamed: Annotated[tuple[Identity, ...], Field(max_length=limits.MAX_CELL)] = ()
    may_retry: bool = False
    """Whether the server waits for new READY messages of the members that may try again."""


class NoNews(WireModel):
    """Nothing new for the agent yet: ask again."""

    kind: Literal["wait"] = "wait"
    retry_after_s: RetryAfter


class RosterNews(WireModel):
    """The agent's cell was formed."""

    kind: Literal["roster"] = "roster"
    ready_list: Signed[ReadyList]
    roster: Signed[Roster]


class BundleNews(WireModel):
    """The members' shares are here."""

    kind: Literal["bundle"] = "bundle"
    bundle: Bundle


class SurvivorsNews(WireModel):
    """Uploads are over."""

    kind: Literal["survivors"] = "survivors"
    survivors: Survivors


class ConfirmedNews(WireModel):
    """The survivors agree."""

    kind: Literal["confirmed"] = "confirmed"
    confirmed: Confirmed


class FailedNews(WireModel):
    """The cell failed."""

    kind: Literal["failed"] = "failed"
    failed: Signed[Failed]


class EndedNews(WireModel):
    """Nothing more is wanted of the agent for this attempt.

    The cell has its sum, or went on without the agent, or the round is over.
    """

    kind: Literal["ended"] = "ended"
    counted: bool
    """Whether the agent's update is in the cell's sum."""


News: TypeAlias = (
    NoNews | RosterNews | BundleNews | SurvivorsNews | ConfirmedNews | FailedNews | EndedNews
)


class CellNews(WireModel):
    """What there is for an agent that stands at a phase of its own."""

    news: Annotated[News, Field(discriminator="kind")]


NewsPhase = Literal[
    AgentPhase.READY,
    AgentPhase.SHARED,
    AgentPhase.UPLOADED,
    AgentPhase.CONFIRMED,
    AgentPhase.REVEALED,
]
"""Where an agent stands when it asks for news."""
