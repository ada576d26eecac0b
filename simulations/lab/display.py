"""How a run looks while it runs: rounds, losses, and how long it will still take."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from simulations.lab.records import Measure, RoundNote, RunCard, ScoreNote, VisitNote


class RunDisplay:
    """A listener that shows a bar on a terminal, and a line a round elsewhere.

    The time that remains is told from the pace of the last visits, without that of measuring.

    Args:
        console: Where to.
        title: Of the run.
    """

    def __init__(self, console: Console, title: str) -> None:
        """Nothing is shown yet."""
        self._console = console
        self._title = title
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=None)
        self._plain = not console.is_terminal
        self._n_visited = 0
        self._cohort = 1

    def __enter__(self) -> Self:
        """Begin to show."""
        if not self._plain:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        if not self._plain:
            self._progress.stop()

    def stage(self, text: str) -> None:
        """Something begins that takes a while."""
        self._progress.update(self._task, description=f"{self._title}: {escape(text)}")
        if self._plain:
            self._say(f"{self._title}: {text}")

    def begun(self, card: RunCard, *, n_done: int) -> None:
        """The run is about to train."""
        self._cohort = card.cohort
        self._progress.update(self._task, total=card.n_rounds, completed=n_done)
        self._progress.update(self._task, description=self._title)
        if n_done:
            self._say(f"{self._title}: goes on after {n_done} of {card.n_rounds} rounds")

    def visited(self, note: VisitNote) -> None:  # noqa: ARG002 - a listener's
        """An agent's training ended: a part of a round is done."""
        self._n_visited += 1
        part = min(self._n_visited / self._cohort, 0.999)
        task = self._progress.tasks[0]
        self._progress.update(self._task, completed=int(task.completed) + part)

    def closed(self, note: RoundNote) -> None:
        """A round ended."""
        self._n_visited = 0
        task = self._progress.tasks[0]
        whole = int(task.completed) + (note.failure is None)
        self._progress.update(self._task, completed=whole)
        if note.failure is not None:
            self._say(f"{self._title}: round {note.number} failed: {note.failure}")
        elif self._plain:
            self._say(f"{self._title}: round {note.number}, {note.wall_s:.1f} s")

    def scored(self, notes: Sequence[ScoreNote]) -> None:
        """A release was measured."""
        told = [
            f"{measure.value.replace('_', ' ')} {np.mean(scores):.3f}"
            for measure in Measure
            if (scores := [note.score for note in notes if note.measure is measure])
        ]
        if told:
            self._say(f"{self._title}: release {notes[0].release}: {', '.join(told)}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
