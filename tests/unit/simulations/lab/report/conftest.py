"""Folders of runs that never ran: notes made up, and appended as a run appends them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from simulations.lab.folder import RunFolder
from simulations.lab.records import (
    Arm,
    Cryptography,
    EndNote,
    Fate,
    Measure,
    Note,
    RoundNote,
    RunCard,
    ScoreNote,
    VisitNote,
)
from simulations.lab.report.page import write_report

DIGEST = "ab" * 32
BEGAN_AT = 1_800_000_000.0


def a_card(**changes: Any) -> RunCard:
    values = {
        "experiment": "paper",
        "arm": Arm.FEDERATED,
        "client": None,
        "seed": 1,
        "experiment_sha256": "11" * 32,
        "manifest_sha256": "22" * 32,
        "base_fingerprint": "33" * 32,
        "data_sha256": "44" * 32,
        "n_clients": 4,
        "n_held_out": 400,
        "n_repeated": 2,
        "n_values": 1000,
        "cohort": 2,
        "n_rounds": 3,
        "engine": "here, one process",
        "group_size": 2,
        "cryptography": Cryptography.EXACT_SUM,
        "profile": "P0",
        "guarantee": "no formal guarantee (profile P0): ε = ∞",
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "machine": "a processor",
        "began_at": BEGAN_AT,
    }
    return RunCard(**{**values, **changes})


def a_round(number: int, **changes: Any) -> RoundNote:
    values = {
        "number": number,
        "release": None if changes.get("failure") else number,
        "fates": {0: Fate.COUNTED, 1: Fate.COUNTED},
        "n_cells": 1,
        "n_cells_removed": 0,
        "update_norm": 0.5 / number,
        "covariance_gap": None,
        "learning_rate": 0.01,
        "bytes_up": 2000 * number,
        "bytes_down": 1000 * number,
        "waited_s": None,
        "duration_s": None,
        "epsilon": None,
        "train_s": 3.0,
        "server_s": 0.5,
        "wall_s": 4.0,
        "release_sha256": DIGEST,
    }
    return RoundNote(**{**values, **changes})


def a_visit(number: int, agent: int, **changes: Any) -> VisitNote:
    values = {
        "round": number,
        "agent": agent,
        "n_examples": 10 * (agent + 1),
        "n_tokens": 1234,
        "n_steps": 4,
        "first_loss": 3.0,
        "last_loss": 2.0 + agent,
        "weight": 10,
        "update_norm": 0.25,
        "train_s": 1.5,
    }
    return VisitNote(**{**values, **changes})


def scores_of(
    release: int, by_category: dict[str, float], measure: Measure = Measure.LOSS
) -> list[Note]:
    return [
        ScoreNote(release=release, measure=measure, category=name, score=value, n_examples=7)
        for name, value in by_category.items()
    ]


def write_run(root: Path, notes: Sequence[Note], **card: Any) -> Path:
    with RunFolder(root) as folder:
        folder.open_card(a_card(**card), experiment='name = "paper"\n')
        folder.append(notes)
    return root


def write_finished_run(root: Path) -> Path:
    return write_run(
        root,
        [
            *scores_of(0, {"open_qa": 5.0, "closed_qa": 3.0}),
            *scores_of(0, {"open_qa": 0.0, "closed_qa": 0.1}, Measure.EXACT_MATCH),
            a_visit(1, 0),
            a_visit(1, 1),
            a_round(1, epsilon=0.5),
            *scores_of(1, {"open_qa": 3.5, "closed_qa": 2.5}),
            a_visit(2, 2, error="ran out of memory", first_loss=None, last_loss=None),
            a_round(
                2,
                fates={2: Fate.FAILED, 3: Fate.CELL_LOST},
                failure="too few agents",
                epsilon=0.5,
            ),
            a_visit(3, 0),
            a_visit(3, 3),
            a_round(
                3,
                release=2,
                fates={0: Fate.COUNTED, 3: Fate.COUNTED, 1: Fate.LATE},
                epsilon=0.75,
            ),
            *scores_of(2, {"open_qa": 2.5, "closed_qa": 1.5}),
            *scores_of(2, {"open_qa": 0.5, "closed_qa": 0.7}, Measure.EXACT_MATCH),
            EndNote(wall_s=12.5),
        ],
        n_rounds=2,
        profile="P1",
    )


@pytest.fixture
def make_round() -> Callable[..., RoundNote]:
    return a_round


@pytest.fixture
def make_visit() -> Callable[..., VisitNote]:
    return a_visit


@pytest.fixture
def make_scores() -> Callable[..., list[Note]]:
    return scores_of


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run's folder of these notes; the card is changed by name."""

    def make(name: str, notes: Sequence[Note], **card: Any) -> Path:
        return write_run(tmp_path / name, notes, **card)

    return make


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """Three rounds of four clients, of which the second failed; loss, and exact match at the ends.

    The average loss is 4, then 3, then 2.
    """
    return write_finished_run(tmp_path / "finished")


@pytest.fixture(scope="session")
def reported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its report, to be looked at and not to be changed."""
    root = write_finished_run(tmp_path_factory.mktemp("reported") / "run")
    write_report(root)
    return root
