"""Each rule by itself equals a naive one that holds everything in memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator_server.aggregation.robust.centred import centred_clipping
from aggregator_server.aggregation.robust.dnc import spectral_filter
from aggregator_server.aggregation.robust.gram import (
    distances_to,
    gram_matrix,
    squared_distances,
)
from aggregator_server.aggregation.robust.krum import krum, krum_scores, most_hostile
from aggregator_server.aggregation.robust.medians import (
    coordinate_median,
    geometric_median,
    trimmed_mean,
)
from aggregator_server.aggregation.robust.outcome import robust_mean
from aggregator_server.aggregation.robust.units import ArrayUnits
from aggregator_server.errors import AggregationError

SEED = bytes(range(32))


def make_points(n, d, *, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def units_of(points, weights=None):
    return ArrayUnits(points, np.ones(len(points), np.int64) if weights is None else weights)


shapes = st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(0, 1000))


# --- inner products and means ---------------------------------------------------------------------


@given(shapes, st.integers(1, 500), st.randoms(use_true_random=False))
def test_inner_products_and_distances_are_exact_in_any_slices(shape, slice_bytes, random):
    n, d, seed = shape
    points = make_points(n, d, seed=seed)
    kept = np.array([random.random() < 0.8 for _ in range(n)])
    wide = points[kept].astype(np.float64)
    gram = gram_matrix(units_of(points), kept, slice_bytes=slice_bytes)
    np.testing.assert_allclose(gram, wide @ wide.T, atol=1e-10)
    expected = np.square(wide[:, None] - wide[None]).sum(axis=2)
    np.testing.assert_allclose(squared_distances(gram), expected, atol=1e-10)
    if kept.any():
        coefficients = np.linspace(-1, 1, len(wide))
        gaps = np.linalg.norm(wide - coefficients @ wide, axis=1)
        np.testing.assert_allclose(distances_to(gram, coefficients), gaps, atol=1e-5)


@given(shapes, st.randoms(use_true_random=False))
def test_the_robust_mean_is_the_weighted_mean_of_what_was_kept_and_scaled(shape, random):
    n, d, seed = shape
    points = make_points(n, d, seed=seed)
    weights = np.array([random.randint(1, 500) for _ in range(n)])
    kept = np.array([random.random() < 0.7 for _ in range(n)])
    kept[random.randrange(n)] = True
    factors = np.array([random.random() * 2 for _ in range(n)])
    expected = np.average(points[kept] * factors[kept, None], axis=0, weights=weights[kept])
    found = robust_mean(units_of(points, weights), kept, factors)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    again = robust_mean(units_of(points, weights), kept, factors)
    assert found.tobytes() == again.tobytes()


def test_the_mean_crosses_the_seams_of_its_chunks():
    points = make_points(3, (1 << 15) * 2 + 7)
    found = robust_mean(units_of(points), np.ones(3, np.bool_), np.ones(3))
    np.testing.assert_allclose(found, points.mean(axis=0, dtype=np.float64), atol=1e-9)


def test_a_unit_that_was_not_kept_is_not_even_read():
    points = make_points(3, 5)
    points[1] = np.nan
    kept = np.array([True, False, True])
    assert np.isfinite(robust_mean(units_of(points), kept, np.ones(3))).all()


@pytest.mark.parametrize(
    ("kept", "factors", "message"),
    [
        ([False, False], [1.0, 1.0], "none of the 2 units"),
        ([True], [1.0, 1.0], "expected for 2 units"),
        ([True, True], [1.0, np.nan], "all finite"),
        ([True, True], [1.0, 1e308], "not finite"),
    ],
)
def test_a_mean_that_cannot_be_is_refused(kept, factors, message):
    units = units_of(np.full((2, 3), 1e30, np.float32))
    with pytest.raises(AggregationError, match=message):
        robust_mean(units, np.array(kept), np.array(factors))


# --- medians --------------------------------------------------------------------------------------


@given(shapes, st.integers(1, 500))
def test_the_coordinate_median_equals_the_one_in_memory(shape, slice_bytes):
    n, d, seed = shape
    points = make_points(n, d, seed=seed)
    found = coordinate_median(units_of(points), np.ones(n, np.bool_), slice_bytes=slice_bytes)
    np.testing.assert_array_equal(found, np.median(points.astype(np.float64), axis=0))


@given(shapes, st.integers(1, 500), st.data())
def test_the_trimmed_mean_equals_the_one_in_memory(shape, slice_bytes, data):
    n, d, seed = shape
    points = make_points(n, d, seed=seed)
    n_trimmed = data.draw(st.integers(0, (n - 1) // 2))
    expected = [np.mean(sorted(values)[n_trimmed : n - n_trimmed]) for values in points.T]
    found = trimmed_mean(
        units_of(points), np.ones(n, np.bool_), n_trimmed=n_trimmed, slice_bytes=slice_bytes
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_mean_of_which_all_is_trimmed_is_refused():
    with pytest.raises(AggregationError, match="less than half"):
        trimmed_mean(units_of(make_points(4, 3)), np.ones(4, np.bool_), n_trimmed=2)


def naive_geometric_median(points, weights):
    """Subgradient-free descent in the space of the points themselves."""
    centre = np.average(points, axis=0, weights=weights)
    for _ in range(2000):
        gaps = np.maximum(np.linalg.norm(points - centre, axis=1), 1e-9)
        centre = np.average(points, axis=0, weights=weights / gaps)
    return centre


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 9), st.integers(2, 20), st.integers(0, 1000))
def test_the_geometric_median_equals_the_one_in_the_space_of_the_points(n, d, seed):
    points = make_points(n, d, seed=seed).astype(np.float64)
    weights = np.random.default_rng(seed).uniform(1.0, 1.5, n)
    shares = geometric_median(points @ points.T, weights, max_iterations=2000)
    assert shares.min() >= 0.0
    assert shares.sum() == pytest.approx(1.0)

    def cost(centre):
        return weights @ np.linalg.norm(points - centre, axis=1)

    best = cost(naive_geometric_median(points, weights))
    assert cost(shares @ points) <= best * (1 + 1e-6)


def test_the_objective_never_rises():
    points = make_points(7, 12).astype(np.float64)
    weights = np.arange(1.0, 8.0)
    gram = points @ points.T
    costs = [
        weights @ distances_to(gram, geometric_median(gram, weights, max_iterations=steps))
        for steps in range(30)
    ]
    assert (np.diff(costs) <= 1e-12).all()
    assert costs[-1] < costs[0]


def test_the_geometric_median_scales_with_the_updates():
    points = make_points(5, 12).astype(np.float64)
    small = points * 1e-9
    np.testing.assert_allclose(
        geometric_median(points @ points.T, np.ones(5)),
        geometric_median(small @ small.T, np.ones(5)),
        rtol=1e-6,
    )


def test_less_than_half_of_the_weight_moves_the_median_no_further_than_a_bound():
    honest = make_points(4, 30).astype(np.float64)
    for distance in (1e2, 1e4, 1e6):
        points = np.concatenate([honest, np.full((3, 30), distance)])
        median = geometric_median(points @ points.T, np.ones(7), max_iterations=5000) @ points
        assert np.linalg.norm(median - honest.mean(axis=0)) < 50.0


def test_the_median_of_equal_units_is_that_unit():
    points = np.tile(make_points(1, 30).astype(np.float64), (4, 1))
    shares = geometric_median(points @ points.T, np.ones(4))
    np.testing.assert_allclose(shares @ points, points[0])


@pytest.mark.parametrize(
    ("gram", "weights"),
    [
        (np.eye(3), np.ones(2)),
        (np.zeros((0, 0)), np.ones(0)),
        (np.eye(2), np.array([1.0, 0.0])),
        (np.full((2, 2), np.inf), np.ones(2)),
    ],
)
def test_a_geometric_median_that_cannot_be_is_refused(gram, weights):
    with pytest.raises(AggregationError, match="inner products"):
        geometric_median(gram, weights)


# --- Krum -----------------------------------------------------------------------------------------


@given(st.integers(3, 12), st.integers(1, 20), st.integers(0, 1000), st.data())
def test_krum_selects_by_the_distances_to_the_nearest_others(n, d, seed, data):
    n_hostile = data.draw(st.integers(0, most_hostile(n)))
    n_selected = data.draw(st.integers(1, n))
    points = make_points(n, d, seed=seed).astype(np.float64)
    expected = []
    for i in range(n):
        gaps = sorted(np.square(points[i] - points[j]).sum() for j in range(n) if j != i)
        expected.append(sum(gaps[: n - n_hostile - 2]))
    distances = squared_distances(points @ points.T)
    scores = krum_scores(distances, n_hostile=n_hostile)
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)
    selected = krum(distances, n_hostile=n_hostile, n_selected=n_selected)
    assert selected.sum() == n_selected
    assert scores[selected].max() <= min(scores[~selected], default=np.inf)


def test_krum_never_selects_a_far_outlier():
    points = make_points(9, 30).astype(np.float64)
    points[[2, 5]] += 100.0
    selected = krum(squared_distances(points @ points.T), n_hostile=2, n_selected=7)
    assert np.flatnonzero(~selected).tolist() == [2, 5]


@pytest.mark.parametrize(("n_hostile", "n_selected"), [(2, 1), (-1, 1), (1, 0), (1, 7)])
def test_krum_with_too_few_units_is_refused(n_hostile, n_selected):
    with pytest.raises(AggregationError, match=r"needs at least|to select"):
        krum(np.ones((6, 6)), n_hostile=n_hostile, n_selected=n_selected)


# --- centred clipping -----------------------------------------------------------------------------


@given(shapes, st.floats(0.1, 20.0), st.integers(1, 5))
def test_centred_clipping_equals_the_one_in_the_space_of_the_points(shape, radius, n_iterations):
    n, d, seed = shape
    points = make_points(n, d, seed=seed).astype(np.float64)
    weights = np.random.default_rng(seed).uniform(1, 9, n)
    shares = weights / weights.sum()
    centre, reach = np.zeros(d), 0.0
    for _ in range(n_iterations):
        gaps = points - centre
        lengths = np.linalg.norm(gaps, axis=1)
        clipped = gaps * np.minimum(1.0, radius / np.maximum(lengths, 1e-30))[:, None]
        centre = centre + shares @ clipped
        reach += radius
    coefficients = centred_clipping(
        points @ points.T, weights, radius=radius, n_iterations=n_iterations
    )
    np.testing.assert_allclose(coefficients @ points, centre, atol=1e-6)
    assert np.linalg.norm(coefficients @ points) <= reach * (1 + 1e-9)
    assert coefficients.min() >= 0.0
    assert coefficients.sum() <= 1.0 + 1e-12


def test_a_radius_that_no_unit_exceeds_gives_the_weighted_mean():
    points = make_points(5, 10).astype(np.float64)
    weights = np.arange(1.0, 6.0)
    found = centred_clipping(points @ points.T, weights, radius=1e9)
    np.testing.assert_allclose(found, weights / weights.sum())


@pytest.mark.parametrize(("radius", "n_iterations"), [(0.0, 1), (np.nan, 1), (1.0, 0)])
def test_centred_clipping_that_cannot_be_is_refused(radius, n_iterations):
    with pytest.raises(AggregationError, match="centred clipping"):
        centred_clipping(np.eye(2), np.ones(2), radius=radius, n_iterations=n_iterations)


# --- spectral scores ------------------------------------------------------------------------------


def make_colluders(n=20, n_bad=4, d=256, *, seed=0, strength=2.0):
    points = make_points(n, d, seed=seed).astype(np.float64) / np.sqrt(d)
    direction = np.random.default_rng(seed + 1).standard_normal(d)
    points[:n_bad] += strength * direction / np.linalg.norm(direction)
    return points


def test_one_step_scores_are_the_squared_projections_on_the_top_singular_vector():
    points = make_points(12, 40).astype(np.float64)
    from aggregator_server.aggregation.robust import dnc

    centred = points - points.mean(axis=0)
    top = np.linalg.svd(centred)[2][0]
    expected = np.square(centred @ top)
    found = dnc._scores(points @ points.T)
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-8)


def test_colluders_who_lean_the_same_way_are_removed():
    verdict = spectral_filter(make_colluders(), max_removed=5, seed=SEED)
    assert verdict.removed[:4].all()
    assert verdict.removed.sum() <= 5
    assert verdict.scores[:4].min() > verdict.scores[~verdict.removed].max()


def test_two_groups_of_colluders_are_both_removed():
    points = make_colluders(strength=2.0)
    other = np.random.default_rng(7).standard_normal(256)
    points[4:8] += 1.5 * other / np.linalg.norm(other)
    more = make_points(12, 256, seed=9).astype(np.float64) / 16.0
    points = np.concatenate([points, more])
    verdict = spectral_filter(points, max_removed=8, seed=SEED)
    assert verdict.removed[:8].all()


@given(st.integers(3, 24), st.integers(0, 1000), st.data())
def test_no_more_than_allowed_are_removed_and_order_does_not_matter(n, seed, data):
    max_removed = data.draw(st.integers(0, n - 1))
    n_bad = data.draw(st.integers(0, n))
    points = make_colluders(n, n_bad, 64, seed=seed)
    order = np.array(data.draw(st.permutations(range(n))))
    verdict = spectral_filter(points, max_removed=max_removed, seed=SEED)
    assert verdict.removed.sum() <= max_removed
    assert np.isfinite(verdict.scores).all()
    moved = spectral_filter(points[order], max_removed=max_removed, seed=SEED)
    np.testing.assert_array_equal(moved.removed, verdict.removed[order])
    np.testing.assert_allclose(moved.scores, verdict.scores[order], rtol=1e-6, atol=1e-9)


def test_equal_seeds_give_equal_verdicts():
    points = make_points(30, 128).astype(np.float64)
    first = spectral_filter(points, max_removed=7, seed=SEED)
    again = spectral_filter(points, max_removed=7, seed=SEED)
    other = spectral_filter(points, max_removed=7, seed=bytes(32))
    assert first.scores.tobytes() == again.scores.tobytes()
    assert first.scores.tobytes() != other.scores.tobytes()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_units_that_are_all_equal_are_all_kept(value):
    points = np.full((12, 64), value) + 1e-16
    verdict = spectral_filter(points, max_removed=3, seed=SEED)
    assert not verdict.removed.any()
    assert not verdict.scores.any()


@pytest.mark.parametrize(
    ("points", "options"),
    [
        (np.zeros((0, 4)), {"max_removed": 0, "seed": SEED}),
        (np.full((3, 4), np.nan), {"max_removed": 0, "seed": SEED}),
        (np.ones((3, 4)), {"max_removed": 3, "seed": SEED}),
        (np.ones((3, 4)), {"max_removed": 0, "seed": b"short"}),
        (np.ones((3, 4)), {"max_removed": 0, "seed": SEED, "n_repeats": 0}),
    ],
)
def test_a_spectral_filter_that_cannot_be_is_refused(points, options):
    with pytest.raises(AggregationError, match="expected"):
        spectral_filter(points, **options)
