"""What the default filter decides on recorded updates: real adapters of agents with unlike data."""

import json
from pathlib import Path

import numpy as np
import pytest

from aggregator_server.aggregation.robust import evidence
from aggregator_server.aggregation.robust.outcome import Rule
from aggregator_server.aggregation.robust.pipeline import Mode, run_pipeline
from aggregator_server.aggregation.robust.rules import aggregate
from aggregator_server.aggregation.robust.units import ArrayUnits
from protocol.layout import VectorLayout

VECTORS = Path(__file__).parents[2] / "vectors" / "robust_updates.json"
CASES = {case["name"]: case for case in json.loads(VECTORS.read_text("utf-8"))["cases"]}
SEED = bytes(range(32))


def units_of(case):
    means = np.array(case["units"], np.float32)
    return ArrayUnits(means, np.ones(len(means), np.int64))


def layout_of(units):
    return VectorLayout.of_shapes({"all": (units.n_values,)})


def decide(name, *, seed=SEED):
    case = CASES[name]
    units = units_of(case)
    mode = Mode(case["mode"])
    return case, run_pipeline(units, mode=mode, layout=layout_of(units), seed=seed).outcome


@pytest.mark.parametrize(
    "name",
    ["open: no attacker", "dirichlet: no attacker", "cells-5: no attacker"],
)
def test_unlike_honest_units_are_all_kept_and_cut_to_the_median_norm(name):
    case, outcome = decide(name)
    assert case["n_hostile"] == 0
    assert outcome.kept.all()
    lengths = np.linalg.norm(np.array(case["units"]), axis=1)
    median = np.sort(lengths)[(len(lengths) - 1) // 2]
    np.testing.assert_allclose(outcome.factors, np.minimum(1.0, median / lengths), rtol=1e-5)
    assert outcome.factors.min() > 0.75
    assert (outcome.scores[case["rare"]] > 0.5).all()


def test_kinds_that_pull_apart_in_a_late_round_are_kept_as_nothing_is_common(monkeypatch):
    _, outcome = decide("open: late")
    assert outcome.kept.all()
    assert not outcome.scores.any()
    monkeypatch.setattr(evidence, "MIN_COMMON", 0.0)
    _, outcome = decide("open: late")
    assert set(outcome.reasons) == {2, 7, 12, 17}  # all of one pair of categories


def test_dnc_on_the_same_honest_updates_removes_five_of_twenty():
    """Why the default filter is not DnC."""
    units = units_of(CASES["open: no attacker"])
    found = aggregate(units, Rule.CAPPED_DNC, mode=Mode.OPEN, layout=layout_of(units), seed=SEED)
    assert found.outcome.n_removed == 5


@pytest.mark.parametrize(
    ("name", "n_hostile", "n_left", "reason"),
    [
        ("open: sign flip", 2, 0, "pulls against what the others have in common"),
        ("open: inner product, ε = 0.5", 4, 0, "pulls against what the others have in common"),
        ("open: clones, jittered", 4, 0, "pulls against what the others have in common"),
        ("open: scaling × 10", 4, 0, "times as long as the median; the limit is 2"),
        ("open: ALIE, z = 1.5", 4, 1, "nearly the same as another one"),
        ("open: free rider, noise", 4, 1, "nearly the same as another one"),
        ("cells-5: sign flip × 10", 2, 0, "times as long as the median; the limit is 2"),
    ],
)
def test_hostile_units_go_for_what_they_are_and_honest_ones_stay(name, n_hostile, n_left, reason):
    case, outcome = decide(name)
    assert case["n_hostile"] == n_hostile
    assert outcome.kept[:n_hostile].sum() == n_left
    assert outcome.kept[n_hostile:].all()
    assert all(reason in why for why in outcome.reasons.values()), outcome.reasons


@pytest.mark.parametrize("name", list(CASES))
def test_the_decision_does_not_hang_on_the_seed(name):
    _, first = decide(name)
    _, other = decide(name, seed=bytes(32))
    np.testing.assert_array_equal(first.kept, other.kept)
    np.testing.assert_allclose(first.factors, other.factors, rtol=1e-6)
