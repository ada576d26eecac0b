"""Who is told how a run goes."""

from collections.abc import Sequence
from typing import Protocol

from simulations.lab.records import RoundNote, RunCard, ScoreNote, VisitNote


class Listener(Protocol):
    """Told how a run goes."""

    def stage(self, text: str) -> None:
        """Something begins that takes a while."""
        ...

    def begun(self, card: RunCard, *, n_done: int) -> None:
        """The run is about to train; so many rounds were done by earlier sittings."""
        ...

    def visited(self, note: VisitNote) -> None:
        """An agent's training ended."""
        ...

    def closed(self, note: RoundNote) -> None:
        """A round ended."""
        ...

    def scored(self, notes: Sequence[ScoreNote]) -> None:
        """A release was measured."""
        ...


class Silent:
    """A listener that says nothing."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def begun(self, card: RunCard, *, n_done: int) -> None:
        """Nothing."""

    def visited(self, note: VisitNote) -> None:
        """Nothing."""

    def closed(self, note: RoundNote) -> None:
        """Nothing."""

    def scored(self, notes: Sequence[ScoreNote]) -> None:
        """Nothing."""
