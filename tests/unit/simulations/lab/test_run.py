"""Runs: equal ones, what a round notes, what becomes of agents, the arms."""

import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_agent.errors import EvaluationError
from privacy.errors import UpdateRangeError
from privacy.fixed_point import encode
from protocol.blocks import LoraRule, Schedule, Template
from protocol.manifest import FederationManifest
from protocol.privacy import AgentPrivacy, CentralPrivacy, ExamplePrivacy
from protocol.wire import parse
from quant.base_model import LoadedBase
from quant.peft_folder import read_finished
from simulations.answers import template_of_folder
from simulations.errors import ExperimentError
from simulations.lab import engines
from simulations.lab.attackers import Attackers
from simulations.lab.chance import RunChance
from simulations.lab.data import prepare_data
from simulations.lab.engines import Engine, Processes
from simulations.lab.experiment import Experiment
from simulations.lab.folder import read_card, read_vector
from simulations.lab.records import (
    AnswerNote,
    Arm,
    Cryptography,
    EndNote,
    Fate,
    Measure,
    ScoreNote,
    VisitNote,
)
from simulations.lab.run import Request, run
from simulations.lab.terms import make_terms
from simulations.lab.visits import Setup
from simulations.masked_cells import Stage

MASKED: dict[str, object] = {
    "federation__masking": "cells",
    "federation__n_rounds": 2,
    "evaluation__answers": 0,
    "data__n_clients": 12,
    "data__per_category": 20,
    "federation__cohort": 11,
    "federation__cell_target": 5,
}
"""Two cells, of six and five members."""


# Equal runs


def test_guarantee_1_an_equal_request_gives_equal_releases_bit_for_bit(
    releases: Callable[..., list[str]], whole: Path, outcome: Callable[[Path], Any]
) -> None:
    first = outcome(whole).digests
    assert len(set(first)) == 2
    assert releases() == first
    assert not set(releases(seed=2)) & set(first)


def test_a_group_trains_the_same_but_for_rounding(
    tmp_path: Path, small: Experiment, here: Engine, whole: Path, outcome: Callable[[Path], Any]
) -> None:
    grouped = small.with_values({"engine.group": 2})
    run(tmp_path / "run", Request(experiment=grouped), here)
    found, alone = outcome(tmp_path / "run"), outcome(whole)
    assert not set(found.digests) & set(alone.digests)
    assert read_card(tmp_path / "run").group_size == 2
    loss = {
        root: np.mean([note.score for note in notes if note.measure is Measure.LOSS])
        for root, notes in (
            (one.root, [note for note in one.of(ScoreNote) if note.release == 2])
            for one in (found, alone)
        )
    }
    assert loss[found.root] == pytest.approx(loss[alone.root], abs=1e-3)
    for note, other in zip(found.rounds, alone.rounds, strict=True):
        assert note.fates == other.fates
        assert note.update_norm == pytest.approx(other.update_norm, rel=1e-3)
    vectors = [read_vector(root / "releases" / "0002.npy") for root in loss]
    first = read_vector(whole / "releases" / "0000.npy")
    moved = np.linalg.norm(vectors[1] - first)
    assert np.linalg.norm(vectors[0] - vectors[1]) < 2e-3 * moved


def test_guarantee_1_processes_give_the_same_releases_bit_for_bit(
    tmp_path: Path, small: Experiment, whole: Path, outcome: Callable[[Path], Any]
) -> None:
    engine = Processes(2)
    try:
        run(tmp_path / "run", Request(experiment=small), engine)
    finally:
        engine.close()
    found = outcome(tmp_path / "run")
    assert found.digests == outcome(whole).digests
    assert found.notes == outcome(whole).notes
    assert read_card(tmp_path / "run").engine == "2 processes"


def test_guarantee_1_two_workers_of_a_ray_cluster_give_the_same_releases_bit_for_bit(
    tmp_path: Path, small: Experiment, whole: Path, outcome: Callable[[Path], Any]
) -> None:
    pytest.importorskip("ray")
    from simulations.lab.ray_engine import RayEngine

    engine = RayEngine(2)
    try:
        run(tmp_path / "run", Request(experiment=small), engine)
    finally:
        engine.close()
    found = outcome(tmp_path / "run")
    assert found.digests == outcome(whole).digests
    assert found.notes == outcome(whole).notes
    assert read_card(tmp_path / "run").engine == "Ray, 2 workers"


# What is noted


def test_a_run_notes_every_visit_round_score_and_answer(
    whole: Path, small: Experiment, outcome: Callable[[Path], Any]
) -> None:
    found, data = outcome(whole), prepare_data(small.data, seed=1)
    categories = {record.category for record in data.held_out}
    visits = found.of(VisitNote)
    assert [note.number for note in found.rounds] == [1, 2]
    assert [note.release for note in found.rounds] == [1, 2]
    for note in found.rounds:
        cohort = {one.agent: one for one in visits if one.round == note.number}
        assert note.fates == dict.fromkeys(cohort, Fate.COUNTED)
        assert len(cohort) == note.n_cells == 3
        assert note.train_s == pytest.approx(sum(one.train_s for one in cohort.values()))
        assert 0.0 < note.server_s < note.wall_s
        assert note.epsilon is note.waited_s is note.duration_s is note.failure is None
        n_values = read_card(whole).n_values
        assert note.bytes_up == note.bytes_down == 3 * 4 * n_values
    for note in visits:
        assert note.n_examples == note.weight == data.sizes[note.agent]
        assert note.n_steps == 3
        assert note.n_tokens > 0
        assert note.error is None
    scores = found.of(ScoreNote)
    assert {(note.release, note.measure, note.category) for note in scores} == {
        (release, measure, category)
        for release in (0, 2)
        for measure in Measure
        for category in categories
    }
    assert {note.n_examples for note in scores if note.measure is Measure.LOSS} == {2}
    assert len(found.of(AnswerNote)) == 2 * len(categories)
    assert len(found.of(EndNote)) == 1
    losses = [
        np.mean([n.score for n in scores if (n.release, n.measure) == (release, Measure.LOSS)])
        for release in (0, 2)
    ]
    assert losses[1] < 0.7 * losses[0]  # it learns


def test_the_learning_rate_follows_one_schedule_over_all_rounds(go: Callable[..., Any]) -> None:
    rates = [note.learning_rate for note in go(federation__n_rounds=4).rounds]
    peak, final = 5e-3, 5e-3 * 0.1
    expected = [final + (peak - final) * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates == pytest.approx(expected)
    constant = go(federation__n_rounds=3, federation__schedule=Schedule.CONSTANT.value)
    assert [note.learning_rate for note in constant.rounds] == [peak] * 3


def test_what_averaging_factors_lost_is_noted_where_the_release_is_measured(
    go: Callable[..., Any],
) -> None:
    gaps = [note.covariance_gap for note in go(federation__n_rounds=5, evaluation__every=2).rounds]
    assert [gap is not None for gap in gaps] == [False, True, False, True, True]
    shared = go(federation__n_rounds=2, federation__lora_rule="ffa-lora")
    assert all(not note.covariance_gap for note in shared.rounds)


def test_releases_are_measured_first_last_and_after_every_so_many_rounds(
    go: Callable[..., Any],
) -> None:
    found = go(federation__n_rounds=5, evaluation__every=2)
    losses = {note.release for note in found.of(ScoreNote) if note.measure is Measure.LOSS}
    assert losses == {0, 2, 4, 5}
    assert {note.release for note in found.of(AnswerNote)} == {0, 5}
    bare = go(federation__n_rounds=3, evaluation__every=0, evaluation__answers=0)
    assert {note.release for note in bare.of(ScoreNote)} == {0, 3}
    assert not bare.of(AnswerNote)


def test_the_last_release_lies_there_as_a_peft_folder(whole: Path) -> None:
    tensors = load_file(whole / "adapter" / "adapter_model.safetensors")
    joined = np.concatenate([tensors[name].ravel() for name in sorted(tensors)])
    release = read_vector(whole / "releases" / "0002.npy")
    np.testing.assert_array_equal(np.sort(joined), np.sort(release))
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)


def test_only_the_releases_that_are_needed_stay(go: Callable[..., Any]) -> None:
    found = go(federation__n_rounds=6, federation__optimizer="fedadam")
    kept = sorted(path.name for path in (found.root / "releases").iterdir())
    assert kept == ["0000.npy", "0004.npy", "0005.npy", "0006.npy"]
    state = sorted(path.name for path in (found.root / "state").iterdir())
    assert state == ["optimizer-0005.bin", "optimizer-0006.bin"]


def test_the_card_says_what_the_run_is(whole: Path, small: Experiment, base: LoadedBase) -> None:
    card = read_card(whole)
    terms = make_terms(small, base.description, arm=Arm.FEDERATED, seed=1)
    assert card.manifest_sha256 == terms.manifest.digest().hex()
    assert parse(FederationManifest, (whole / "manifest.json").read_bytes()) == terms.manifest
    assert (card.n_held_out, card.n_repeated) == (16, 0)
    assert card.experiment_sha256 == small.digest()
    assert card.base_fingerprint == base.description.base.fingerprint.hex()
    assert (card.n_clients, card.cohort, card.n_rounds, card.seed) == (6, 3, 2, 1)
    assert (card.engine, card.group_size) == ("this process", 1)
    assert (card.profile, card.cryptography) == ("P0", None)
    assert "ε = ∞" in card.guarantee
    assert {"torch", "peft", "bitsandbytes"} <= set(card.versions)


def test_a_run_s_adapter_is_asked_by_the_template_that_it_was_trained_with(
    go: Callable[..., Any], tmp_path: Path
) -> None:
    """It has no provenance, as no federation signed for it."""
    for template in Template:
        adapter = go(federation__template=template.value).root / "adapter"
        assert template_of_folder(read_finished(adapter), adapter) is template
    foreign = shutil.copytree(adapter, tmp_path / "elsewhere" / "adapter")
    assert template_of_folder(read_finished(foreign), foreign) is Template.ALPACA


def test_workers_are_told_whose_run_it_is(
    go: Callable[..., Any], fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that differ in records alone have one manifest; their records must not be mixed up."""
    told: list[set[str]] = []
    real = fake.ask

    def ask(setup: Setup, call: Callable[[Any], Any]) -> Any:
        if setup.manifest is not None:
            told[-1].add(setup.run)
        return real(setup, call)

    monkeypatch.setattr(fake, "ask", ask)
    for values in (
        {},
        {"data__per_category": 13},
        {"arm": Arm.CENTRALISED},
        {"arm": Arm.LOCAL, "client": 0},
    ):
        told.append(set())
        go(**values)
    assert [len(runs) for runs in told] == [1] * 4
    assert len(set.union(*told)) == 4


# Masks


def test_guarantee_2_exact_sums_are_those_of_the_real_cryptography_bit_for_bit(
    go: Callable[..., Any],
) -> None:
    found = {
        kind: go(**MASKED, population__vanish=0.1, engine__cryptography=kind.value)
        for kind in Cryptography
    }
    real, exact = found[Cryptography.REAL], found[Cryptography.EXACT_SUM]
    assert real.digests == exact.digests
    assert real.notes == exact.notes
    fates = {fate for note in real.rounds for fate in note.fates.values()}
    assert Fate.VANISHED in fates
    assert len(set(real.digests)) == 2
    for kind, one in found.items():
        assert read_card(one.root).cryptography is kind


def test_a_masked_release_is_the_open_one_but_for_the_encoding(go: Callable[..., Any]) -> None:
    values = MASKED | {"federation__n_rounds": 1, "federation__lora_rule": "ffa-lora"}
    masked = go(**values)
    # The filter sees two sums, and eleven updates: without it both average all.
    open_ = go(**values | {"federation__masking": "off", "federation__filter": "none"})
    vectors = [read_vector(one.root / "releases" / "0001.npy") for one in (masked, open_)]
    start = read_vector(masked.root / "releases" / "0000.npy")
    changes = [vector - start for vector in vectors]
    error = np.linalg.norm(changes[0] - changes[1]) / np.linalg.norm(changes[1])
    assert 0.0 < error < 0.05
    assert [note.n_cells for one in (masked, open_) for note in one.rounds] == [2, 11]


def test_a_cell_that_too_many_leave_is_lost_and_the_round_closes_with_the_other(
    go: Callable[..., Any],
) -> None:
    found = go(**MASKED, population__vanish=0.25, seed=8)
    first = found.rounds[0]
    lost = {agent for agent, fate in first.fates.items() if fate is Fate.CELL_LOST}
    assert len(lost) in {5, 6}
    assert first.failure is None
    assert first.n_cells == 1
    assert Fate.COUNTED in first.fates.values()
    assert found.digests[0] != found.digests[1]


def test_a_round_that_loses_all_cells_fails_and_the_run_goes_on_with_the_next(
    go: Callable[..., Any],
) -> None:
    found = go(
        **MASKED | {"federation__cohort": 5},
        population__vanish=0.25,
        seed=3,
    )
    failed = [note for note in found.rounds if note.failure is not None]
    assert failed
    for note in failed:
        assert note.failure == "no cell of the round gave a sum"
        assert note.release is None
        assert set(note.fates.values()) == {Fate.CELL_LOST}
        before = found.rounds[note.number - 2].release_sha256 if note.number > 1 else None
        assert note.release_sha256 == before or before is None
    assert [note.release for note in found.rounds if note.failure is None] == [1, 2]
    assert [note.number for note in found.rounds] == list(range(1, len(found.rounds) + 1))
    assert len(found.rounds) > 2


def test_a_run_whose_rounds_all_fail_gives_up_with_one_sentence(go: Callable[..., Any]) -> None:
    with pytest.raises(ExperimentError, match="6 rounds gave 0 releases: no cell of the round"):
        go(**MASKED | {"federation__cohort": 5}, population__vanish=0.95)


def test_an_update_out_of_the_masks_range_is_withdrawn(
    go: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def refuse_one(*args: Any, **kwargs: Any) -> Any:
        if next(calls) % 12 == 4:  # all are selected, and encoded in the order of their numbers
            msg = "the update has values that are not finite"
            raise UpdateRangeError(msg)
        return encode(*args, **kwargs)

    monkeypatch.setattr("simulations.lab.server.encode", refuse_one)
    found = go(**MASKED | {"federation__cohort": 12})
    for note in found.rounds:
        assert note.fates.pop(4) is Fate.FAILED
        assert list(note.fates.values()) == [Fate.COUNTED] * 11
        assert note.n_cells == 2


def test_too_few_for_a_cell_is_a_failed_round(go: Callable[..., Any], fake: Any) -> None:
    fake.failing = set(range(8))
    with pytest.raises(ExperimentError, match="0 releases: too few updates: 4 of at least 5"):
        go(**MASKED | {"federation__cohort": 12})


class Leaving:
    """The first cell of a round loses some members at a stage; then nobody leaves, or they again.

    Stands for the generator that draws who vanishes.
    """

    def __init__(self, n_leaving: int, stage: Stage, *, again: bool) -> None:
        self.n_leaving, self.stage, self.again = n_leaving, stage, again
        self.n_cells = 0

    def random(self, n_members: int) -> np.ndarray:
        self.n_cells += 1
        n_leaving = self.n_leaving if self.n_cells == 1 or self.again else 0
        return (np.arange(n_members) >= n_leaving).astype(float)

    def integers(self, _n_stages: int, *, size: int) -> np.ndarray:
        return np.full(size, int(self.stage))


@pytest.mark.parametrize(
    ("stage", "n_leaving", "again", "n_counted", "n_bodies"),
    [
        # Of twelve eight must be there; five are enough for a cell of their own.
        pytest.param(Stage.BEFORE_UPLOAD, 5, False, 7, 7 + 7, id="once-more"),
        pytest.param(Stage.BEFORE_SHARES, 5, False, 7, 7, id="nothing-was-sent"),
        pytest.param(Stage.BEFORE_UPLOAD, 8, False, 0, 4, id="too-few-are-left"),
        pytest.param(Stage.BEFORE_CONFIRM, 5, False, 0, 12, id="the-others-have-confirmed"),
        pytest.param(Stage.BEFORE_UPLOAD, 5, True, 0, 7 + 2, id="not-a-third-time"),
    ],
)
@pytest.mark.parametrize("cryptography", list(Cryptography))
def test_a_lost_cell_is_tried_again_once_with_those_that_are_left(
    go: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    stage: Stage,
    n_leaving: int,
    again: bool,
    n_counted: int,
    n_bodies: int,
    cryptography: Cryptography,
) -> None:
    real = RunChance.generator

    def generator(chance: RunChance, purpose: str, *numbers: int) -> Any:
        if purpose == "vanishing":
            return Leaving(n_leaving if numbers == (1,) else 0, stage, again=again)
        return real(chance, purpose, *numbers)

    monkeypatch.setattr(RunChance, "generator", generator)
    found = go(
        **MASKED
        | {
            "federation__n_rounds": 1,
            "federation__cohort": 12,
            "federation__cell_target": 12,
            "population__vanish": 0.5,
            "engine__cryptography": cryptography.value,
        },
    )
    first = found.rounds[0]
    assert list(first.fates.values()).count(Fate.COUNTED) == n_counted
    assert first.n_cells == (n_counted > 0)
    assert (first.failure is None) == (n_counted > 0)
    body = (go(**MASKED).rounds[0].bytes_up) // 11
    assert first.bytes_up // body == n_bodies


# What becomes of agents


def test_a_round_with_fewer_updates_than_the_server_asks_for_makes_no_release(
    go: Callable[..., Any], fake: Any
) -> None:
    fake.failing = {0, 1, 2}
    found = go(
        federation__cohort=4, federation__min_cohort=2, federation__n_rounds=4, data__n_clients=6
    )
    for note in found.rounds:
        n_came = len(set(note.fates) - fake.failing)
        if n_came < 2:
            assert note.failure == f"too few updates: {n_came} of at least 2"
            assert set(note.fates.values()) <= {Fate.VOID, Fate.FAILED}
        else:
            assert note.failure is None
    assert {note.failure is None for note in found.rounds} == {True, False}


def test_a_training_that_gives_nothing_is_noted_and_the_others_count(
    go: Callable[..., Any], fake: Any
) -> None:
    fake.failing = {2, 4}
    found = go(federation__cohort=5, federation__n_rounds=3)
    seen = set()
    for note in found.rounds:
        failed = {agent for agent, fate in note.fates.items() if fate is Fate.FAILED}
        assert failed == fake.failing & set(note.fates)
        assert set(note.fates.values()) == {Fate.FAILED, Fate.COUNTED}
        assert note.n_cells == len(note.fates) - len(failed)
        seen |= failed
    assert seen == fake.failing
    for visit in found.of(VisitNote):
        assert visit.error == ("training diverged" if visit.agent in seen else None)
        assert (visit.update_norm > 0.0) is (visit.agent not in seen)


def test_whoever_drops_out_trains_nothing_and_is_noted(go: Callable[..., Any], fake: Any) -> None:
    found = go(
        population__drop_out=0.4,
        federation__min_cohort=1,
        federation__n_rounds=6,
        federation__over_selection=2.0,
    )
    fates = [fate for note in found.rounds for fate in note.fates.values()]
    assert {Fate.DROPPED, Fate.COUNTED} <= set(fates)
    for note in found.rounds:
        trained = {visit.agent for visit in found.of(VisitNote) if visit.round == note.number}
        assert trained == {a for a, fate in note.fates.items() if fate is Fate.COUNTED}
        assert note.duration_s is None


POPULATION = """
n_agents = 1

[[device]]
name = "fast"
share = 1
tokens_per_s = 100
up_bytes_per_s = 1e6
down_bytes_per_s = 1e6
spread = 1.0

[[device]]
name = "slow"
share = 1
tokens_per_s = 1
up_bytes_per_s = 1e5
down_bytes_per_s = 1e6
spread = 0.5
hours = [1,1,1,1,1,1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,1,1,1,1]
"""


def test_a_population_gives_rounds_their_time_and_closes_before_the_slow(
    go: Callable[..., Any], tmp_path: Path, fake: Any
) -> None:
    (tmp_path / "population.toml").write_text(POPULATION)
    found = go(
        population__file=str(tmp_path / "population.toml"),
        data__n_clients=12,
        data__per_category=20,
        federation__cohort=3,
        federation__over_selection=2.0,
        federation__n_rounds=4,
        federation__deadline_s=3600.0,
    )
    for note in found.rounds:
        assert note.waited_s is not None
        assert note.duration_s is not None
        assert 0.0 < note.duration_s <= 3600.0 + 300.0
        counted = [agent for agent, fate in note.fates.items() if fate is Fate.COUNTED]
        assert len(counted) == 3
        assert list(note.fates.values()).count(Fate.LATE) == len(note.fates) - 3
    assert any(Fate.LATE in note.fates.values() for note in found.rounds)
    again = go(
        population__file=str(tmp_path / "population.toml"),
        data__n_clients=12,
        data__per_category=20,
        federation__cohort=3,
        federation__over_selection=2.0,
        federation__n_rounds=4,
        federation__deadline_s=3600.0,
    )
    assert again.notes == found.notes


def test_bytes_are_also_those_of_whoever_came_too_late(
    go: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "population.toml").write_text(POPULATION)
    values = {
        "data__n_clients": 12,
        "data__per_category": 20,
        "federation__cohort": 3,
        "federation__over_selection": 2.0,
    }
    n_bytes = read_card(go(**values).root).n_values * 4
    for note in go(**values).rounds:  # nobody's time is known: all six sent everything
        assert (note.bytes_up, note.bytes_down) == (6 * n_bytes, 6 * n_bytes)
    for note in go(**values, population__file=str(tmp_path / "population.toml")).rounds:
        assert 3 * n_bytes <= note.bytes_up <= 6 * n_bytes
    masked = MASKED | {"federation__cohort": 5, "federation__over_selection": 2.0}
    found = go(**masked)
    [n_up] = {note.bytes_up for note in found.rounds}
    assert n_up < 5 * read_card(found.root).n_values * 4  # before its cell nobody sends anything


def test_a_deadline_that_too_few_keep_fails_the_round(
    go: Callable[..., Any], tmp_path: Path
) -> None:
    slow = POPULATION.replace("tokens_per_s = 100", "tokens_per_s = 0.01")
    (tmp_path / "population.toml").write_text(slow)
    with pytest.raises(ExperimentError, match="rounds gave 0 releases: too few uploads"):
        go(population__file=str(tmp_path / "population.toml"), federation__deadline_s=60.0)


def test_a_cohort_larger_than_the_run_is_refused(go: Callable[..., Any]) -> None:
    with pytest.raises(ExperimentError, match="a round needs 9 agents, and there are 6 clients"):
        go(federation__cohort=9, federation__min_cohort=9)


# Differential privacy


def epsilons(found: Any) -> list[float]:
    return [note.epsilon for note in found.rounds]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        pytest.param({"federation__profile": "P1", "federation__epsilon": 8}, ExamplePrivacy),
        pytest.param({"federation__profile": "P3", "federation__epsilon": 60}, CentralPrivacy),
        pytest.param(
            {
                "federation__profile": "P2",
                "federation__epsilon": 50,
                "federation__masking": "cells",
                "federation__word_bits": 32,
                "federation__cohort": 6,
                "federation__rank": 1,
            },
            AgentPrivacy,
        ),
    ],
    ids=["P1", "P3", "P2"],
)
def test_what_is_spent_is_noted_grows_and_keeps_to_the_budget(
    go: Callable[..., Any],
    small: Experiment,
    base: LoadedBase,
    values: dict[str, object],
    kind: type[Any],
) -> None:
    # All are always selected, so somebody takes part in every round.
    values = {"federation__cohort": 6, "federation__n_rounds": 3, **values}
    found = go(**values)
    spent = epsilons(found)
    assert spent == sorted(spent)
    assert 0.0 < spent[0] < spent[-1] <= values["federation__epsilon"]
    assert spent[-1] > 0.9 * values["federation__epsilon"]
    card = read_card(found.root)
    assert (card.profile, card.cohort) == (values["federation__profile"], 6)
    assert f"profile {card.profile}" in card.guarantee
    dotted = {key.replace("__", "."): value for key, value in values.items()}
    terms = make_terms(small.with_values(dotted), base.description, arm=Arm.FEDERATED, seed=1)
    assert isinstance(terms.manifest.privacy, kind)


FAILING: dict[str, object] = {
    "federation__cohort": 6,
    "federation__min_cohort": 5,
    "federation__n_rounds": 3,
    "population__drop_out": 0.3,
}
"""Now and then a round has too few agents, and makes no release."""
P3: dict[str, object] = {"federation__profile": "P3", "federation__epsilon": 60}


def test_under_p3_a_round_without_a_release_spends_nothing(go: Callable[..., Any]) -> None:
    found = go(**FAILING | P3)
    assert {note.failure is None for note in found.rounds} == {True, False}
    before, times = 0.0, dict.fromkeys(range(6), 0)
    for note in found.rounds:
        for agent, fate in note.fates.items():
            times[agent] += fate is Fate.COUNTED
        if note.failure is not None:
            assert note.epsilon == before
        before = note.epsilon
    assert before <= 60
    whole = epsilons(go(**FAILING | {"population__drop_out": 0.0} | P3))
    assert before == whole[max(times.values()) - 1]


def test_under_p1_no_agent_trains_more_often_than_its_ledger_lets_it(
    go: Callable[..., Any], fake: Any, outcome: Callable[[Path], Any], tmp_path: Path
) -> None:
    """And the run says why it comes to no end, as a federation would come to none."""
    with pytest.raises(ExperimentError, match=r"9 rounds gave . releases: too few"):
        go(root=tmp_path / "run", **FAILING, federation__profile="P1", federation__epsilon=8)
    found = outcome(tmp_path / "run")
    begun = dict.fromkeys(range(6), 0)
    for note in found.rounds:
        for agent, fate in note.fates.items():
            assert (begun[agent] == 3) == (fate is Fate.SPENT)
            begun[agent] += fate is not Fate.SPENT
    assert any(Fate.SPENT in note.fates.values() for note in found.rounds)
    assert max(epsilons(found)) <= 8
    assert max(Counter(agent for _, agent in fake.trained).values()) <= 3


def test_noise_of_the_server_is_the_run_s_own_and_no_other_s(go: Callable[..., Any]) -> None:
    values: dict[str, object] = {"federation__profile": "P3", "federation__epsilon": 60}
    first, again, other = go(**values), go(**values), go(**values, seed=2)
    assert first.digests == again.digests
    assert not set(first.digests) & set(other.digests)
    assert not set(first.digests) & set(go().digests)


def test_a_private_run_trains_by_dp_sgd(
    tmp_path: Path, small: Experiment, here: Engine, outcome: Callable[[Path], Any]
) -> None:
    private = small.with_values(
        {
            "federation.epsilon": 8,
            "federation.n_rounds": 1,
            "federation.cohort": 2,
            "federation.local_steps": 2,
            "evaluation.answers": 0,
        }
    )
    run(tmp_path / "run", Request(experiment=private), here)
    found = outcome(tmp_path / "run")
    [note] = found.rounds
    assert set(note.fates.values()) == {Fate.COUNTED}
    assert 0.9 * 8 < note.epsilon <= 8
    for visit in found.of(VisitNote):
        assert visit.weight == 1  # how many examples an agent has is nobody's business
        assert visit.update_norm > 0.0


# Rules


@pytest.mark.parametrize("rule", list(LoraRule))
def test_every_lora_rule_is_run(go: Callable[..., Any], rule: LoraRule) -> None:
    found = go(federation__lora_rule=rule.value, federation__n_rounds=3)
    assert len(set(found.digests)) == 3
    vectors = [read_vector(found.root / "releases" / f"000{n}.npy") for n in (2, 3)]
    all_moved = np.count_nonzero(vectors[1] - vectors[0]) == vectors[0].size
    assert all_moved == (rule in {LoraRule.FEDIT, LoraRule.FLEXLORA})


# Attacks


def test_the_attackers_are_those_that_were_drawn_and_the_release_is_another(
    go: Callable[..., Any], small: Experiment
) -> None:
    values: dict[str, object] = {
        "attack__name": "sign-flip-scaled",
        "attack__share": 0.4,
        "federation__cohort": 6,
        "federation__n_rounds": 1,
        "federation__filter": "none",
    }
    attacked = go(**values)
    calm = go(**values | {"attack__name": None})
    # Honest trainings are the same, and what is noted of attackers' is what they trained.
    assert attacked.of(VisitNote)[0].update_norm == calm.of(VisitNote)[0].update_norm
    section = small.with_values({"attack.name": "sign-flip-scaled", "attack.share": 0.4}).attack
    assert section is not None
    attackers = Attackers(section, n_clients=6, chance=RunChance(1)).clients
    assert len(attackers) == 2
    vectors = [read_vector(one.root / "releases" / "0001.npy") for one in (attacked, calm)]
    first = read_vector(calm.root / "releases" / "0000.npy")
    assert np.linalg.norm(vectors[0] - first) > 2 * np.linalg.norm(vectors[1] - first)


def test_a_round_notes_how_many_updates_were_made_up(
    go: Callable[..., Any], small: Experiment
) -> None:
    values: dict[str, object] = {"federation__n_rounds": 8, "attack__share": 0.34}
    found = go(**values, attack__name="sign-flip")
    section = small.with_values({"attack.name": "sign-flip", "attack.share": 0.34}).attack
    assert section is not None
    attackers = Attackers(section, n_clients=6, chance=RunChance(1)).clients
    for note in found.rounds:
        there = attackers & set(note.fates)
        assert note.n_crafted == (len(there) if len(there) < len(note.fates) else 0)
    assert {note.n_crafted for note in go(**values, attack__name="alie").rounds} == {0}
    assert {note.n_crafted for note in go().rounds} == {None}


def test_a_filter_removes_attackers_and_says_so(go: Callable[..., Any], small: Experiment) -> None:
    found = go(
        attack__name="sign-flip-scaled",
        attack__share=0.2,
        data__n_clients=10,
        data__per_category=20,
        federation__cohort=10,
        federation__n_rounds=2,
        federation__filter="robust",
    )
    section = small.with_values({"attack.name": "sign-flip-scaled", "attack.share": 0.2}).attack
    assert section is not None
    attackers = Attackers(section, n_clients=10, chance=RunChance(1)).clients
    assert len(attackers) == 2
    for note in found.rounds:
        removed = {agent for agent, fate in note.fates.items() if fate is Fate.REMOVED}
        assert removed == attackers
        assert note.n_cells_removed == 2
    assert all(note.n_cells == 10 for note in found.rounds)


def test_held_out_records_that_cannot_be_used_are_one_sentence(
    go: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "measure", lambda *_: [])
    with pytest.raises(EvaluationError, match="none of the 16 held-out records can be used; chats"):
        go()


# Baselines


def test_the_base_alone_is_scored_and_never_trained(go: Callable[..., Any], fake: Any) -> None:
    found = go(arm=Arm.BASE)
    assert not found.rounds
    assert not fake.trained
    assert {note.release for note in found.of(ScoreNote)} == {0}
    assert read_card(found.root).n_rounds == 0
    tensors = load_file(found.root / "adapter" / "adapter_model.safetensors")
    assert not any(array.any() for name, array in tensors.items() if "lora_B" in name)


@pytest.mark.parametrize(("arm", "client"), [(Arm.LOCAL, 4), (Arm.CENTRALISED, None)])
def test_a_baseline_that_cannot_be_trained_is_an_error_and_no_run_that_is_over(
    go: Callable[..., Any], fake: Any, tmp_path: Path, arm: Arm, client: int | None
) -> None:
    fake.failing = {client or 0}
    with pytest.raises(ExperimentError, match=f"the {arm.value} model cannot be trained: trai"):
        go(root=tmp_path / "run", arm=arm, client=client)
    assert not (tmp_path / "run" / "adapter").exists()
    fake.failing = set()
    assert len(go(root=tmp_path / "run", arm=arm, client=client).rounds) == 1


def test_a_client_alone_trains_on_its_own_records(
    go: Callable[..., Any], small: Experiment, fake: Any
) -> None:
    found = go(arm=Arm.LOCAL, client=4)
    assert fake.trained == [(1, 4)]
    [visit] = found.of(VisitNote)
    assert visit.n_examples == prepare_data(small.data, seed=1).sizes[4]
    assert read_card(found.root).client == 4
    assert {note.release for note in found.of(ScoreNote)} == {1}


def test_a_baseline_goes_once_through_all_records_with_the_schedule_from_start_to_end(
    tmp_path: Path,
    small: Experiment,
    here: Engine,
    outcome: Callable[[Path], Any],
    make_told: Callable[..., Any],
    kill_error: type[Exception],
) -> None:
    request = Request(experiment=small.with_values({"evaluation.answers": 0}), arm=Arm.CENTRALISED)
    run(tmp_path / "all", request, here)
    found = outcome(tmp_path / "all")
    [note], [visit] = found.rounds, found.of(VisitNote)
    n_records = sum(prepare_data(small.data, seed=1).sizes)
    assert (visit.n_examples, visit.n_steps) == (n_records, -(-n_records // 4))
    assert note.fates == {0: Fate.COUNTED}
    assert note.learning_rate == 5e-3
    assert {one.release for one in found.of(ScoreNote)} == {1}
    assert not (tmp_path / "all" / "state" / "round-0001").exists()
    with pytest.raises(kill_error):  # its one training is over, and is not begun anew
        run(tmp_path / "cut", request, here, make_told(kill_at=("visited", 1)))
    run(tmp_path / "cut", request, here)
    assert outcome(tmp_path / "cut").notes == found.notes


def test_a_baseline_has_no_masks_noise_attack_or_drop_out(go: Callable[..., Any]) -> None:
    found = go(
        arm=Arm.LOCAL,
        client=1,
        **MASKED
        | {
            "federation__epsilon": 8,
            "attack__name": "sign-flip",
            "population__vanish": 0.9,
            "population__drop_out": 0.9,
        },
    )
    card = read_card(found.root)
    assert (card.profile, card.cryptography, card.cohort, card.n_rounds) == ("P0", None, 1, 1)
    [note] = found.rounds
    assert note.fates == {1: Fate.COUNTED}
    assert note.epsilon is None


# How agents are trained at once


def test_the_probe_s_choice_is_kept_in_the_card(
    go: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    make_told: Callable[..., Any],
    kill_error: type[Exception],
) -> None:
    asked = []

    def choose(
        engine: Engine,
        setup: object,
        release: object,
        clients: Any,
        *,
        cohort: int,
        n_steps: int,
    ) -> int:
        asked.append((cohort, n_steps, [len(records) for records in clients]))
        return 2

    monkeypatch.setattr("simulations.lab.run.choose_group", choose)
    whole = go(engine__group="auto")
    assert read_card(whole.root).group_size == 2
    assert whole.digests == go(engine__group=2).digests
    [(cohort, n_steps, sizes)] = asked
    assert (cohort, n_steps) == (3, 2 * 3 * 3)  # rounds, agents, steps
    assert sizes == sorted(sizes, reverse=True)
    root = whole.root.with_name("cut")
    with pytest.raises(kill_error):
        go(root=root, engine__group="auto", listener=make_told(kill_at=("closed", 1)))
    go(root=root, engine__group="auto")
    assert len(asked) == 2  # once for each run, whatever its sittings
    go(arm=Arm.LOCAL, client=0, engine__group="auto")
    assert len(asked) == 2


def test_groups_are_of_like_volume_the_largest_first(
    go: Callable[..., Any], small: Experiment, fake: Any
) -> None:
    go(engine__group=2, federation__cohort=5, federation__n_rounds=1)
    sizes = prepare_data(small.data, seed=1).sizes
    volumes = [sizes[agent] for _, agent in fake.trained]
    assert volumes == sorted(volumes, reverse=True)
