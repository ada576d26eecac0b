"""The phases of a round, of a cell and of an agent's part in it: three transition tables.

The tables are role-blind data. `advance` is the only way from one phase to the next; an event that
a phase does not allow raises and changes nothing (after python-hyper/h11).

In the open mode an update is a cell of one: it goes from UPLOADING straight to UNMASKED, as there
is nothing to unmask, and an agent's part ends at UPLOADED. The masked mode walks the whole table:
its part ends at REVEALED, or ABANDONED when the cell is lost.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, TypeVar

from protocol.errors import TransitionError


class RoundPhase(StrEnum):
    """A round, seen by the server."""

    OPEN = "open"
    GATHERING = "gathering"
    UNMASKED = "unmasked"
    FILTERED = "filtered"
    GATED = "gated"
    PUBLISHED = "published"
    FAILED = "failed"


class RoundEvent(StrEnum):
    """What moves a round."""

    WAVE_GATHERS = "wave-gathers"
    CELLS_ENDED = "cells-ended"
    FILTER_DONE = "filter-done"
    GATE_PASSED = "gate-passed"
    RELEASE_JOURNALLED = "release-journalled"
    FAIL = "fail"


class CellPhase(StrEnum):
    """A cell, seen by the server."""

    SHARING = "sharing"
    UPLOADING = "uploading"
    CONFIRMING = "confirming"
    REVEALING = "revealing"
    UNMASKED = "unmasked"
    FAILED = "failed"


class CellEvent(StrEnum):
    """What moves a cell."""

    SHARES_ARRIVED = "shares-arrived"
    UPLOADS_ARRIVED = "uploads-arrived"
    PLAIN_UPLOAD_ACCEPTED = "plain-upload-accepted"
    SURVIVORS_CONFIRMED = "survivors-confirmed"
    SUM_RECOVERED = "sum-recovered"
    FAIL = "fail"


class AgentPhase(StrEnum):
    """An agent's part in one round, as its journal has it."""

    TRAINING = "training"
    TRAINED = "trained"
    READY = "ready"
    SHARED = "shared"
    UPLOADED = "uploaded"
    CONFIRMED = "confirmed"
    REVEALED = "revealed"
    ABANDONED = "abandoned"


class AgentEvent(StrEnum):
    """What moves an agent's part."""

    TRAINING_DONE = "training-done"
    READY_SIGNED = "ready-signed"
    SHARES_SENT = "shares-sent"
    UPLOAD_ACCEPTED = "upload-accepted"
    CONFIRM_SIGNED = "confirm-signed"
    REVEAL_SENT = "reveal-sent"
    SUM_KNOWN = "sum-known"
    CELL_LOST = "cell-lost"
    ATTEMPT_FAILED = "attempt-failed"
    ABANDON = "abandon"


ROUND_TRANSITIONS: Final[Mapping[tuple[RoundPhase, RoundEvent], RoundPhase]] = MappingProxyType(
    {
        (RoundPhase.OPEN, RoundEvent.WAVE_GATHERS): RoundPhase.GATHERING,
        (RoundPhase.OPEN, RoundEvent.CELLS_ENDED): RoundPhase.UNMASKED,
        (RoundPhase.GATHERING, RoundEvent.CELLS_ENDED): RoundPhase.UNMASKED,
        (RoundPhase.UNMASKED, RoundEvent.FILTER_DONE): RoundPhase.FILTERED,
        (RoundPhase.FILTERED, RoundEvent.GATE_PASSED): RoundPhase.GATED,
        (RoundPhase.GATED, RoundEvent.RELEASE_JOURNALLED): RoundPhase.PUBLISHED,
        (RoundPhase.OPEN, RoundEvent.FAIL): RoundPhase.FAILED,
        (RoundPhase.GATHERING, RoundEvent.FAIL): RoundPhase.FAILED,
        (RoundPhase.UNMASKED, RoundEvent.FAIL): RoundPhase.FAILED,
        (RoundPhase.FILTERED, RoundEvent.FAIL): RoundPhase.FAILED,
        (RoundPhase.GATED, RoundEvent.FAIL): RoundPhase.FAILED,
    }
)

CELL_TRANSITIONS: Final[Mapping[tuple[CellPhase, CellEvent], CellPhase]] = MappingProxyType(
    {
        (CellPhase.SHARING, CellEvent.SHARES_ARRIVED): CellPhase.UPLOADING,
        (CellPhase.UPLOADING, CellEvent.UPLOADS_ARRIVED): CellPhase.CONFIRMING,
        (CellPhase.UPLOADING, CellEvent.PLAIN_UPLOAD_ACCEPTED): CellPhase.UNMASKED,
        (CellPhase.CONFIRMING, CellEvent.SURVIVORS_CONFIRMED): CellPhase.REVEALING,
        (CellPhase.REVEALING, CellEvent.SUM_RECOVERED): CellPhase.UNMASKED,
        (CellPhase.SHARING, CellEvent.FAIL): CellPhase.FAILED,
        (CellPhase.UPLOADING, CellEvent.FAIL): CellPhase.FAILED,
        (CellPhase.CONFIRMING, CellEvent.FAIL): CellPhase.FAILED,
        (CellPhase.REVEALING, CellEvent.FAIL): CellPhase.FAILED,
        (CellPhase.UNMASKED, CellEvent.FAIL): CellPhase.FAILED,
    }
)

AGENT_TRANSITIONS: Final[Mapping[tuple[AgentPhase, AgentEvent], AgentPhase]] = MappingProxyType(
    {
        (AgentPhase.TRAINING, AgentEvent.TRAINING_DONE): AgentPhase.TRAINED,
        (AgentPhase.TRAINED, AgentEvent.READY_SIGNED): AgentPhase.READY,
        (AgentPhase.TRAINED, AgentEvent.UPLOAD_ACCEPTED): AgentPhase.UPLOADED,
        (AgentPhase.READY, AgentEvent.SHARES_SENT): AgentPhase.SHARED,
        (AgentPhase.SHARED, AgentEvent.UPLOAD_ACCEPTED): AgentPhase.UPLOADED,
        (AgentPhase.UPLOADED, AgentEvent.CONFIRM_SIGNED): AgentPhase.CONFIRMED,
        (AgentPhase.CONFIRMED, AgentEvent.REVEAL_SENT): AgentPhase.REVEALED,
        (AgentPhase.UPLOADED, AgentEvent.SUM_KNOWN): AgentPhase.REVEALED,
        (AgentPhase.CONFIRMED, AgentEvent.SUM_KNOWN): AgentPhase.REVEALED,
        (AgentPhase.READY, AgentEvent.ATTEMPT_FAILED): AgentPhase.TRAINED,
        (AgentPhase.SHARED, AgentEvent.ATTEMPT_FAILED): AgentPhase.TRAINED,
        (AgentPhase.UPLOADED, AgentEvent.ATTEMPT_FAILED): AgentPhase.TRAINED,
        (AgentPhase.TRAINING, AgentEvent.ABANDON): AgentPhase.ABANDONED,
        (AgentPhase.TRAINED, AgentEvent.ABANDON): AgentPhase.ABANDONED,
        (AgentPhase.READY, AgentEvent.ABANDON): AgentPhase.ABANDONED,
        (AgentPhase.SHARED, AgentEvent.ABANDON): AgentPhase.ABANDONED,
        (AgentPhase.UPLOADED, AgentEvent.CELL_LOST): AgentPhase.ABANDONED,
        (AgentPhase.CONFIRMED, AgentEvent.CELL_LOST): AgentPhase.ABANDONED,
    }
)

PhaseT = TypeVar("PhaseT", RoundPhase, CellPhase, AgentPhase)
EventT = TypeVar("EventT", RoundEvent, CellEvent, AgentEvent)


def advance(table: Mapping[tuple[PhaseT, EventT], PhaseT], phase: PhaseT, event: EventT) -> PhaseT:
    """The phase that follows.

    Args:
        table: One of the three tables of this module.
        phase: Where it stands.
        event: What happened.

    Raises:
        TransitionError: The phase does not allow the event; nothing was changed.
    """
    try:
        return table[phase, event]
    except KeyError:
        allowed = sorted(str(known) for where, known in table if where is phase)
        msg = f"{event.value!r} is not allowed in phase {phase.value!r}; allowed: {allowed}"
        raise TransitionError(msg) from None


def require_follows(
    table: Mapping[tuple[PhaseT, EventT], PhaseT], phase: PhaseT, successor: PhaseT
) -> None:
    """Refuse a phase that no single event leads to.

    Args:
        table: One of the three tables of this module.
        phase: Where it stands.
        successor: Where it is said to go.

    Raises:
        TransitionError: No event leads there.
    """
    if not any(where is phase and to is successor for (where, _), to in table.items()):
        msg = f"no event leads from phase {phase.value!r} to {successor.value!r}"
        raise TransitionError(msg)
