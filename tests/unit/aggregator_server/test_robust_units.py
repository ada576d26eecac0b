"""Units in memory and in slices, sanity of tensors, caps: the right numbers or a sentence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator_server.aggregation.robust.caps import cap_factors, median_norm, norms
from aggregator_server.aggregation.robust.sanity import (
    oversized_tensors,
    oversized_units,
    tensor_norms,
)
from aggregator_server.aggregation.robust.units import ArrayUnits, loaded, slices
from aggregator_server.errors import AggregationError
from protocol.layout import VectorLayout

LAYOUT = VectorLayout.of_shapes({"a": (3, 5), "b": (7,), "c": (200, 400)})


def make_units(n=5, *, n_values=LAYOUT.n_values, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((n, n_values)).astype(np.float32)
    return ArrayUnits(means, rng.integers(1, 100, n))


def test_whole_units_and_slices_hold_the_same_numbers():
    units = make_units()
    whole = np.stack([units.load(index) for index in range(5)])
    pieces = [units.rows(start, stop) for start, stop in slices(units, slice_bytes=1000)]
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    assert units.n_members.tolist() == [1] * 5


@given(n=st.integers(1, 40), n_values=st.integers(1, 200), slice_bytes=st.integers(1, 4000))
def test_slices_cover_the_values_once_and_keep_to_the_size(n, n_values, slice_bytes):
    units = ArrayUnits(np.zeros((n, n_values), np.float32), np.ones(n, np.int64))
    cuts = list(slices(units, slice_bytes=slice_bytes))
    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
    assert cuts[-1][1] == n_values
    assert all(stop - start == 1 or 4 * n * (stop - start) <= slice_bytes for start, stop in cuts)


@pytest.mark.parametrize(
    ("means", "weights", "n_members"),
    [
        (np.zeros((2, 3)), np.ones(2, np.int64), None),
        (np.zeros(3, np.float32), np.ones(3, np.int64), None),
        (np.zeros((0, 3), np.float32), np.ones(0, np.int64), None),
        (np.zeros((2, 3), np.float32), np.array([1, 0]), None),
        (np.zeros((2, 3), np.float32), np.ones(3, np.int64), None),
        (np.zeros((2, 3), np.float32), np.ones(2), None),
        (np.zeros((2, 3), np.float32), np.ones(2, np.int64), np.zeros(2, np.int64)),
    ],
)
def test_units_that_cannot_be_are_refused(means, weights, n_members):
    with pytest.raises(AggregationError, match="expected"):
        ArrayUnits(means, weights, n_members)


def test_a_unit_of_another_length_than_declared_is_refused():
    class Liar(ArrayUnits):
        def load(self, index):
            return super().load(index)[1:]

    with pytest.raises(AggregationError, match="unit 1 has shape"):
        loaded(Liar(np.zeros((2, 3), np.float32), np.ones(2, np.int64)), 1)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_tensor_norms_are_accurate_also_beyond_the_squares_of_float32(scale):
    vector = make_units(1).load(0) * np.float32(scale)
    wide = vector.astype(np.float64)
    expected = [np.linalg.norm(wide[place]) for _, place in LAYOUT.slices()]
    np.testing.assert_allclose(tensor_norms(vector, LAYOUT), expected, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_norm_of_a_tensor_that_is_not_finite_is_not_finite(value):
    vector = make_units(1).load(0).copy()
    vector[16] = value
    assert np.isfinite(tensor_norms(vector, LAYOUT)).tolist() == [True, False, True]


def test_a_tensor_is_oversized_beyond_the_factor_of_its_median_and_not_below():
    tensors = np.tile([1.0, 2.0, 3.0], (9, 1))
    tensors[3, 1] = 2.0 * 19.9
    tensors[5, 2] = 3.0 * 20.1
    found = oversized_tensors(tensors, LAYOUT)
    assert list(found) == [5]
    ratio, reason = found[5]
    assert ratio == pytest.approx(20.1)
    assert reason.startswith("c is 20.1 times")


def test_a_tensor_that_most_units_left_untouched_is_not_judged():
    tensors = np.zeros((9, 3))
    tensors[2] = 1e9
    assert oversized_tensors(tensors, LAYOUT) == {}


def test_hostile_sizes_cannot_make_an_honest_tensor_look_oversized():
    rng = np.random.default_rng(0)
    tensors = rng.uniform(1.0, 2.0, (9, 3))
    tensors[:4] = 1e-12
    assert oversized_tensors(tensors, LAYOUT) == {}


def test_sanity_refuses_norms_that_are_not_finite_and_a_factor_of_one():
    with pytest.raises(AggregationError, match="finite"):
        oversized_tensors(np.full((3, 3), np.nan), LAYOUT)
    with pytest.raises(AggregationError, match="more than 1"):
        oversized_tensors(np.ones((3, 3)), LAYOUT, factor=1.0)
    with pytest.raises(AggregationError, match="finite"):
        oversized_units(np.array([1.0, np.inf]))
    with pytest.raises(AggregationError, match="at least one"):
        oversized_units(np.array([]))


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        ([1.0] * 8 + [1.99], []),
        ([1.0] * 8 + [2.01], [8]),
        ([1.0] * 5 + [2.5] * 4, [5, 6, 7, 8]),
        ([0.5, 0.7, 1.0, 1.4, 2.0, 2.8], []),
        ([0.0] * 5 + [1e30] * 4, []),
    ],
)
def test_a_unit_is_oversized_by_how_much_the_lengths_of_the_others_differ(lengths, named):
    assert list(oversized_units(np.array(lengths))) == named


def test_the_limit_is_e_to_eight_median_deviations_of_the_log_length():
    lengths = np.array([0.8, 0.9, 1.0, 1.0, 1.2, 1.25, 1.3])
    limit = np.exp(8 * np.log(1.2))
    assert list(oversized_units(np.append(lengths, limit * 0.99))) == []
    assert list(oversized_units(np.append(lengths, limit * 1.01))) == [7]


def test_hostile_lengths_cannot_make_an_honest_unit_look_oversized():
    lengths = np.random.default_rng(0).uniform(1.0, 1.9, 9)
    for hostile in (0.0, 1e-12, 1e30):
        lengths[:4] = hostile
        assert not set(oversized_units(lengths)) & set(range(4, 9))


def test_norms_are_those_of_each_unit():
    units = make_units()
    np.testing.assert_allclose(
        norms(units), np.linalg.norm(units.rows(0, units.n_values), axis=1), rtol=1e-5
    )


SIZES = st.floats(0, 1e30, allow_subnormal=False)  # a subnormal has fewer digits


@given(st.lists(SIZES, min_size=1, max_size=30), SIZES)
def test_no_capped_norm_exceeds_the_bound_and_none_within_it_changes(lengths, bound):
    lengths = np.array(lengths)
    factors = cap_factors(lengths, bound)
    assert (factors * lengths <= bound * (1 + 1e-12)).all()
    assert (factors[lengths <= bound] == 1.0).all()
    assert ((factors >= 0) & (factors <= 1)).all()


@given(
    honest=st.lists(st.floats(0, 1e6), min_size=1, max_size=20),
    hostile=st.lists(st.floats(0, 1e30), max_size=20),
)
def test_the_median_norm_is_at_most_the_largest_honest_one(honest, hostile):
    hostile = hostile[: len(honest)]
    assert median_norm(np.array(hostile + honest)) <= max(honest)


@pytest.mark.parametrize("lengths", [[], [1.0, np.nan]])
def test_no_median_of_nothing_or_of_nan(lengths):
    with pytest.raises(AggregationError, match="finite"):
        median_norm(np.array(lengths))


@pytest.mark.parametrize(("length", "bound"), [(1.0, -1.0), (1.0, np.nan), (np.inf, 1.0)])
def test_a_cap_that_cannot_be_is_refused(length, bound):
    with pytest.raises(AggregationError, match="expected 0 or more"):
        cap_factors(np.array([length]), bound)


def test_a_factor_with_too_few_digits_is_zero():
    factors = cap_factors(np.array([3.93629233e29, 1.0]), 7.427335311654106e-290)
    assert factors[0] == 0.0
    assert factors[1] == 7.427335311654106e-290
