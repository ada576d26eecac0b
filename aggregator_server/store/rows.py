"""What goes into the database and comes out of it: frozen rows, bytes for keys and digests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.chain import BlobRef
from protocol.phases import CellPhase, RoundPhase
from protocol.wire import b64u_decode


class UploadPhase(StrEnum):
    """Where an upload stands, for the server."""

    RECEIVING = "receiving"
    ACCEPTED = "accepted"
    REPLACED = "replaced"
    """A newer attempt of the same agent took its place."""
    REFUSED = "refused"
    """Complete, but with values that are not finite."""
    ENDED = "ended"
    """Incomplete when the round closed or the agent withdrew."""


class BlobRole(StrEnum):
    """What a blob is to its release."""

    ADAPTER = "adapter"
    SENT = "sent"
    CONFIG = "config"
    OPTIMIZER = "optimizer"
    """The state of the server's optimiser; served to nobody."""
    CONTROL = "control"
    """SCAFFOLD's c."""
    CONTROL_BOOK = "control_book"
    """Whose variates c is the mean of; served to nobody."""


HIDDEN_ROLES: Final = frozenset({BlobRole.OPTIMIZER, BlobRole.CONTROL_BOOK})
"""Of blobs that are served to nobody."""


@dataclass(frozen=True, kw_only=True)
class AgentRow:
    """A member, past or present; times in seconds since the Unix epoch."""

    identity: bytes
    enrolled_at: float
    revoked_at: float | None
    last_seen: float
    credential: bytes
    """Canonical JSON of the `Signed[Credential]` that was answered."""
    barred: bool
    """The operator ended the membership: only an invite made since then lets the agent in again."""
    quarantined_at: float | None
    """Since when it is drawn for no round; None: it may be."""
    judged_from: int
    """Evidence of earlier rounds no longer counts: the operator has let it back in since."""


@dataclass(frozen=True, kw_only=True)
class MemberRow:
    """A member, past or present, as the operator sees it; times in seconds since the Unix epoch."""

    identity: bytes
    enrolled_at: float
    last_seen: float
    revoked_at: float | None
    barred: bool
    quarantined_at: float | None
    judged_from: int
    n_accepted: int
    """Updates of its that were accepted, over all rounds."""


@dataclass(frozen=True, kw_only=True)
class InviteRow:
    """An invite; its code is erased with the last use."""

    id: bytes
    code: bytes | None
    created_at: float
    n_uses: int
    uses_left: int

    def __repr__(self) -> str:
        """The invite without its secret."""
        return f"InviteRow(id={self.id.hex()}, uses_left={self.uses_left})"


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """A round; `manifest` is the canonical JSON of its `Signed[RoundManifest]`."""

    number: int
    phase: RoundPhase
    manifest: bytes
    digest: bytes
    failure: str | None
    filter_report: str | None
    passed: str | None
    """JSON of the `Passed`: what the gate let through, and its verdict."""

    @property
    def over(self) -> bool:
        """Whether nothing leaves its phase."""
        return self.phase in {RoundPhase.PUBLISHED, RoundPhase.FAILED}


@dataclass(frozen=True, kw_only=True)
class JudgedRow:
    """A published round and what was decided of its cells; the JSON as `RoundRow` has it."""

    number: int
    filter_report: str
    passed: str
    cells: tuple[tuple[bytes, tuple[bytes, ...]], ...]
    """Transcript and members of each cell."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """What the evaluator was asked of a round, and what it answered.

    `task` and `report` are the canonical JSON of the `Signed[…]`, `candidates` that of the list of
    `Candidate` in the order of the task.
    """

    round: int
    attempt: int
    task: bytes
    candidates: str
    asked_at: float
    has_blobs: bool
    """False once the files of those that did not become a release are deleted."""
    report: bytes | None = None
    report_digest: bytes | None = None


class IncidentKind(StrEnum):
    """What the operator should know of."""

    GATE_REFUSED = "gate-refused"
    """No candidate of a round passed; the old release stays."""
    GATE_LEFT_OUT = "gate-left-out"
    """A round passed only without some of its cells."""
    EVALUATOR_SILENT = "evaluator-silent"
    """The evaluator did not answer in time; the old release stays."""
    QUARANTINED = "quarantined"
    """An agent is drawn for no round any more, as the evidence against it repeats."""


@dataclass(frozen=True, kw_only=True)
class NewIncident:
    """Something that the operator should know of, in words."""

    kind: IncidentKind
    text: str
    at: float
    round: int | None = None


@dataclass(frozen=True, kw_only=True)
class IncidentRow:
    """An incident as it is journalled; `at` in seconds since the Unix epoch."""

    id: int
    at: float
    round: int | None
    kind: IncidentKind
    text: str


@dataclass(frozen=True, kw_only=True)
class SelectionRow:
    """An agent's place in a round."""

    round: int
    agent: bytes
    rank: bytes
    withdrawn_reason: str | None
    withdrawal_digest: bytes | None


@dataclass(frozen=True, kw_only=True)
class UploadRow:
    """An upload; `header` is the canonical JSON of its `Signed[UploadHeader]`."""

    id: int
    round: int
    agent: bytes
    attempt: int
    transcript: bytes | None
    """T of its cell; None for a plain update. `header` is then a `Signed[MaskedHeader]`."""
    header: bytes
    digest: bytes
    weight: int
    """Of a plain update; 0 for a masked one, whose weight is masked too."""
    n_bytes: int
    phase: UploadPhase
    has_bytes: bool
    """False once its parts are deleted."""
    started_at: float
    accepted_at: float | None


@dataclass(frozen=True, kw_only=True)
class NewUpload:
    """An upload that is about to begin."""

    round: int
    agent: bytes
    attempt: int
    header: bytes
    digest: bytes
    weight: int
    n_bytes: int
    started_at: float
    transcript: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """A part that is on disk."""

    upload: int
    n: int
    sha256: bytes
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class CellRow:
    """A cell whose sum is known. `members` is U3: [[identity, digest], …].

    In the open mode it is one accepted `upload`; in the masked mode a sum with a digest.
    """

    transcript: bytes
    round: int
    phase: CellPhase
    members_digest: bytes
    members: str
    upload: int | None
    n_members: int
    weight_sum: int
    sum_sha256: bytes | None = None
    """Of a masked cell's sum."""

    @property
    def only_member(self) -> bytes:
        """The agent of a cell of one.

        Raises:
            ValueError: It has several members.
        """
        [[agent, _]] = json.loads(self.members)
        return b64u_decode(agent, n_bytes=32)


class MessageKind(StrEnum):
    """What a member of a masked cell sent."""

    SHARES = "shares"
    COMPLAINT = "complaint"
    CONFIRM = "confirm"
    REVEAL = "reveal"


@dataclass(frozen=True, kw_only=True)
class ReadyRow:
    """A READY; `message` is the canonical JSON of the `Signed[Ready]`."""

    round: int
    agent: bytes
    attempt: int
    message: bytes
    digest: bytes
    wave: int | None
    """The list that it stands in; None while it waits."""


@dataclass(frozen=True, kw_only=True)
class WaveRow:
    """A READY LIST; `message` is the canonical JSON of the `Signed[ReadyList]`."""

    round: int
    number: int
    message: bytes


@dataclass(frozen=True, kw_only=True)
class MaskedCellRow:
    """A masked cell under way or over; `roster` is the canonical JSON of its `Signed[Roster]`."""

    transcript: bytes
    round: int
    wave: int
    number: int
    """The cell's number in its wave, from 0."""
    phase: CellPhase
    roster: bytes
    stage_at: float
    """When its stage began, in seconds since the Unix epoch."""
    shared: str | None
    """U2 as a JSON array of identities, once sharing is over."""
    survivors: str | None
    """U3 as a JSON array of identities, once uploads are over."""
    failed: bytes | None
    """Canonical JSON of its `Signed[Failed]`."""
    retried: bool
    """Whether a later wave took up its members, or gave up on them."""


@dataclass(frozen=True, kw_only=True)
class CellMemberRow:
    """A member of a masked cell, and with which READY."""

    transcript: bytes
    agent: bytes
    round: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class CellMessageRow:
    """A message of a member; `about` is the dealer of a complaint, else empty."""

    id: int
    transcript: bytes
    agent: bytes
    kind: MessageKind
    about: bytes
    message: bytes
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class ReleaseRow:
    """A release; `round` is the round that made it, None for the first one and a rollback."""

    number: int
    signed: bytes
    digest: bytes
    round: int | None


@dataclass(frozen=True, kw_only=True)
class BlobRow:
    """A file that a release names."""

    role: BlobRole
    sha256: bytes
    n_bytes: int


def blob_rows(by_role: Mapping[BlobRole, BlobRef | None]) -> tuple[BlobRow, ...]:
    """Files of a release as the store keeps them, but for those that it has not."""
    return tuple(
        BlobRow(role=role, sha256=ref.sha256, n_bytes=ref.n_bytes)
        for role, ref in by_role.items()
        if ref is not None
    )


@dataclass(frozen=True, kw_only=True)
class UploadProgress:
    """How far an upload under way has come."""

    started_at: float
    n_bytes: int
    n_bytes_received: int


@dataclass(frozen=True, kw_only=True)
class RoundProgress:
    """How far a round has come, read in one transaction."""

    n_selected: int
    """Places held: selected and not withdrawn."""
    n_accepted: int
    n_open: int
    """Places held without an accepted upload."""
    bytes_received: int
    receiving: tuple[UploadProgress, ...]
    n_ready: int
    """Agents that hold a place and have sent READY; 0 in the open mode."""


@dataclass(frozen=True, kw_only=True)
class AgentView:
    """All that decides what an agent should do now, read in one transaction."""

    round: RoundRow | None
    selected: bool
    accepted: bool
    quarantined: bool
    newest_release: int
    n_releases_of_rounds: int


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts over the whole federation."""

    n_enrolled: int
    n_present: int
    newest_release: int
    n_releases_of_rounds: int
    bytes_up: int
    bytes_down: int
