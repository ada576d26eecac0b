"""How a run looks while it runs: rounds, losses, and how long it will still take."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from simulations.lab.records import Arm, Measure, RoundNote, RunCard, ScoreNote, VisitNote
from simulations.lab.report.drawing import time_unit

if TYPE_CHECKING:
    from simulations.lab.series import Member

Clock = Callable[[], float]
"""Seconds since any moment."""


class RunPace:
    """How long a run will still take, from what its rounds and its measurings took so far.

    Rounds that failed count with those that made a release. The first and the last release answer
    questions beside their loss, so they are timed apart from the others.

    Args:
        every: After so many rounds a release is measured, beside the first and the last; 0: never.
        clock: What time it is.
    """

    def __init__(self, *, every: int, clock: Clock) -> None:
        """Nothing is known yet."""
        self._every = every
        self._clock = clock
        self._mark = clock()
        self._n_rounds: int | None = None
        self._n_made = 0
        self._round_s = 0.0
        self._part, self._part_s = 0.0, 0.0
        self._due: list[int] = []
        self._measuring_s: dict[bool, float] = {}
        self.n_done = 0

    def begun(self, card: RunCard, *, n_done: int) -> None:
        """The run is about to train.

        Args:
            card: Of the run.
            n_done: Rounds that earlier sittings did.
        """
        self._n_rounds, self.n_done, self._mark = card.n_rounds, n_done, self._clock()
        due = range(self._every, card.n_rounds, self._every) if self._every else ()
        self._due = [release for release in due if release > n_done] + [card.n_rounds]
        if card.arm is Arm.FEDERATED and n_done == 0:
            self._due.insert(0, 0)

    def visited(self, part: float) -> None:
        """A part of the round is done."""
        self._part, self._part_s = part, self._clock() - self._mark

    def closed(self, *, failed: bool) -> None:
        """A round ended."""
        self._round_s += self._lap()
        self._part = 0.0
        self._n_made += not failed
        self.n_done += not failed

    def scored(self, release: int) -> None:
        """A release was measured."""
        self._measuring_s[self._is_end(release)] = self._lap()
        self._due = [one for one in self._due if one > release]

    @property
    def measured_now(self) -> int | None:
        """The release that is being measured; None: none is."""
        due = self._due[:1]
        now = due and due[0] <= self.n_done and (self.n_done or not self._n_rounds)
        return due[0] if now else None

    @property
    def is_least(self) -> bool:
        """Whether measuring will come on top, as nothing was measured yet."""
        return bool(self._due) and not self._measuring_s

    @property
    def left_s(self) -> float | None:
        """Seconds; None: it cannot be told yet."""
        n_left = 0 if self._n_rounds is None else self._n_rounds - self.n_done
        measuring = [self._usual_s(release) for release in self._due]
        if self._n_made:
            round_s = self._round_s / self._n_made
        elif self._part:
            round_s = self._part_s / self._part
        elif self._n_rounds is None or n_left or not any(measuring):
            return None
        else:
            round_s = 0.0
        current_s = round_s * bool(n_left) if self.measured_now is None else measuring[0]
        spent_s = min(self._clock() - self._mark, current_s)
        return n_left * round_s + sum(measuring) - spent_s

    def _lap(self) -> float:
        before, self._mark = self._mark, self._clock()
        return self._mark - before

    def _is_end(self, release: int) -> bool:
        return release in {0, self._n_rounds}

    def _usual_s(self, release: int) -> float:
        kind = self._is_end(release)
        return self._measuring_s.get(kind, self._measuring_s.get(not kind, 0.0))


class SeriesPace:
    """How long a series will still take, from those of its members that this sitting ran whole.

    A member is expected to take what others of its label took, else what others of its arm took. A
    base that is only measured says nothing about a training, so where no other of the arm was run
    yet nothing is said.

    Args:
        members: In the order that they are run.
        ended: Of each, whether an earlier sitting ended it: it takes no time, and tells of none.
    """

    def __init__(self, members: "Sequence[Member]", *, ended: Sequence[bool]) -> None:
        """Nothing was run yet."""
        self._members = members
        self._ended = ended
        self._took: list[tuple[Member, float]] = []

    def ran(self, member: "Member", took_s: float) -> None:
        """A member was run from beginning to end.

        Args:
            member: Which.
            took_s: What it took.
        """
        self._took.append((member, took_s))

    def usual_s(self, member: "Member") -> float | None:
        """What a member may take; None: no other tells.

        Args:
            member: Which.
        """
        arm = member.request.arm
        alike = [took_s for one, took_s in self._took if one.label == member.label]
        alike = alike or [took_s for one, took_s in self._took if one.request.arm is arm]
        return statistics.fmean(alike) if alike else None

    def later_s(self, number: int) -> float | None:
        """What all members after one may take; None: it cannot be told yet.

        Args:
            number: Of the one, from 1.
        """
        total_s = 0.0
        for member, ended in zip(self._members[number:], self._ended[number:], strict=True):
            usual_s = 0.0 if ended else self.usual_s(member)
            if usual_s is None:
                return None
            total_s += usual_s
        return total_s


class RunDisplay:
    """A listener that shows a bar on a terminal, and a line a round elsewhere.

    Args:
        console: Where to.
        title: Of the run.
        every: After so many rounds a release is measured; 0: only the first and the last.
        usual_s: What runs like this one took; None: there was none.
        later_s: What the runs after this one may take; None: there is none, or nobody knows.
        clock: What time it is.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        *,
        every: int = 0,
        usual_s: float | None = None,
        later_s: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Nothing is shown yet."""
        self._console = console
        self._title = title
        self._usual_s, self._later_s = usual_s, later_s
        self._clock, self._entered = clock, clock()
        self._pace = RunPace(every=every, clock=clock)
        self._progress = _TwoLines(
            SpinnerColumn(),
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("rounds"),
            _Told(self._times),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=None)
        self._plain = not console.is_terminal
        self._n_visited = 0
        self._cohort = 1
        self.was_run_whole = False
        """Whether this sitting began the run."""

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
        self._progress.update(self._task, description=f"{self._title}: {text}")
        if self._plain:
            self._say(f"{self._title}: {text}")

    def begun(self, card: RunCard, *, n_done: int) -> None:
        """The run is about to train."""
        self._cohort = card.cohort
        self.was_run_whole = n_done == 0
        self._pace.begun(card, n_done=n_done)
        self._progress.update(self._task, total=card.n_rounds, completed=n_done)
        if n_done:
            self._say(f"{self._title}: goes on after {n_done} of {card.n_rounds} rounds")
        self._go_on()

    def visited(self, note: VisitNote) -> None:  # noqa: ARG002 - a listener's
        """An agent's training ended: a part of a round is done."""
        self._n_visited += 1
        part = min(self._n_visited / self._cohort, 0.999)
        self._pace.visited(part)
        self._progress.update(self._task, completed=self._pace.n_done + part)

    def closed(self, note: RoundNote) -> None:
        """A round ended."""
        self._n_visited = 0
        self._pace.closed(failed=note.failure is not None)
        self._progress.update(self._task, completed=self._pace.n_done)
        if note.failure is not None:
            self._say(f"{self._title}: round {note.number} failed: {note.failure}")
        elif self._plain:
            took = f"round {note.number}, {note.wall_s:.1f} s"
            self._say(f"{self._title}: {', '.join(filter(None, (took, self._left())))}")
        self._go_on()

    def scored(self, notes: Sequence[ScoreNote]) -> None:
        """A release was measured."""
        told = [
            f"{measure.value.replace('_', ' ')} {np.mean(scores):.3f}"
            for measure in Measure
            if (scores := [note.score for note in notes if note.measure is measure])
        ]
        if told:
            self._pace.scored(notes[0].release)
            self._say(f"{self._title}: release {notes[0].release}: {', '.join(told)}")
            self._go_on()

    def _go_on(self) -> None:
        """Training goes on, unless a release is measured first."""
        if self._pace.measured_now is None:
            self._progress.update(self._task, description=self._title)
        else:
            self.stage(f"measuring release {self._pace.measured_now}")

    def _times(self) -> str:
        elapsed = str(timedelta(seconds=int(self._clock() - self._entered)))
        return ", ".join(filter(None, (elapsed, self._left())))

    def _left(self) -> str:
        """How long it will still take; empty: it cannot be told, or nothing is left."""
        left_s, about = self._pace.left_s, "at least" if self._pace.is_least else "about"
        if left_s is None and self._usual_s is not None:
            left_s, about = max(0.0, self._usual_s - (self._clock() - self._entered)), "about"
        if left_s is None:
            return ""
        told = [f"{about} {_rounded(left_s)} left"] if left_s else []
        if self._later_s:
            told.append(f"about {_rounded(left_s + self._later_s)} left for all")
        return ", ".join(told)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _TwoLines(Progress):
    """What runs above how far it is: beside each other they leave no room for the times."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield Text(task.description, no_wrap=True, overflow="ellipsis")
        yield from super().get_renderables()


class _Told(ProgressColumn):
    """A column of text that is asked for as it is shown."""

    def __init__(self, tell: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._tell = tell

    def render(self, task: Task) -> Text:  # noqa: ARG002 - a column's
        return Text(self._tell())


def _rounded(time_s: float) -> str:
    """A time with no more digits than an estimate deserves."""
    divisor, unit = time_unit(max(time_s, 1.0))
    short = {"seconds": "s", "minutes": "min", "hours": "h"}.get(unit, unit)
    return f"{time_s / divisor:.{1 if divisor > 60.0 else 0}f} {short}"
