"""Audits: p-values against enumeration, bounds that hold for known mechanisms, and the attacks."""

import itertools
import math
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from privacy.auditing.membership import (
    Membership,
    auc,
    balanced_accuracy,
    clopper_pearson,
    loss_ratio_scores,
    membership_inference,
    tpr_at_fpr,
)
from privacy.auditing.one_run import (
    Audit,
    largest_one_run_bound,
    one_run_bound,
    one_run_epsilon,
    one_run_p_value,
)
from privacy.auditing.probes import cosine_scores, subspace_distance
from privacy.errors import AuditError, PrivacyError

N_AUDITS = 400


def make_rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([2305, seed])


def most_failures(frac: float, n_audits: int = N_AUDITS) -> int:
    """As many failures as chance allows a valid bound, but for one set of audits in 10,000."""
    mass = [
        math.comb(n_audits, k) * frac**k * (1 - frac) ** (n_audits - k) for k in range(n_audits)
    ]
    return next(k for k in range(n_audits) if math.fsum(mass[k + 1 :]) < 1e-4)


# P-values and bounds of the one-run audit


def tail_by_enumeration(n_guesses: int, odds: int) -> list[Fraction]:
    """f(v) for v = 0..r, from each of the 2^r ways in which guesses can be right."""
    right = Fraction(odds, 1 + odds)
    tail = [Fraction(0)] * (n_guesses + 1)
    for outcome in itertools.product((0, 1), repeat=n_guesses):
        chance = right ** sum(outcome) * (1 - right) ** (n_guesses - sum(outcome))
        for v in range(sum(outcome) + 1):
            tail[v] += chance
    return tail


def exact_p_value(tail: list[Fraction], n_canaries: int, n_right: int, delta: Fraction) -> Fraction:
    slopes = [(tail[n_right - i] - tail[n_right]) / i for i in range(1, n_right + 1)]
    return min(Fraction(1), tail[n_right] + 2 * n_canaries * delta * max(slopes, default=0))


@pytest.mark.parametrize("n_guesses", [1, 2, 5, 8])
@pytest.mark.parametrize("odds", [1, 2, 20])
def test_p_values_are_those_of_enumeration(n_guesses: int, odds: int) -> None:
    tail = tail_by_enumeration(n_guesses, odds)
    for n_right in range(n_guesses + 1):
        for n_canaries in (n_guesses, n_guesses + 7):
            for delta in (Fraction(0), Fraction(1, 1000), Fraction(1, 50), Fraction(1)):
                found = one_run_p_value(
                    n_canaries=n_canaries,
                    n_guesses=n_guesses,
                    n_right=n_right,
                    epsilon=math.log(odds),
                    delta=float(delta),
                )
                exact = exact_p_value(tail, n_canaries, n_right, delta)
                assert found == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "published"),
    [
        # Printed in arXiv 2305.08846v1 at 95 %: Appendix D, and section 7, which cuts its digits.
        (1000, 100, 75, 1e-4, 0.673),
        (100_000, 1510, 1439, 1e-5, 2.675),
    ],
)
def test_bounds_that_the_paper_prints_are_reproduced(
    m: int, r: int, v: int, delta: float, published: float
) -> None:
    found = one_run_epsilon(n_canaries=m, n_guesses=r, n_right=v, delta=delta, confidence=0.95)
    assert found == pytest.approx(published, abs=1e-3)


def test_the_bound_is_where_the_p_value_crosses_the_level() -> None:
    rng = make_rng()
    for _ in range(50):
        m = int(rng.integers(10, 3000))
        r = int(rng.integers(5, m + 1))
        counts = {"n_canaries": m, "n_guesses": r, "n_right": int(r * rng.uniform(0.6, 1))}
        delta = float(rng.choice([0.0, 1e-9, 1e-5]))
        level = float(rng.choice([0.05, 0.001]))
        bound = one_run_epsilon(**counts, delta=delta, confidence=1 - level)
        above = one_run_p_value(**counts, epsilon=bound + 1e-6, delta=delta)
        assert above >= level
        if bound > 0:
            below = one_run_p_value(**counts, epsilon=bound - 1e-6, delta=delta)
            assert below < level


@pytest.mark.parametrize(("r", "v"), [(10, 9), (100, 75), (5000, 4100)])
def test_without_delta_the_bound_is_the_log_odds_of_an_exact_interval(r: int, v: int) -> None:
    bound = one_run_epsilon(n_canaries=r, n_guesses=r, n_right=v, delta=0.0, confidence=0.975)
    frac = clopper_pearson(v, r, confidence=0.95)[0]
    assert bound == pytest.approx(math.log(frac / (1 - frac)), abs=1e-7)


def test_more_delta_more_confidence_or_more_canaries_never_raise_the_bound() -> None:
    def bound(m: int = 1000, delta: float = 1e-5, confidence: float = 0.95) -> float:
        return one_run_epsilon(
            n_canaries=m, n_guesses=200, n_right=170, delta=delta, confidence=confidence
        )

    assert bound(delta=0.0) > bound() > bound(delta=1e-4) > bound(delta=1e-2) == 0.0
    assert bound(confidence=0.5) > bound() > bound(confidence=0.999)
    assert bound(m=200) > bound() > bound(m=10_000)


@pytest.mark.parametrize("confidence", [1e-17, 1e-12, 1 - 1e-12])
@pytest.mark.parametrize("right", [0, 1, 999, 1000])
def test_extreme_levels_end(confidence: float, right: int) -> None:
    bound = one_run_epsilon(
        n_canaries=1000, n_guesses=1000, n_right=right, delta=0.0, confidence=confidence
    )
    assert math.isfinite(bound)
    assert bound >= 0.0


# The one-run audit on mechanisms of known ε


def randomized_response(
    rng: np.random.Generator, m: int, *, epsilon: float, delta: float = 0.0
) -> tuple[Any, Any]:
    """Coins and scores: the sign is right with e^ε / (1 + e^ε), and sure with probability δ."""
    coins = rng.random(m) < 0.5
    is_sure = rng.random(m) < delta
    is_right = (rng.random(m) < 1 / (1 + math.exp(-epsilon))) | is_sure
    size = rng.uniform(1.0, 2.0, m) + is_sure
    return coins, np.where(coins == is_right, size, -size)


def n_failures(m: int, *, made: float, claimed: float, delta: float, confidence: float) -> int:
    """How often the bound exceeds the ε by which randomized response was made."""
    rng = make_rng(m)
    bounds = [
        one_run_bound(
            *randomized_response(rng, m, epsilon=made, delta=delta),
            n_guesses=m // 2,
            delta=claimed,
            confidence=confidence,
        ).epsilon_lower_bound
        for _ in range(N_AUDITS)
    ]
    return sum(bound > made for bound in bounds)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_the_bound_exceeds_epsilon_as_rarely_as_it_says(epsilon: float) -> None:
    # Guarantee 1 of one_run_bound.
    failed = n_failures(200, made=epsilon, claimed=0.0, delta=0.0, confidence=0.95)
    assert failed <= most_failures(0.05)


def test_that_check_refuses_a_bound_of_less_confidence() -> None:
    failed = n_failures(200, made=1.0, claimed=0.0, delta=0.0, confidence=0.8)
    assert most_failures(0.05) < failed <= most_failures(0.2)


def test_delta_is_paid_for() -> None:
    # A mechanism that is (1, 0.05)-DP: at δ = 0.05 the bound holds, at δ = 0 it finds more than 1.
    settings = {"made": 1.0, "delta": 0.05, "confidence": 0.95}
    assert n_failures(200, claimed=0.05, **settings) <= most_failures(0.05)
    assert n_failures(200, claimed=0.0, **settings) > most_failures(0.05)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_many_canaries_come_near_epsilon(epsilon: float) -> None:
    coins, scores = randomized_response(make_rng(), 40_000, epsilon=epsilon)
    audit = one_run_bound(coins, scores, n_guesses=20_000, delta=0.0, confidence=0.95)
    assert 0.9 * epsilon < audit.epsilon_lower_bound <= epsilon


def test_scores_without_a_signal_give_nothing() -> None:
    rng = make_rng()
    for _ in range(50):
        coins = rng.random(1000) < 0.5
        audit = one_run_bound(coins, rng.standard_normal(1000), n_guesses=1000, delta=1e-5)
        assert audit.epsilon_lower_bound < 0.1


@pytest.mark.parametrize("delta", [0.0, 1e-6])
def test_perfect_scores_give_the_largest_bound(delta: float) -> None:
    coins = np.arange(400) % 2 == 0
    audit = one_run_bound(coins, coins.astype(np.float32), n_guesses=400, delta=delta)
    largest = largest_one_run_bound(400, delta=delta)
    assert audit == Audit(
        epsilon_lower_bound=largest,
        largest_bound=largest,
        n_canaries=400,
        n_guesses=400,
        n_right=400,
        delta=delta,
        confidence=0.999,
    )
    fewer = one_run_bound(coins, coins.astype(np.float32), n_guesses=100, delta=delta)
    assert 0 < fewer.epsilon_lower_bound == fewer.largest_bound < largest


@pytest.mark.parametrize("m", [1, 10, 1000])
def test_the_largest_bound_has_a_closed_form(m: int) -> None:
    frac = 0.05 ** (1 / m)
    exact = max(0.0, math.log(frac / (1 - frac)))
    assert largest_one_run_bound(m, delta=0.0, confidence=0.95) == pytest.approx(exact, abs=1e-7)


# Which canaries are guessed


def n_right(coins: Any, scores: Any, n_guesses: int) -> int:
    return one_run_bound(
        np.asarray(coins), np.asarray(scores, np.float64), n_guesses=n_guesses, delta=0.0
    ).n_right


@pytest.mark.parametrize(("n_guesses", "expected"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3)])
def test_the_ends_are_guessed_and_the_odd_guess_says_in(n_guesses: int, expected: int) -> None:
    # Sorted from the lowest: out in | in | in in. Three of "in" are right, one of two "out" is.
    coins = [False, True, False, True, True]
    assert n_right(coins, [1.0, 2.0, 3.0, 4.0, 5.0], n_guesses) == expected


@pytest.mark.parametrize("scores_are_equal_often", [False, True])
def test_an_audit_of_the_opposite_is_the_same(scores_are_equal_often: bool) -> None:
    rng = make_rng()
    for _ in range(30):
        coins, scores = randomized_response(rng, 61, epsilon=1.0)
        if scores_are_equal_often:
            scores = np.rint(scores)
        for n_guesses in (2, 20, 60):
            audits = [
                one_run_bound(c, s, n_guesses=n_guesses, delta=1e-5, confidence=0.9)
                for c, s in ((coins, scores), (~coins, -scores), (coins, np.exp(scores)))
            ]
            assert audits[0] == audits[1] == audits[2]


def test_the_order_of_canaries_does_not_matter() -> None:
    # Guarantee 2 of one_run_bound.
    rng = make_rng()
    for _ in range(30):
        coins = rng.random(40) < 0.5
        scores = rng.integers(0, 6, 40)
        order = rng.permutation(40)
        for n_guesses in (1, 7, 20, 40):
            assert n_right(coins, scores, n_guesses) == n_right(
                coins[order], scores[order], n_guesses
            )


def test_equal_scores_never_count_for_more_than_any_order_would_give() -> None:
    rng = make_rng()
    for _ in range(40):
        coins = rng.random(6) < 0.5
        scores = rng.integers(0, 3, 6)
        ranks = [
            sorted(order, key=lambda i: scores[i]) for order in itertools.permutations(range(6))
        ]
        for n_guesses in (2, 3, 6):
            n_out = n_guesses // 2
            n_in = n_guesses - n_out
            fewest = min(
                sum(not coins[i] for i in rank[:n_out]) + sum(coins[i] for i in rank[6 - n_in :])
                for rank in ranks
            )
            found = n_right(coins, scores, n_guesses)
            assert found <= fewest
            edges = np.sort(scores)
            if n_guesses < 6 and edges[n_out - 1] != edges[6 - n_in]:
                assert found == fewest


def test_attack_canaries_in_order_of_their_coins_with_equal_scores_find_nothing() -> None:
    coins = np.arange(1000) >= 500
    audit = one_run_bound(coins, np.zeros(1000), n_guesses=1000, delta=0.0)
    assert (audit.n_right, audit.epsilon_lower_bound) == (0, 0.0)


# Membership inference


def test_scores_are_what_the_model_lost_of_the_reference_loss() -> None:
    reference, model = np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 1.5])
    found = loss_ratio_scores(reference_losses=reference, model_losses=model)
    assert found.tolist() == [2.0, 0.0, -0.5]


def make_groups(rng: np.random.Generator) -> tuple[Any, Any]:
    """Groups with many equal scores."""
    inside = rng.integers(0, 12, int(rng.integers(1, 40))) + 2
    return inside.astype(np.float32), rng.integers(0, 12, int(rng.integers(1, 40))).astype(float)


def test_auc_is_the_fraction_of_pairs() -> None:
    rng = make_rng()
    for _ in range(50):
        inside, outside = make_groups(rng)
        n_wins = sum(Fraction(int(a > b) * 2 + int(a == b), 2) for a in inside for b in outside)
        assert auc(inside, outside) == float(n_wins / (len(inside) * len(outside)))
        assert auc(inside, outside) + auc(outside, inside) == pytest.approx(1.0, abs=1e-15)


def test_rates_are_those_of_the_best_of_all_thresholds() -> None:
    rng = make_rng()
    for _ in range(50):
        inside, outside = make_groups(rng)
        rates = [
            (float(np.mean(inside >= t)), float(np.mean(outside >= t))) for t in [*range(15), 99]
        ]
        best = max((tpr + 1 - fpr) / 2 for tpr, fpr in rates)
        assert balanced_accuracy(inside, outside) == pytest.approx(best, abs=1e-12)
        for max_fpr in (0.0, 0.1, 0.29, 1.0):
            best = max(tpr for tpr, fpr in rates if fpr <= max_fpr)
            assert tpr_at_fpr(inside, outside, max_fpr=max_fpr) == best


def test_a_false_positive_rate_at_the_limit_is_allowed() -> None:
    outside = np.arange(100.0)
    assert tpr_at_fpr(np.full(10, 71.0), outside, max_fpr=0.29) == 1.0
    assert tpr_at_fpr(np.full(10, 71.0), outside, max_fpr=0.28) == 0.0


@pytest.mark.parametrize(
    ("n_hits", "n_trials", "confidence", "lower", "upper"),
    [
        (1, 10, 0.95, 0.0025, 0.4450),
        (5, 10, 0.95, 0.1871, 0.8129),
        (3, 20, 0.95, 0.0321, 0.3789),
        (0, 30, 0.95, 0.0, 1 - 0.025 ** (1 / 30)),
        (30, 30, 0.99, 0.005 ** (1 / 30), 1.0),
        (1, 1, 0.9, 0.05, 1.0),
    ],
)
def test_exact_intervals_are_the_known_ones(
    n_hits: int, n_trials: int, confidence: float, lower: float, upper: float
) -> None:
    found = clopper_pearson(n_hits, n_trials, confidence=confidence)
    assert found == pytest.approx((lower, upper), abs=5e-5)
    mirrored = clopper_pearson(n_trials - n_hits, n_trials, confidence=confidence)
    assert mirrored == pytest.approx((1 - found[1], 1 - found[0]), abs=1e-14)


@pytest.mark.parametrize("n_trials", [1, 7, 40])
def test_an_exact_interval_misses_as_rarely_as_it_says(n_trials: int) -> None:
    # Guarantee 1 of clopper_pearson, for each probability of a grid.
    ends = [clopper_pearson(k, n_trials, confidence=0.9) for k in range(n_trials + 1)]
    for p in np.linspace(0.001, 0.999, 333):
        mass = [math.comb(n_trials, k) * p**k * (1 - p) ** (n_trials - k) for k in range(len(ends))]
        assert sum(m for m, (low, _) in zip(mass, ends, strict=True) if low > p) <= 0.05 + 1e-12
        assert sum(m for m, (_, high) in zip(mass, ends, strict=True) if high < p) <= 0.05 + 1e-12


def noisy_groups(rng: np.random.Generator, n: int, *, noise: str) -> tuple[Any, Any]:
    """A counting query of sensitivity 1 with Laplace noise of ε = 1, or Gaussian of std 1."""
    if noise == "laplace":
        return 1 + rng.laplace(size=n), rng.laplace(size=n)
    return 1 + rng.standard_normal(n), rng.standard_normal(n)


def gaussian_delta(epsilon: float) -> float:
    """Exact δ of a Gaussian mechanism of std 1 (Balle and Wang 2018, theorem 8)."""
    cdf = NormalDist().cdf
    return cdf(0.5 - epsilon) - math.exp(epsilon) * cdf(-0.5 - epsilon)


def inference(inside: Any, outside: Any, **changes: Any) -> Membership:
    settings = {"rng": make_rng(), "delta": 0.0, **changes}
    return membership_inference(inside, outside, **settings)


@pytest.mark.parametrize(("noise", "delta"), [("laplace", 0.0), ("gaussian", gaussian_delta(1.0))])
def test_the_bound_from_rates_exceeds_epsilon_as_rarely_as_it_says(
    noise: str, delta: float
) -> None:
    # Guarantee 1 of membership_inference: both mechanisms are (1, δ)-DP.
    rng = make_rng()
    bounds = [
        inference(*noisy_groups(rng, 200, noise=noise), rng=rng, delta=delta).epsilon_lower_bound
        for _ in range(N_AUDITS)
    ]
    assert sum(bound > 1.0 for bound in bounds) <= most_failures(0.05)


def test_scores_of_equal_groups_give_a_bound_as_rarely_as_it_says() -> None:
    # Counting on the half that chose the threshold gives one in 163 of these 400 audits.
    rng = make_rng()
    bounds = [
        inference(rng.random(1000), rng.random(1000), rng=rng, confidence=0.8).epsilon_lower_bound
        for _ in range(N_AUDITS)
    ]
    assert sum(bound > 0.0 for bound in bounds) <= most_failures(0.2)


@pytest.mark.parametrize(("noise", "delta"), [("laplace", 0.0), ("gaussian", gaussian_delta(1.0))])
def test_many_scores_come_near_epsilon(noise: str, delta: float) -> None:
    found = inference(*noisy_groups(make_rng(), 100_000, noise=noise), delta=delta)
    assert 0.9 < found.epsilon_lower_bound <= 1.0


def test_gaussian_noise_without_its_delta_is_found_to_exceed_its_epsilon() -> None:
    found = inference(*noisy_groups(make_rng(), 100_000, noise="gaussian"), delta=0.0)
    assert found.epsilon_lower_bound > 1.2


def test_both_directions_are_used() -> None:
    # Non-members alone score low: log(TPR / FPR) is at most log 2, log(TNR / FNR) has no limit.
    rng = make_rng()
    inside, outside = rng.uniform(0.5, 1.0, 2000), rng.random(2000)
    assert inference(inside, outside).epsilon_lower_bound > 4.0
    assert inference(-outside, -inside).epsilon_lower_bound > 4.0


def test_a_release_that_tells_all() -> None:
    found = inference(np.linspace(1, 2, 100), np.linspace(-2, -1, 80), max_fpr=0.0)
    n_kept_in, n_kept_out = 50, 40
    tpr_low, fpr_high = 0.025 ** (1 / n_kept_in), 1 - 0.025 ** (1 / n_kept_out)
    assert (found.auc, found.balanced_accuracy, found.tpr) == (1.0, 1.0, 1.0)
    assert found.tpr_lower_bound == pytest.approx(tpr_low)
    assert found.fpr_upper_bound == pytest.approx(fpr_high)
    both = (tpr_low / fpr_high, (1 - fpr_high) / (1 - tpr_low))
    assert found.epsilon_lower_bound == pytest.approx(math.log(max(both)))
    assert (found.n_members, found.n_non_members) == (100, 80)


def test_a_generator_of_the_same_seed_gives_the_same_result() -> None:
    groups = noisy_groups(make_rng(), 500, noise="laplace")
    assert inference(*groups) == inference(*groups)
    assert inference(*groups) != inference(*groups, rng=make_rng(1))


# The subspace probe


def make_inputs(n: int, d: int, seed: int = 0) -> Any:
    return make_rng(seed).standard_normal((n, d))


def change_of(inputs: Any, r: int) -> Any:
    """−lr Σ_t (Bᵀ g_t) x_tᵀ: one step of SGD on A [r, d]."""
    rng = make_rng(99)
    B, gradients = rng.standard_normal((40, r)), rng.standard_normal((len(inputs), 40))
    return -0.01 * (gradients @ B).T @ inputs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n_used", "r"), [(1, 8), (7, 8), (8, 8), (30, 32)])
def test_exactly_the_used_inputs_are_found(n_used: int, r: int, dtype: Any) -> None:
    # Guarantee 1 of subspace_distance.
    vocabulary = make_inputs(1000, 64)
    used = make_rng(5).choice(1000, n_used, replace=False)
    change = change_of(vocabulary[used], r).astype(dtype)
    distances = subspace_distance(change, vocabulary.astype(dtype))
    near = 1e-4 if dtype == np.float32 else 1e-11
    assert set(np.flatnonzero(distances < near)) == set(used)
    others = np.delete(distances, used)
    assert others.min() > 0.3
    assert np.mean(others**2) == pytest.approx(1 - n_used / 64, abs=0.01)


def test_an_input_that_is_used_often_or_in_several_steps_is_found_as_well() -> None:
    vocabulary = make_inputs(200, 64)
    change = change_of(vocabulary[[3, 3, 3, 8]], 8) + 5 * change_of(vocabulary[[8, 21]], 8)
    assert set(np.flatnonzero(subspace_distance(change, vocabulary) < 1e-11)) == {3, 8, 21}


def test_more_inputs_than_the_rank_hide_each_other() -> None:
    # Guarantee 2 of subspace_distance.
    vocabulary = make_inputs(1000, 64)
    distances = subspace_distance(change_of(vocabulary[:16], 8), vocabulary)
    assert distances.min() > 0.2


def test_inputs_that_fill_the_space_are_like_any_others() -> None:
    vocabulary = make_inputs(1000, 64)
    used, others = np.split(subspace_distance(change_of(vocabulary[:500], 8), vocabulary), [500])
    assert auc(-used, -others) == pytest.approx(0.5, abs=0.06)


def test_a_row_space_of_everything_says_nothing() -> None:
    # Guarantee 3 of subspace_distance.
    vocabulary = make_inputs(1000, 16)
    for r in (16, 40):
        distances = subspace_distance(change_of(vocabulary[:50], r), vocabulary)
        assert distances.max() < 1e-11


def test_a_step_of_adam_hides_the_inputs() -> None:
    vocabulary = make_inputs(1000, 64)
    change = np.sign(change_of(vocabulary[:4], 8))  # its first step
    assert subspace_distance(change, vocabulary)[:4].min() > 0.1


def test_the_strongest_directions_survive_a_little_noise() -> None:
    vocabulary = make_inputs(1000, 64)
    change = change_of(vocabulary[:4], 16) + 1e-4 * make_inputs(16, 64, seed=7)
    filled = subspace_distance(change, vocabulary)
    cut = subspace_distance(change, vocabulary, rank=4)
    assert np.mean(filled[4:] ** 2) == pytest.approx(1 - 16 / 64, abs=0.01)
    assert np.mean(cut[4:] ** 2) == pytest.approx(1 - 4 / 64, abs=0.01)
    assert cut[:4].max() < 0.01
    assert cut[4:].min() > 0.5


def test_noise_alone_finds_nothing() -> None:
    vocabulary = make_inputs(1000, 64)
    change = change_of(vocabulary[:4], 16) + 100.0 * make_inputs(16, 64, seed=7)
    assert subspace_distance(change, vocabulary)[:4].min() > 0.5


def test_distances_ignore_lengths_and_a_candidate_of_zeros_is_never_found() -> None:
    vocabulary = make_inputs(100, 64)
    change = change_of(vocabulary[:4], 8)
    distances = subspace_distance(change, vocabulary)
    assert subspace_distance(1e6 * change, 1e-6 * vocabulary) == pytest.approx(distances, abs=1e-11)
    vocabulary[2] = 0.0
    assert subspace_distance(change, vocabulary)[2] == 1.0


def test_a_vocabulary_of_several_blocks_is_probed_to_its_end() -> None:
    vocabulary = make_inputs(9000, 32)
    used = [0, 4095, 4096, 8191, 8192, 8999]
    distances = subspace_distance(change_of(vocabulary[used], 8), vocabulary)
    assert np.flatnonzero(distances < 1e-11).tolist() == used
    assert distances[used[0]] >= 0.0
    assert distances.max() <= 1.0


# Cosines


def test_a_step_down_an_examples_gradient_scores_one() -> None:
    gradients = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found = cosine_scores(np.array([-0.1, 0.0]), gradients)
    assert found.tolist() == pytest.approx([1.0, 0.0, -1.0, 0.0, math.sqrt(0.5)])
    scaled = cosine_scores(np.array([-7.0, 0.0]), 1e-3 * gradients)
    assert scaled == pytest.approx(found)


def test_members_of_an_update_are_audited_by_its_cosines() -> None:
    rng = make_rng()
    gradients = rng.standard_normal((400, 4000)).astype(np.float32)
    coins = rng.random(400) < 0.5
    scores = cosine_scores(-0.1 * gradients[coins].sum(axis=0), gradients)
    assert auc(scores[coins], scores[~coins]) > 0.99
    audit = one_run_bound(coins, scores, n_guesses=200, delta=1e-5)
    assert 2.0 < audit.epsilon_lower_bound <= audit.largest_bound


# Refusals

GOOD = np.array([0.5, 1.5, 2.5])
COINS = np.array([True, False, True])
SQUARE = np.eye(3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    values, matrix = GOOD.copy(), SQUARE.copy()
    values[1] = matrix[1, 1] = bad
    calls = [
        lambda: one_run_bound(COINS, values, n_guesses=2, delta=0.0),
        lambda: loss_ratio_scores(reference_losses=GOOD, model_losses=values),
        lambda: loss_ratio_scores(reference_losses=values, model_losses=GOOD),
        lambda: inference(values, GOOD),
        lambda: inference(GOOD, values),
        lambda: auc(GOOD, values),
        lambda: balanced_accuracy(values, GOOD),
        lambda: tpr_at_fpr(values, GOOD, max_fpr=0.1),
        lambda: subspace_distance(matrix, SQUARE),
        lambda: subspace_distance(SQUARE, matrix),
        lambda: cosine_scores(values, SQUARE),
        lambda: cosine_scores(GOOD, matrix),
    ]
    for call in calls:
        with pytest.raises(AuditError, match=r"1 of \d values of \w+ are not finite"):
            call()


@pytest.mark.parametrize("shape", [(0,), (), (3, 1)])
def test_scores_that_are_no_vector_are_refused(shape: tuple[int, ...]) -> None:
    values = np.zeros(shape)
    calls = [
        lambda: one_run_bound(np.zeros(shape, np.bool_), values, n_guesses=1, delta=0.0),
        lambda: loss_ratio_scores(reference_losses=values, model_losses=values),
        lambda: inference(values, GOOD),
        lambda: inference(GOOD, values),
        lambda: auc(values, GOOD),
        lambda: cosine_scores(values, SQUARE),
    ]
    for call in calls:
        with pytest.raises(AuditError, match="must be a vector"):
            call()


def test_whole_numbers_are_no_scores() -> None:
    whole: Any = np.arange(3)
    with pytest.raises(AuditError, match="scores is of int64"):
        one_run_bound(COINS, whole, n_guesses=2, delta=0.0)
    with pytest.raises(AuditError, match="change is of int64"):
        subspace_distance(SQUARE.astype(np.int64), SQUARE)


@pytest.mark.parametrize("coins", [COINS[:2], COINS.astype(np.float64), COINS[:, None]])
def test_coins_of_another_shape_or_type_are_refused(coins: Any) -> None:
    with pytest.raises(AuditError, match="included must be bool"):
        one_run_bound(coins, GOOD, n_guesses=2, delta=0.0)


@pytest.mark.parametrize("n_guesses", [-1, 0, 4])
def test_a_number_of_guesses_without_canaries_is_refused(n_guesses: int) -> None:
    with pytest.raises(AuditError, match=f"n_guesses is {n_guesses}"):
        one_run_bound(COINS, GOOD, n_guesses=n_guesses, delta=0.0)


@pytest.mark.parametrize(("m", "r", "v"), [(5, 4, 5), (5, 6, 4), (5, 5, -1), (5, 0, 0)])
def test_counts_that_contradict_each_other_are_refused(m: int, r: int, v: int) -> None:
    counts = {"n_canaries": m, "n_guesses": r, "n_right": v}
    with pytest.raises(AuditError, match=f"{v} right of {r} guesses of {m}"):
        one_run_p_value(**counts, epsilon=1.0, delta=0.0)
    with pytest.raises(AuditError, match=f"{v} right of {r} guesses of {m}"):
        one_run_epsilon(**counts, delta=0.0, confidence=0.95)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 95.0, math.nan])
def test_a_confidence_outside_its_range_is_refused(confidence: float) -> None:
    calls = [
        lambda: one_run_bound(COINS, GOOD, n_guesses=2, delta=0.0, confidence=confidence),
        lambda: largest_one_run_bound(10, delta=0.0, confidence=confidence),
        lambda: inference(GOOD, GOOD, confidence=confidence),
        lambda: clopper_pearson(1, 2, confidence=confidence),
    ]
    for call in calls:
        with pytest.raises(AuditError, match="confidence is"):
            call()


@pytest.mark.parametrize("delta", [-1e-9, 1.1, math.nan])
def test_a_delta_outside_its_range_is_refused(delta: float) -> None:
    calls = [
        lambda: one_run_bound(COINS, GOOD, n_guesses=2, delta=delta),
        lambda: one_run_p_value(n_canaries=2, n_guesses=2, n_right=1, epsilon=1.0, delta=delta),
        lambda: inference(GOOD, GOOD, delta=delta),
    ]
    for call in calls:
        with pytest.raises(AuditError, match="delta is"):
            call()


@pytest.mark.parametrize("epsilon", [-0.1, math.inf, math.nan])
def test_an_epsilon_outside_its_range_is_refused(epsilon: float) -> None:
    with pytest.raises(AuditError, match="epsilon is"):
        one_run_p_value(n_canaries=2, n_guesses=2, n_right=1, epsilon=epsilon, delta=0.0)


def test_other_values_out_of_range_are_refused() -> None:
    with pytest.raises(AuditError, match="1 members and 3 non-members"):
        inference(GOOD[:1], GOOD)
    with pytest.raises(AuditError, match="3 reference and 2 model losses"):
        loss_ratio_scores(reference_losses=GOOD, model_losses=GOOD[:2])
    for max_fpr in (-0.1, 1.1, math.nan):
        with pytest.raises(AuditError, match="max_fpr is"):
            inference(GOOD, GOOD, max_fpr=max_fpr)
    for n_hits, n_trials in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(AuditError, match=f"{n_hits} hits of {n_trials} trials"):
            clopper_pearson(n_hits, n_trials, confidence=0.95)


def test_updates_that_cannot_be_probed_are_refused() -> None:
    for change, candidates in ((SQUARE[0], SQUARE), (SQUARE, SQUARE[0]), (SQUARE, SQUARE[:, :2])):
        with pytest.raises(AuditError, match="change is"):
            subspace_distance(change, candidates)
    for rank in (-1, 0, 4):
        with pytest.raises(AuditError, match=f"rank is {rank}"):
            subspace_distance(SQUARE, SQUARE, rank=rank)
    for empty in (np.zeros((0, 3)), np.zeros((2, 3))):
        with pytest.raises(AuditError, match="all zero"):
            subspace_distance(empty, SQUARE)
    with pytest.raises(AuditError, match="no direction"):
        cosine_scores(np.zeros(3), SQUARE)
    for gradients in (GOOD, SQUARE[:, :2]):
        with pytest.raises(AuditError, match="gradients are"):
            cosine_scores(GOOD, gradients)


def test_no_candidates_and_no_gradients_give_no_scores() -> None:
    assert subspace_distance(SQUARE, np.zeros((0, 3))).shape == (0,)
    assert cosine_scores(GOOD, np.zeros((0, 3))).shape == (0,)


def test_an_audits_error_is_one_of_privacy() -> None:
    assert issubclass(AuditError, PrivacyError)
