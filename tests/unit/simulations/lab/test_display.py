"""What is told of a run that runs, and how long it will still take, by a clock that is set."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from simulations.lab.display import RunDisplay, SeriesPace
from simulations.lab.experiment import Experiment
from simulations.lab.records import Arm, Measure, RoundNote, RunCard, ScoreNote, VisitNote
from simulations.lab.run import Request
from simulations.lab.series import Member


@dataclass
class FakeClock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Shown:
    """A display, and what it has written."""

    def __init__(self, clock: FakeClock, *, terminal: bool, **options: Any) -> None:
        self.clock = clock
        self.file = io.StringIO()
        console = Console(file=self.file, width=100, force_terminal=terminal, color_system=None)
        self.display = RunDisplay(console, "paper", clock=clock, **options)

    def begins(
        self, n_rounds: int, *, cohort: int = 5, n_done: int = 0, arm: str = "federated"
    ) -> None:
        card = RunCard.model_construct(arm=Arm(arm), n_rounds=n_rounds, cohort=cohort)
        self.display.begun(card, n_done=n_done)

    def trains(self, n_visits: int, visit_s: float) -> None:
        for _ in range(n_visits):
            self.clock.now_s += visit_s
            self.display.visited(VisitNote.model_construct())

    def closes(self, number: int, *, failure: str | None = None) -> None:
        self.display.closed(RoundNote.model_construct(number=number, failure=failure, wall_s=1.0))

    def measures(self, release: int, took_s: float) -> None:
        self.clock.now_s += took_s
        note = ScoreNote(
            release=release, measure=Measure.LOSS, category="a", score=1.0, n_examples=1
        )
        self.display.scored([note])

    @property
    def last(self) -> str:
        """What a terminal shows when the display is closed, or the last line elsewhere."""
        self.file.seek(0)
        self.file.truncate()
        with self.display:
            pass
        return self.file.getvalue()


@pytest.fixture
def make_shown() -> Callable[..., Shown]:
    def make(*, terminal: bool = True, **options: Any) -> Shown:
        return Shown(FakeClock(), terminal=terminal, **options)

    return make


def test_trainings_of_minutes_have_a_remaining_time(make_shown: Callable[..., Shown]) -> None:
    shown = make_shown()
    shown.begins(20)
    assert "left" not in shown.last
    shown.trains(1, 40.0)  # the first of five in the first of 20 rounds of 200 s
    assert "0/20 rounds 0:00:40, at least 66 min left" in shown.last
    shown.clock.now_s += 80.0  # the next ones train
    assert "0:02:00, at least 65 min left" in shown.last


def test_measuring_is_a_stage_and_counts(make_shown: Callable[..., Shown]) -> None:
    shown = make_shown(every=5)
    shown.begins(10)
    shown.trains(5, 40.0)
    shown.closes(1)
    assert "paper: measuring release 0" in shown.last
    shown.measures(0, 400.0)
    # Nine rounds of 200 s; release 5, of which nothing better is known, and 10, like the first.
    assert "measuring" not in shown.last
    assert "1/10 rounds 0:10:00, about 43 min left" in shown.last
    for number in range(2, 6):
        shown.trains(5, 40.0)
        shown.closes(number)
    assert "measuring release 5" in shown.last
    shown.measures(5, 100.0)
    assert "about 23 min left" in shown.last  # five rounds, and answers of the last release
    for number in range(6, 11):
        shown.trains(5, 40.0)
        shown.closes(number)
    shown.clock.now_s += 100.0
    assert "measuring release 10" in shown.last
    assert "10/10 rounds 0:43:20, about 5 min left" in shown.last
    shown.measures(10, 300.0)
    assert "left" not in shown.last


def test_rounds_that_fail_take_time_and_make_none(make_shown: Callable[..., Shown]) -> None:
    shown = make_shown()
    shown.begins(4)
    shown.trains(5, 60.0)
    shown.closes(1, failure="too few agents")
    assert "measuring" not in shown.last
    shown.trains(5, 60.0)
    shown.closes(2)
    shown.measures(0, 1.0)
    assert "1/4 rounds" in shown.last
    assert "about 30 min left" in shown.last  # 600 s for a release


def test_a_run_that_goes_on_counts_what_this_sitting_did(make_shown: Callable[..., Shown]) -> None:
    shown = make_shown(every=5)
    shown.begins(20, n_done=18)
    assert not shown.display.was_run_whole
    shown.trains(5, 60.0)
    shown.closes(19)
    assert "19/20 rounds 0:05:00, at least 5 min left" in shown.last
    other = make_shown()
    other.begins(20, n_done=20)
    assert "measuring release 20" in other.last


def test_a_base_is_measured_and_nothing_else(make_shown: Callable[..., Shown]) -> None:
    shown = make_shown()
    shown.begins(0, arm="base", cohort=1)
    assert "measuring release 0" in shown.last
    assert shown.display.was_run_whole


def test_elsewhere_than_on_a_terminal_every_round_is_a_line(
    make_shown: Callable[..., Shown],
) -> None:
    shown = make_shown(terminal=False, later_s=7200.0)
    shown.begins(3)
    shown.trains(5, 20.0)
    shown.closes(1)
    shown.measures(0, 20.0)
    shown.trains(5, 20.0)
    shown.closes(2)
    assert shown.file.getvalue().splitlines() == [
        "paper: round 1, 1.0 s, at least 3 min left, about 2.1 h left for all",
        "paper: measuring release 0",
        "paper: release 0: loss 1.000",
        "paper: round 2, 1.0 s, about 2 min left, about 2.0 h left for all",
    ]


def test_until_a_run_tells_others_like_it_do(make_shown: Callable[..., Shown]) -> None:
    shown = make_shown(usual_s=600.0, later_s=3600.0)
    shown.clock.now_s += 60.0  # loads
    assert "0:01:00, about 9 min left, about 69 min left for all" in shown.last


def members(*runs: tuple[str, Arm, int]) -> list[Member]:
    return [
        Member(
            request=Request(experiment=Experiment(name="small"), arm=arm, seed=seed),
            folder=Path(label),
            label=label,
            settings={},
        )
        for label, arm, seed in runs
    ]


def test_a_series_takes_what_its_members_took_so_far() -> None:
    points = members(*[(f"rank {rank}", Arm.FEDERATED, seed) for rank in (4, 8) for seed in (1, 2)])
    pace = SeriesPace(points, ended=[False] * 4)
    assert pace.later_s(1) is None
    pace.ran(points[0], 100.0)
    assert pace.later_s(2) == 200.0
    pace.ran(points[1], 200.0)
    pace.ran(points[2], 900.0)
    assert pace.usual_s(points[3]) == 900.0  # of its own label, not the mean of all
    assert pace.later_s(4) == 0.0


def test_members_that_an_earlier_sitting_ended_take_no_time() -> None:
    points = members(*[("rank 4", Arm.FEDERATED, seed) for seed in range(4)])
    pace = SeriesPace(points, ended=[True, False, True, False])
    assert pace.later_s(1) is None
    pace.ran(points[1], 60.0)
    assert pace.later_s(2) == 60.0


def test_a_base_that_is_measured_says_nothing_about_trainings() -> None:
    runs = members(
        *[
            run
            for seed in (1, 2)
            for run in (
                ("base", Arm.BASE, seed),
                ("local, smallest", Arm.LOCAL, seed),
                ("local, largest", Arm.LOCAL, seed),
                ("centralised", Arm.CENTRALISED, seed),
            )
        ]
    )
    pace = SeriesPace(runs, ended=[False] * 8)
    for run, took_s in zip(runs[:3], (5.0, 10.0, 60.0), strict=True):
        pace.ran(run, took_s)
    assert pace.later_s(3) is None
    pace.ran(runs[3], 600.0)
    assert pace.later_s(4) == 675.0
