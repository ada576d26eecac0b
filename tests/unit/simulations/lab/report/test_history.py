"""A run as its folder tells it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simulations.errors import OutputError
from simulations.lab.records import AnswerNote, Arm, EndNote, Fate, Measure
from simulations.lab.report.history import History


def test_averages_count_categories_alike(finished_run: Path) -> None:
    history = History.read(finished_run)
    assert history.measures == (Measure.LOSS, Measure.EXACT_MATCH)
    assert history.releases(Measure.LOSS) == (0, 1, 2)
    assert [history.average(Measure.LOSS, release) for release in (0, 1, 2)] == [4.0, 3.0, 2.0]
    assert history.average(Measure.EXACT_MATCH, 2) == pytest.approx(0.6)
    assert list(history.by_category(Measure.LOSS, 2)) == ["closed_qa", "open_qa"]
    assert history.last(Measure.ROUGE_L) is None


def test_a_release_is_numbered_by_the_rounds_that_made_one(finished_run: Path) -> None:
    history = History.read(finished_run)
    assert [note.number for note in history.released] == [1, 3]
    assert [note.number for note in history.failed] == [2]
    # Round 2 failed, and its bytes were sent all the same: 3, then 3 + 6 + 9 thousand.
    assert [history.n_bytes(release) for release in (0, 1, 2, 3)] == [0, 3000, 18_000, None]


def test_costs_are_of_all_rounds(finished_run: Path) -> None:
    history = History.read(finished_run)
    assert (history.n_bytes_up, history.n_bytes_down) == (12_000, 6000)
    assert history.n_bytes_per_agent == 18_000 / 4
    assert history.epsilon == 0.75


def test_the_training_loss_weighs_agents_by_their_records(finished_run: Path) -> None:
    history = History.read(finished_run)
    # 10 records at 2.0 and 20 at 3.0; then nobody; then 10 at 2.0 and 40 at 5.0.
    assert history.train_loss(1) == pytest.approx((10 * 2.0 + 20 * 3.0) / 30)
    assert history.train_loss(2) is None
    assert history.train_loss(3) == pytest.approx((10 * 2.0 + 40 * 5.0) / 50)


def test_what_was_noted_twice_counts_once(
    make_run: Callable[..., Path], make_round: Callable[..., Any], make_scores: Callable[..., Any]
) -> None:
    root = make_run(
        "twice",
        [
            make_round(1, bytes_up=5),
            *make_scores(1, {"open_qa": 3.0}),
            make_round(1, bytes_up=7),
            *make_scores(1, {"open_qa": 2.0}),
        ],
    )
    history = History.read(root)
    assert [note.bytes_up for note in history.rounds] == [7]
    assert history.average(Measure.LOSS, 1) == 2.0


def test_a_release_that_lacks_categories_has_no_average(
    make_run: Callable[..., Path], make_scores: Callable[..., Any]
) -> None:
    notes = [*make_scores(0, {"a": 4.0, "b": 2.0}), *make_scores(1, {"a": 3.0})]
    history = History.read(make_run("part", notes))
    assert history.releases(Measure.LOSS) == (0,)
    assert history.last(Measure.LOSS) == 0


def test_only_the_newest_answers_are_kept(make_run: Callable[..., Path]) -> None:
    def answer(release: int) -> AnswerNote:
        return AnswerNote(
            release=release, category="a", instruction="Why?", wanted="So.", answer=f"{release}"
        )

    history = History.read(make_run("answers", [answer(0), answer(3)]))
    assert [note.answer for note in history.answers] == ["3"]


@pytest.mark.parametrize(
    ("arm", "n_rounds_noted", "ended", "state"),
    [
        (Arm.FEDERATED, 2, False, "unfinished: 2 of 3 rounds"),
        (Arm.FEDERATED, 0, False, "unfinished: 0 of 3 rounds"),
        (Arm.FEDERATED, 3, True, "finished"),
        (Arm.CENTRALISED, 0, False, "unfinished"),
        (Arm.BASE, 0, True, "finished"),
    ],
)
def test_how_far_a_run_came_is_said(
    make_run: Callable[..., Path],
    make_round: Callable[..., Any],
    arm: Arm,
    n_rounds_noted: int,
    ended: bool,
    state: str,
) -> None:
    rounds = [make_round(number + 1) for number in range(n_rounds_noted)]
    end = [EndNote(wall_s=1.0)] if ended else []
    assert History.read(make_run("state", [*rounds, *end], arm=arm)).state == state


def test_the_one_round_of_a_baseline_sends_nothing(
    make_run: Callable[..., Path], make_round: Callable[..., Any]
) -> None:
    history = History.read(make_run("all", [make_round(1)], arm=Arm.CENTRALISED))
    assert history.n_bytes_per_agent is None
    assert history.n_bytes(1) is None
    assert history.n_bytes_up == history.n_bytes_down == 0
    assert history.epsilon is None


def test_fates_come_by_round_and_client(finished_run: Path) -> None:
    found = [(note.number, agent, fate) for note, agent, fate in History.read(finished_run).fates()]
    assert found[2:5] == [(2, 2, Fate.FAILED), (2, 3, Fate.CELL_LOST), (3, 0, Fate.COUNTED)]
    assert [agent for number, agent, _ in found if number == 3] == [0, 1, 3]


def test_an_empty_folder_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no run"):
        History.read(tmp_path)
