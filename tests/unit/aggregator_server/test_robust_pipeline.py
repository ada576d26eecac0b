"""The default pipeline: which filter runs, what it may remove, in how much memory."""

import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator_server.aggregation.fedavg import average
from aggregator_server.aggregation.robust.outcome import Rule
from aggregator_server.aggregation.robust.pipeline import Mode, run_pipeline
from aggregator_server.aggregation.robust.rules import RuleOptions, aggregate
from aggregator_server.aggregation.robust.units import SLICE_BYTES, ArrayUnits
from aggregator_server.errors import AggregationError
from privacy.updates import CellSum, PlainUpdate
from protocol.layout import VectorLayout

SEED = bytes(range(32))
LAYOUT = VectorLayout.of_shapes({"a": (20, 10), "b": (300,)})


def make_means(n, *, layout=LAYOUT, seed=0):
    return np.random.default_rng(seed).standard_normal((n, layout.n_values)).astype(np.float32)


def make_weights(n, *, seed=0):
    return np.random.default_rng(seed).integers(1, 500, n)


def run(means, weights=None, *, mode=Mode.OPEN, seed=SEED, layout=LAYOUT):
    chosen = np.ones(len(means), np.int64) if weights is None else weights
    return run_pipeline(ArrayUnits(means, chosen), mode=mode, layout=layout, seed=seed)


def fedavg(means, weights):
    cells = [
        CellSum.of_plain(PlainUpdate(vector=mean, weight=int(weight)))
        for mean, weight in zip(means, weights, strict=True)
    ]
    return average(cells, n_values=means.shape[1]).mean


# --- which filter runs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "n", "rule"),
    [
        (Mode.OPEN, 1, Rule.CAPPED_GEOMETRIC_MEDIAN),
        (Mode.OPEN, 7, Rule.CAPPED_GEOMETRIC_MEDIAN),
        (Mode.OPEN, 8, Rule.CAPPED_EVIDENCE),
        (Mode.CELLS, 1, Rule.MEAN),
        (Mode.CELLS, 3, Rule.MEAN),
        (Mode.CELLS, 4, Rule.CAPPED_GEOMETRIC_MEDIAN),
        (Mode.CELLS, 7, Rule.CAPPED_GEOMETRIC_MEDIAN),
        (Mode.CELLS, 8, Rule.CAPPED_EVIDENCE),
    ],
)
def test_the_number_of_units_chooses_the_filter(mode, n, rule):
    outcome = run(make_means(n), make_weights(n), mode=mode).outcome
    assert outcome.rule is rule
    assert outcome.n_removed <= (n // 4 if rule is Rule.CAPPED_EVIDENCE else 0)
    assert outcome.reasons.keys() == set(np.flatnonzero(~outcome.kept).tolist())


@pytest.mark.parametrize(
    ("mode", "n_finite", "rule"),
    [
        (Mode.OPEN, 7, Rule.CAPPED_GEOMETRIC_MEDIAN),
        (Mode.CELLS, 3, Rule.MEAN),
        (Mode.CELLS, 7, Rule.CAPPED_GEOMETRIC_MEDIAN),
        (Mode.CELLS, 8, Rule.CAPPED_EVIDENCE),
    ],
)
def test_only_finite_units_count_in_that_number(mode, n_finite, rule):
    means = make_means(n_finite + 2)
    means[0, 7], means[-1, -1] = np.nan, np.inf
    result = run(means, mode=mode)
    assert result.outcome.rule is rule
    assert not result.outcome.kept[[0, -1]].any()
    assert all("not finite" in result.outcome.reasons[i] for i in (0, len(means) - 1))
    assert np.isfinite(result.mean).all()


def test_under_four_cells_the_mean_is_that_of_fedavg():
    means, weights = make_means(3), make_weights(3)
    result = run(means, weights, mode=Mode.CELLS)
    np.testing.assert_allclose(result.mean, fedavg(means, weights), rtol=1e-5, atol=1e-6)


def test_two_agents_of_one_length_are_averaged_whatever_weight_they_claim():
    means = make_means(2)
    means /= np.linalg.norm(means, axis=1)[:, None]
    result = run(means, np.array([1, 10**6]))
    np.testing.assert_allclose(result.mean, means.mean(axis=0), atol=1e-6)


def test_an_agent_cannot_become_the_median_by_claiming_a_weight():
    means = make_means(5)
    means /= np.linalg.norm(means, axis=1)[:, None]
    fair = run(means).mean
    claimed = run(means, np.array([10**6, 1, 1, 1, 1])).mean
    np.testing.assert_allclose(claimed, fair, atol=1e-8)


def test_the_geometric_median_is_that_of_the_capped_updates():
    means = make_means(5) * np.float32(0.05)
    means[0] += 3.0  # long, and all of it one way
    lengths = np.linalg.norm(means, axis=1)
    capped = means * np.minimum(1.0, np.sort(lengths)[2] / lengths)[:, None].astype(np.float64)
    centre = capped.mean(axis=0)
    for _ in range(2000):
        gaps = np.linalg.norm(capped - centre, axis=1)
        centre = np.average(capped, axis=0, weights=1 / gaps)
    result = run(means, np.array([5, 5, 5, 5, 900]))
    np.testing.assert_allclose(result.mean, centre, atol=1e-5)


# --- what it may remove ---------------------------------------------------------------------------


def make_agreeing(n, *, n_against=0, common=0.5):
    """Unlike units with something in common, the first `n_against` of them turned round."""
    means = make_means(n) + np.float32(common) * make_means(1, seed=1000)
    means[:n_against] *= np.float32(-1.5)
    return means


def test_the_weights_of_what_is_removed_go_with_it():
    means, weights = make_agreeing(12, n_against=3), make_weights(12)
    result = run(means, weights)
    kept = result.outcome.kept
    assert kept.tolist() == [False] * 3 + [True] * 9
    lengths = np.linalg.norm(means, axis=1)
    capped = means * np.minimum(1.0, np.sort(lengths)[5] / lengths)[:, None]
    expected = np.average(capped[kept], axis=0, weights=weights[kept])
    np.testing.assert_allclose(result.mean, expected, rtol=1e-4, atol=1e-6)


def test_what_pulls_against_the_others_and_what_is_a_copy_go_and_the_reasons_say_which():
    means = make_agreeing(12, n_against=1)
    means[5] = means[6] + 0.01
    outcome = run(means).outcome
    assert outcome.n_removed == 2
    assert "pulls against what the others have in common" in outcome.reasons[0]
    assert outcome.scores[0] < -0.25
    copy = 5 if 5 in outcome.reasons else 6
    assert outcome.reasons[copy] == "it is nearly the same as another one, as no two trainings are"


def test_nothing_is_removed_for_its_distance():
    """A group of a third with data of its own, and one far from all others."""
    means = make_agreeing(12, common=1.0)
    means[:4] += 2.0 * make_means(1, seed=5)
    means[11] += 2.0 * make_means(1, seed=6)[0]
    units = ArrayUnits(means, np.ones(12, np.int64))
    spectral = aggregate(units, Rule.CAPPED_DNC, mode=Mode.OPEN, layout=LAYOUT, seed=SEED)
    assert spectral.outcome.n_removed == 3
    assert run(means).outcome.kept.all()


def test_opposition_and_copies_share_the_allowance_with_oversized_tensors():
    means = make_agreeing(12, n_against=3)
    means[7, :200] *= 1e4
    means[8] = means[9]
    outcome = run(means).outcome
    assert outcome.n_removed == 3
    assert outcome.reasons[7].startswith("a is ")
    assert sum(index < 3 for index in outcome.reasons) == 2


def test_no_kept_unit_counts_with_more_than_the_median_norm():
    means = make_means(9) * np.linspace(0.5, 3.0, 9, dtype=np.float32)[:, None]
    outcome = run(means).outcome
    counted = outcome.factors * np.linalg.norm(means, axis=1)
    assert counted.max() <= np.sort(np.linalg.norm(means, axis=1))[4] * (1 + 1e-5)
    assert not outcome.factors[~outcome.kept].any()


def test_a_tensor_far_out_of_scale_is_removed_in_the_open_mode_and_named():
    means = make_means(9)
    means[4, :200] *= 100.0
    outcome = run(means).outcome
    assert not outcome.kept[4]
    assert outcome.reasons[4].startswith("a is ")
    assert "the limit is 20" in outcome.reasons[4]
    assert "times as long as the median" in run(means, mode=Mode.CELLS).outcome.reasons[4]


def test_a_unit_twice_as_long_goes_where_all_others_are_of_one_length():
    means = make_means(9)
    means[2] *= 2.5
    for mode in Mode:
        assert run(means, mode=mode).outcome.reasons[2] == (
            "it is 2.52 times as long as the median; the limit is 2"
        )


def test_where_lengths_differ_a_longer_unit_is_cut_and_kept():
    means = make_means(9) * np.linspace(0.5, 3.0, 9, dtype=np.float32)[:, None]
    means[8] *= 2.0
    assert run(means).outcome.kept.all()


def test_the_worst_go_where_more_tensors_are_out_of_scale_than_may_be_removed():
    means = make_means(12)
    for place, scale in ((1, 50), (3, 1e4), (5, 1e3), (7, 1e5)):
        means[place] *= scale
    outcome = run(means).outcome
    assert set(outcome.reasons) == {3, 5, 7}
    assert outcome.kept[1]
    assert outcome.factors[1] < 1 / 25


@settings(deadline=None)
@given(
    n=st.integers(1, 24),
    n_bad=st.integers(0, 24),
    kind=st.sampled_from(["nan", "huge", "equal", "zero", "opposite", "limit"]),
    mode=st.sampled_from(list(Mode)),
    seed=st.integers(0, 99),
)
def test_whatever_is_sent_at_most_a_quarter_of_the_finite_units_goes(n, n_bad, kind, mode, seed):
    means = make_means(n, seed=seed)
    bad = np.arange(min(n_bad, n))
    values = {"nan": np.nan, "huge": 1e30, "equal": 1.0, "zero": 0.0, "limit": 3e38}
    means[bad] = -means[: len(bad)] if kind == "opposite" else values[kind]
    finite = np.isfinite(means).all(axis=1)
    if not finite.any():
        with pytest.raises(AggregationError, match="nothing to average"):
            run(means, mode=mode)
        return
    result = run(means, mode=mode)
    n_finite = int(finite.sum())
    n_removed = int((finite & ~result.outcome.kept).sum())
    assert n_removed <= (n_finite // 4 if n_finite >= 8 else 0)
    assert np.isfinite(result.mean).all()
    assert np.isfinite(result.outcome.scores).all()


@settings(deadline=None, max_examples=40)
@given(n=st.integers(3, 20), seed=st.integers(0, 99), data=st.data())
def test_the_order_of_the_units_changes_no_verdict(n, seed, data):
    means, weights = make_means(n, seed=seed), make_weights(n, seed=seed)
    means[0, 0] = data.draw(st.sampled_from([0.0, 500.0, np.nan]))
    order = np.array(data.draw(st.permutations(range(n))))
    mode = data.draw(st.sampled_from(list(Mode)))
    result = run(means, weights, mode=mode)
    moved = run(means[order], weights[order], mode=mode)
    np.testing.assert_array_equal(moved.outcome.kept, result.outcome.kept[order])
    np.testing.assert_allclose(moved.outcome.factors, result.outcome.factors[order], rtol=1e-6)
    np.testing.assert_allclose(moved.mean, result.mean, rtol=1e-5, atol=1e-7)
    back = {int(order[place]): reason for place, reason in moved.outcome.reasons.items()}
    assert back.keys() == result.outcome.reasons.keys()


def test_equal_inputs_give_equal_bits_and_the_seed_matters():
    layout = VectorLayout.of_shapes({"a": (9000,)})  # more than one block: the sketch is no copy
    means = make_means(30, layout=layout) + np.float32(0.3)
    first, again = (run(means, layout=layout) for _ in range(2))
    other = run(means, layout=layout, seed=bytes(32))
    assert first.mean.tobytes() == again.mean.tobytes()
    assert first.outcome.scores.tobytes() == again.outcome.scores.tobytes()
    assert first.outcome.scores.tobytes() != other.outcome.scores.tobytes()


def test_updates_that_are_all_equal_are_all_kept():
    result = run(np.tile(make_means(1), (12, 1)))
    assert result.outcome.kept.all()


@pytest.mark.parametrize(
    ("n_values", "seed", "message"),
    [(LAYOUT.n_values - 1, SEED, "of the layout's 500"), (LAYOUT.n_values, b"short", "32 bytes")],
)
def test_units_that_do_not_fit_and_a_bad_seed_are_refused(n_values, seed, message):
    means = np.ones((9, n_values), np.float32)
    with pytest.raises(AggregationError, match=message):
        run(means, seed=seed)


# --- in how much memory ---------------------------------------------------------------------------


class CountingUnits(ArrayUnits):
    """Gives copies, and remembers how many of them were alive at once and how large they were."""

    def __init__(self, means, weights):
        super().__init__(means, weights)
        self.n_loads = 0
        self.most_alive = 0
        self.most_row_bytes = 0
        self.n_slices = 0
        self._given = []

    def load(self, index):
        self.n_loads += 1
        return self._watched(super().load(index).copy())

    def rows(self, start, stop):
        rows = super().rows(start, stop).copy()
        self.n_slices += 1
        self.most_row_bytes = max(self.most_row_bytes, rows.nbytes)
        return self._watched(rows)

    def _watched(self, array):
        self._given.append(weakref.ref(array))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self._given))
        return array


@pytest.mark.parametrize("n", [8, 40])
def test_with_sketches_one_unit_is_in_memory_at_a_time_and_each_is_read_twice_at_most(n):
    units = CountingUnits(make_means(n), make_weights(n))
    result = run_pipeline(units, mode=Mode.OPEN, layout=LAYOUT, seed=SEED)
    assert units.most_alive == 1
    assert units.n_slices == 0
    assert units.n_loads == n + int(result.outcome.kept.sum())


def test_the_geometric_median_reads_slices_of_a_bounded_size():
    layout = VectorLayout.of_shapes({"a": (3 * SLICE_BYTES // (2 * 4 * 5),)})
    units = CountingUnits(make_means(5, layout=layout), make_weights(5))
    run_pipeline(units, mode=Mode.OPEN, layout=layout, seed=SEED)
    assert units.most_alive == 1
    assert units.n_slices == 2
    assert units.most_row_bytes <= SLICE_BYTES
    assert units.n_loads == 10


# --- all rules behind one call --------------------------------------------------------------------


@pytest.mark.parametrize("rule", list(Rule))
def test_every_rule_gives_a_mean_near_that_of_like_units(rule):
    means = make_means(12) * np.float32(0.01) + np.linspace(1, 2, 500, dtype=np.float32)
    means[5, 3] = np.nan
    units = ArrayUnits(means, np.ones(12, np.int64))
    result = aggregate(units, rule, mode=Mode.OPEN, layout=LAYOUT, seed=SEED)
    np.testing.assert_allclose(result.mean, np.linspace(1, 2, 500), atol=0.05)
    assert result.outcome.rule is (Rule.CAPPED_EVIDENCE if rule is Rule.PIPELINE else rule)
    assert not result.outcome.kept[5]
    assert result.outcome.reasons.keys() == set(np.flatnonzero(~result.outcome.kept).tolist())


def test_the_plain_mean_is_that_of_fedavg():
    means, weights = make_means(12), make_weights(12)
    units = ArrayUnits(means, weights)
    result = aggregate(units, Rule.MEAN, mode=Mode.OPEN, layout=LAYOUT, seed=SEED)
    np.testing.assert_allclose(result.mean, fedavg(means, weights), rtol=1e-5, atol=1e-6)


def test_krum_selects_one_unit_and_multi_krum_all_but_the_hostile_share():
    units = ArrayUnits(make_means(12), np.ones(12, np.int64))
    for rule, n_kept in ((Rule.KRUM, 1), (Rule.MULTI_KRUM, 9)):
        outcome = aggregate(units, rule, mode=Mode.OPEN, layout=LAYOUT, seed=SEED).outcome
        assert outcome.kept.sum() == n_kept
        assert outcome.scores[outcome.kept].max() <= outcome.scores[~outcome.kept].min()


def test_norm_bounding_takes_a_bound_that_is_given():
    means = make_means(6)
    lengths = np.linalg.norm(means, axis=1)
    options = RuleOptions(norm_bound=1.5)
    units = ArrayUnits(means, np.ones(6, np.int64))
    result = aggregate(
        units, Rule.NORM_BOUNDING, mode=Mode.OPEN, layout=LAYOUT, seed=SEED, options=options
    )
    np.testing.assert_allclose(result.outcome.factors, 1.5 / lengths, rtol=1e-5)


def test_centred_clipping_moves_no_further_than_its_radii():
    options = RuleOptions(clip_radius=0.25, n_clip_iterations=2)
    units = ArrayUnits(make_means(6), np.ones(6, np.int64))
    result = aggregate(
        units, Rule.CENTRED_CLIPPING, mode=Mode.OPEN, layout=LAYOUT, seed=SEED, options=options
    )
    assert np.linalg.norm(result.mean) <= 0.5


def test_krum_of_two_units_is_refused():
    units = ArrayUnits(make_means(2), np.ones(2, np.int64))
    with pytest.raises(AggregationError, match="at least 3 units"):
        aggregate(units, Rule.KRUM, mode=Mode.OPEN, layout=LAYOUT, seed=SEED)


@pytest.mark.parametrize("rule", list(Rule))
def test_every_rule_refuses_units_of_which_none_is_finite(rule):
    units = ArrayUnits(np.full((9, 500), np.nan, np.float32), np.ones(9, np.int64))
    with pytest.raises(AggregationError, match="nothing to average"):
        aggregate(units, rule, mode=Mode.OPEN, layout=LAYOUT, seed=SEED)


@pytest.mark.parametrize(
    "options",
    [
        {"hostile_frac": 0.5},
        {"hostile_frac": -0.1},
        {"norm_bound": 0.0},
        {"clip_radius": -1.0},
        {"n_clip_iterations": 0},
    ],
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(AggregationError, match="cannot be"):
        RuleOptions(**options)
