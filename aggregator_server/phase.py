"""What a phase of the round is: a name, and work that ends in an event."""

from dataclasses import dataclass
from typing import Protocol

from aggregator_server.errors import StoreError
from aggregator_server.store.rows import NewIncident, RoundRow
from aggregator_server.store.store import Store
from protocol.chain import RoundManifest
from protocol.phases import RoundEvent, RoundPhase
from protocol.signing import Signed
from protocol.wire import parse


@dataclass(frozen=True, kw_only=True)
class Found:
    """How a phase's work ended: the event, and what is journalled with it."""

    event: RoundEvent
    n_accepted: int | None = None
    filter_report: str | None = None
    passed: str | None = None
    failure: str | None = None
    incident: NewIncident | None = None
    journalled: bool = False
    """The work has journalled the successor itself, in one transaction with its result."""


class Phase(Protocol):
    """A phase of the round: what it is called, and what it does."""

    @property
    def name(self) -> RoundPhase:
        """The phase."""
        ...

    def work(self, row: RoundRow) -> Found | None:
        """Do the phase's work, which may have been done before; None to wait."""
        ...


def base_release(store: Store, round_number: int) -> int:
    """The release that a round started from.

    Raises:
        StoreError: There is no such round.
    """
    row = store.rounds.get(round_number)
    if row is None:  # cannot be: what asks belongs to the round
        msg = f"there is no round {round_number}"
        raise StoreError(msg)
    return round_manifest(row).release


def round_manifest(row: RoundRow) -> RoundManifest:
    """The manifest of a journalled round."""
    return parse(Signed[RoundManifest], row.manifest).body
