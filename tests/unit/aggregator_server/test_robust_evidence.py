"""Opposition and copies: what is removed, what never is, and what each unit's score says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator_server.aggregation.robust.evidence import (
    COPY_FRAC,
    MIN_PULL,
    copies,
    opposed,
)

N_VALUES = 2000
COSINE_STD = 1 / 64


def make_points(n, *, common=0.5, n_kinds=4, kind=0.8, seed=0):
    """Units of several kinds, with something in common."""
    rng = np.random.default_rng(seed)
    kinds = kind * rng.standard_normal((n_kinds, N_VALUES))
    shared = common * rng.standard_normal(N_VALUES)
    noise = rng.standard_normal((n, N_VALUES))
    return shared + kinds[np.arange(n) % n_kinds] + noise


def gram_of(points):
    return points @ points.T


def judge(points, *, max_removed=None):
    limit = len(points) // 4 if max_removed is None else max_removed
    return opposed(gram_of(points), max_removed=limit, cosine_std=COSINE_STD)


# --- opposition -----------------------------------------------------------------------------------


def test_units_of_unlike_kinds_that_agree_in_a_little_are_all_kept():
    found = judge(make_points(20))
    assert not found.removed.any()
    assert found.pulls.min() > 0.0
    assert np.sort(found.pulls)[9] == pytest.approx(1.0)


@pytest.mark.parametrize("n_against", [1, 2, 5])
def test_units_turned_round_are_removed_and_no_other(n_against):
    points = make_points(20)
    points[:n_against] *= -1.0
    found = judge(points)
    assert found.removed.tolist() == [True] * n_against + [False] * (20 - n_against)
    assert found.pulls[:n_against].max() <= MIN_PULL


def test_many_that_send_nearly_the_same_do_not_pass_for_what_all_have_in_common():
    """In the plain sum, five colluders of twenty outweigh the little that honest ones share."""
    points = make_points(20, common=0.35, n_kinds=20)
    rng = np.random.default_rng(1)
    against = -points.mean(axis=0)
    against *= np.linalg.norm(points, axis=1).mean() / np.linalg.norm(against)
    points[:5] = against + 0.2 * rng.standard_normal((5, N_VALUES))
    gram = gram_of(points)
    with_the_others = gram.sum(axis=0) - np.diag(gram)
    assert with_the_others[5:].max() < 0.0
    assert judge(points).removed.tolist() == [True] * 5 + [False] * 15


def test_units_that_nearly_agree_in_all_are_no_less_able_to_see_one_that_does_not():
    points = make_points(10, common=10.0)
    points[3] *= -1.0
    assert judge(points).removed.tolist() == [index == 3 for index in range(10)]


def test_a_rare_unit_that_shares_only_the_little_that_is_common_is_kept():
    points = make_points(20, kind=1.5)
    lone = np.random.default_rng(9)
    points[7] = points.mean(axis=0) + 2.0 * lone.standard_normal(N_VALUES)
    assert not judge(points).removed.any()


def test_without_anything_in_common_none_is_removed_and_no_pull_is_told():
    points = make_points(20, common=0.0, kind=0.0)
    points[:5] *= -1.0
    found = judge(points)
    assert not found.removed.any()
    assert not found.pulls.any()


def test_kinds_that_pull_apart_once_all_is_learnt_are_kept():
    """Their own directions add up to nothing, so each is against the sum of the others."""
    rng = np.random.default_rng(3)
    kinds = rng.standard_normal((5, N_VALUES))
    kinds -= kinds.mean(axis=0)
    points = kinds[np.arange(20) % 5] + rng.standard_normal((20, N_VALUES))
    gram = gram_of(points)
    sums = gram.sum(axis=0) - np.diag(gram)
    by_kind = np.kron(np.ones((4, 4)), np.eye(5))
    assert (sums - (gram * by_kind).sum(axis=0) + np.diag(gram)).max() < 0.0
    assert not judge(points).removed.any()
    points[:4] *= -1.0  # nor does anybody become the direction that is common
    assert not judge(points).removed[4:].any()


@pytest.mark.parametrize(("pull", "goes"), [(-0.15, False), (-0.6, True)])
def test_a_pull_within_the_limit_is_left_alone(pull, goes):
    points = make_points(20)
    mean = points[1:].mean(axis=0)
    points[0] = pull * mean
    assert judge(points).removed[0] == goes


def test_a_cosine_within_four_deviations_is_chance():
    points = make_points(20)
    points[0] = np.random.default_rng(2).standard_normal(N_VALUES)
    points[0] -= (0.07 + points[0] @ points[1:].mean(axis=0) / N_VALUES) * points[1:].mean(axis=0)
    gram = gram_of(points)
    exact = opposed(gram, max_removed=5, cosine_std=0.0)
    assert opposed(gram, max_removed=5, cosine_std=0.1).removed.sum() == 0
    assert exact.pulls[0] < 0.0


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 24),
    n_against=st.integers(0, 24),
    max_removed=st.integers(0, 8),
    seed=st.integers(0, 50),
    data=st.data(),
)
def test_whatever_is_sent_the_limit_holds_and_the_order_is_no_matter(
    n, n_against, max_removed, seed, data
):
    points = make_points(n, seed=seed)
    points[: min(n_against, n)] *= -2.0
    limit = min(max_removed, n - 1)
    found = judge(points, max_removed=limit)
    assert found.removed.sum() <= limit
    assert np.isfinite(found.pulls).all()
    assert not found.removed[found.pulls > MIN_PULL].any()
    order = np.array(data.draw(st.permutations(range(n))))
    moved = judge(points[order], max_removed=limit)
    np.testing.assert_array_equal(moved.removed, found.removed[order])


# --- copies ---------------------------------------------------------------------------------------


def goes(points, *, max_removed=5):
    return copies(gram_of(points), max_removed=max_removed)


def test_of_copies_the_shortest_stays():
    points = make_points(20)
    points[:4] = points[0] * np.array([1.0, 1.02, 0.98, 1.01])[:, None]
    assert goes(points).tolist() == [True, True, False, True] + [False] * 16


@pytest.mark.parametrize(("jitter", "n_gone"), [(0.1, 3), (0.9 * COPY_FRAC, 3), (2 * COPY_FRAC, 0)])
def test_jitter_sets_copies_apart_only_once_it_is_a_good_part_of_a_training(jitter, n_gone):
    points = make_points(20, kind=0.0)
    noise = np.random.default_rng(3).standard_normal((4, N_VALUES))
    points[:4] = points[0] + jitter * noise  # trainings are √2 noises apart, these √2 · jitter
    assert goes(points).sum() == n_gone


def test_units_that_did_not_train_are_copies_of_each_other():
    points = make_points(12)
    points[:3] = 1e-6 * np.random.default_rng(4).standard_normal((3, N_VALUES))
    assert goes(points).sum() == 2


def test_copies_beyond_the_limit_stay():
    points = make_points(20)
    points[:5] = points[0]
    assert goes(points, max_removed=2).sum() == 2


def test_units_that_are_all_equal_are_no_copies():
    assert not goes(np.tile(make_points(1), (9, 1))).any()


def test_honest_units_of_one_kind_are_no_copies():
    assert not goes(make_points(20, n_kinds=2, kind=3.0)).any()
