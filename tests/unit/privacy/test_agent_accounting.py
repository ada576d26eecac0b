"""ε of profile P2: against exact divergences, dp-accounting, and itself by another way."""

import math
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld.privacy_loss_distribution import from_discrete_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant

from privacy import agent_accounting
from privacy.accounting import SampledGaussian, Spent, spent
from privacy.agent_accounting import (
    calibrate_noise,
    closeness,
    concentrated_epsilon,
    drowning,
    epsilon_of_concentrated,
    event_of_example,
    gap_of_a_value,
    require_kept,
    spent_by_agent,
)
from privacy.distributed_noise import AgentNoise, Cohort
from privacy.errors import AccountingError, DrownedError, NoiseError
from protocol.blocks import CellMasking, NoMasking
from protocol.privacy import AgentPrivacy, CentralPrivacy, NoPrivacy

DELTA = 1e-5


def make_cohort(members: int = 20, honest: int = 9) -> Cohort:
    return Cohort(min_members=members, max_members=members, n_honest=honest)


def make_noise(multiplier: float, *, honest: int = 9, n_values: int = 1000) -> AgentNoise:
    """With hσ² of about (multiplier·sC)²."""
    return AgentNoise(
        n_values=n_values,
        clip_norm=1.0,
        steps_per_clip=2**16,
        share_variance=(multiplier * 2**16) ** 2 / honest,
        cohort=make_cohort(honest=honest),
    )


def calibrated(**changed: Any) -> AgentNoise:
    settings: dict[str, Any] = {
        "epsilon": 8.0,
        "delta": DELTA,
        "n_rounds": 10,
        "n_values": 400,
        "clip_norm": 0.5,
        "cohort": make_cohort(),
    }
    return calibrate_noise(**(settings | changed))


def pmf_of_sum(n_shares: int, variance: float) -> Any:
    """Probabilities of the sum of n variables N_Z(0, σ²), from −L to L."""
    reach = math.ceil(12 * math.sqrt(variance)) + 2
    numbers = np.arange(-reach, reach + 1)
    one = np.exp(-(numbers.astype(float) ** 2) / (2 * variance))
    one /= one.sum()
    total = np.array([1.0])
    for _ in range(n_shares):
        total = np.convolve(total, one)
    return total


def shifted(probabilities: Any, shift: int) -> tuple[Any, Any]:
    zeros = np.zeros(shift)
    return np.concatenate([probabilities, zeros]), np.concatenate([zeros, probabilities])


def divergence(p: Any, q: Any, order: float) -> float:
    """Rényi's, where both are above float64's rounding."""
    both = (p > 1e-200) & (q > 1e-200)
    terms = order * np.log(p[both]) + (1.0 - order) * np.log(q[both])
    top = terms.max()
    return float((top + np.log(np.exp(terms - top).sum())) / (order - 1.0))


def hockey_stick(p: Any, q: Any, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum())


# Sums of discrete Gaussians


def test_closeness_is_that_of_the_paper() -> None:
    assert closeness(1, 0.25) == 0.0
    # 10·(e^(−π²σ²) + e^(−4π²σ²/3)), by hand for σ² = ½.
    assert closeness(3, 0.5) == pytest.approx(10 * (0.0071918834 + 0.0013882154), rel=1e-5)
    assert closeness(20, 16.0) < 1e-66


@pytest.mark.parametrize("order", [1.01, 1.5, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
@pytest.mark.parametrize(
    ("n_shares", "variance"), [(1, 0.25), (2, 0.25), (3, 0.3), (5, 1.0), (9, 4.0)]
)
def test_no_divergence_is_larger_than_the_theorem_says(
    n_shares: int, variance: float, shift: int, order: float
) -> None:
    # Guarantee 1
    p, q = shifted(pmf_of_sum(n_shares, variance), shift)
    epsilon = concentrated_epsilon(
        sensitivity=shift, n_values=1, n_shares=n_shares, share_variance=variance
    )
    found = max(divergence(p, q, order), divergence(q, p, order))
    assert found <= order * epsilon**2 / 2.0 + 1e-9
    assert found >= 0.2 * order * shift**2 / (2 * n_shares * variance)


def test_the_sum_is_no_discrete_gaussian_where_shares_are_small() -> None:
    # So closeness is needed: without it, the bound would be wrong here.
    p, q = shifted(pmf_of_sum(2, 0.25), 1)
    assert divergence(q, p, 1.01) > 1.01 * 1.0 / (2 * 2 * 0.25)


def test_the_bound_on_the_divergence_grows_with_the_values() -> None:
    few, many = (
        concentrated_epsilon(sensitivity=3.0, n_values=d, n_shares=4, share_variance=1.0)
        for d in (1, 10**6)
    )
    tau = closeness(4, 1.0)
    ratio = 1.5
    assert few == pytest.approx(math.sqrt(ratio**2 + 2 * tau))
    assert many == pytest.approx(min(math.sqrt(ratio**2 + 2e6 * tau), ratio + 1e3 * tau))
    assert many == pytest.approx(ratio + 1e3 * tau), "the second bound is the less here"


@pytest.mark.parametrize("variance", [0.2499, 0.0, math.nan])
def test_shares_too_small_for_the_theorem_are_refused(variance: float) -> None:
    with pytest.raises(AccountingError, match=r"the theorem begins at 0\.25"):
        concentrated_epsilon(sensitivity=1.0, n_values=1, n_shares=2, share_variance=variance)


@pytest.mark.parametrize(
    ("n_shares", "variance", "kernel"),
    [(1, 1.0, 0.3), (2, 0.6, 0.3), (4, 0.5, 0.25), (3, 2.0, 0.5)],
)
def test_the_gap_to_a_gaussian_made_discrete_is_bounded(
    n_shares: int, variance: float, kernel: float
) -> None:
    # The proof of the first way, in numbers: Y from a continuous G, against the sum.
    total = pmf_of_sum(n_shares, variance)
    half = len(total) // 2
    numbers = np.arange(-half, half + 1)
    deviation = math.sqrt(n_shares * variance - kernel)
    grid = np.linspace(-10 * deviation, 10 * deviation, 40_001)
    density = np.exp(-(grid**2) / (2 * deviation**2))
    density /= density.sum()
    far = np.arange(-half - 12, half + 13)
    rows = np.exp(-((far[:, None] - grid[None, :]) ** 2) / (2 * kernel))
    made = (rows / rows.sum(0)) @ density
    made = made[12:-12]
    near = np.abs(numbers) <= 5 * math.sqrt(n_shares * variance)
    gaps = np.abs(np.log(total[near] / made[near]))
    bound = gap_of_a_value(n_shares=n_shares, share_variance=variance, kernel_variance=kernel)
    assert 1e-5 * bound < gaps.max() <= bound  # far less where the kernel's waves average out


# From divergences to ε


@pytest.mark.parametrize("multiplier", [0.3, 0.6, 2.0, 10.0])
@pytest.mark.parametrize("n_rounds", [1, 10, 1000])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
def test_epsilon_of_concentrated_privacy_is_that_of_dp_accounting(
    multiplier: float, n_rounds: int, delta: float
) -> None:
    accountant = RdpAccountant(orders=np.concatenate([1 + np.logspace(-1.9, 5, 3000)]))
    accountant.compose(GaussianDpEvent(multiplier), n_rounds)
    ours = epsilon_of_concentrated(n_rounds / (2 * multiplier**2), delta)
    assert ours == pytest.approx(accountant.get_epsilon(delta), rel=1e-3)


def test_no_release_costs_nothing() -> None:
    assert spent_by_agent(make_noise(1.0), n_rounds=0, delta=DELTA) == Spent(pld=0.0, rdp=0.0)
    assert epsilon_of_concentrated(0.0, 0.5) == 0.0


@pytest.mark.parametrize(("deviation", "n_rounds"), [(20.0, 1), (40.0, 10), (80.0, 30)])
def test_one_share_of_one_value_costs_what_dp_accounting_says_of_a_discrete_gaussian(
    deviation: float, n_rounds: int
) -> None:
    # Guarantee 1: never less than the exact mechanism, and hardly more.
    noise = AgentNoise(
        n_values=1,
        clip_norm=1.0,
        steps_per_clip=20,
        share_variance=deviation**2,
        cohort=make_cohort(1, 1),
    )
    shift = math.isqrt(noise.max_square)
    assert shift == 21
    theirs = from_discrete_gaussian_mechanism(
        deviation, sensitivity=shift, value_discretization_interval=1e-4, use_connect_dots=True
    )
    exact = theirs.self_compose(n_rounds).get_epsilon_for_delta(DELTA)
    ours = spent_by_agent(noise, n_rounds=n_rounds, delta=DELTA)
    assert exact * 0.9999 <= ours.pld <= exact * 1.01
    assert exact < ours.rdp < exact * 1.15


@pytest.mark.parametrize(("honest", "deviation"), [(2, 12.0), (3, 8.0), (9, 4.0)])
def test_a_sum_of_shares_keeps_what_epsilon_promises(honest: int, deviation: float) -> None:
    # Guarantee 1, against the exact probabilities of a sum, for one value of ±21 steps.
    noise = AgentNoise(
        n_values=1,
        clip_norm=1.0,
        steps_per_clip=20,
        share_variance=deviation**2,
        cohort=make_cohort(honest, honest),
    )
    p, q = shifted(pmf_of_sum(honest, deviation**2), 21)
    for delta in (1e-2, 1e-5, 1e-8):
        found = spent_by_agent(noise, n_rounds=1, delta=delta)
        for epsilon in (found.pld, found.rdp):
            assert max(hockey_stick(p, q, epsilon), hockey_stick(q, p, epsilon)) <= delta
        assert hockey_stick(q, p, found.pld * 0.97) > delta, "more than a few percent too careful"


@pytest.mark.parametrize("n_rounds", [1, 10, 200])
@pytest.mark.parametrize("multiplier", [1.0, 5.0, 30.0])
def test_concentrated_privacy_is_a_larger_bound(multiplier: float, n_rounds: int) -> None:
    # Guarantee 2
    found = spent_by_agent(make_noise(multiplier), n_rounds=n_rounds, delta=DELTA)
    if math.isfinite(found.pld):
        assert found.pld < found.rdp < 1.3 * found.pld
    assert found.epsilon == found.pld


def test_an_accountant_that_contradicts_the_other_is_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent_accounting, "epsilon_of_concentrated", lambda *_: 1.0)
    with pytest.raises(AccountingError, match="cannot be less"):
        spent_by_agent(make_noise(2.0), n_rounds=10, delta=DELTA)


@pytest.mark.parametrize("multiplier", [0.02, 0.12])
def test_noise_that_promises_nothing_says_so(multiplier: float) -> None:
    found = spent_by_agent(make_noise(multiplier), n_rounds=3, delta=DELTA)
    assert found == Spent(pld=math.inf, rdp=math.inf)


def test_tails_count_in_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = make_noise(2.0)
    assert spent_by_agent(noise, n_rounds=10, delta=DELTA).epsilon < 8.0
    monkeypatch.setattr(agent_accounting, "TAIL", 2.0**-50)  # (1 + e^7.5)·9·1000·10·2^-50 > 1e-8
    assert spent_by_agent(noise, n_rounds=10, delta=DELTA).epsilon == math.inf


def test_the_gap_counts_in_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    # At its true size, 10^-33 for each value, it does not show.
    noise, budget = make_noise(2.0), 8.0
    without = spent_by_agent(noise, n_rounds=10, delta=DELTA).epsilon
    calibrated_without = calibrated(epsilon=budget, most_noise=math.inf).share_variance
    monkeypatch.setattr(agent_accounting, "KERNEL_VARIANCE", 0.75)
    gap = 2 * 2 * 2 * math.exp(-2 * math.pi**2 * 0.75) * 1000 * 10
    assert gap == pytest.approx(0.0298, abs=1e-4)
    found = spent_by_agent(noise, n_rounds=10, delta=DELTA).epsilon
    assert without + gap <= found <= without + 1.5 * gap
    more = calibrated(epsilon=budget, most_noise=math.inf)
    assert more.share_variance > calibrated_without
    assert spent_by_agent(more, n_rounds=10, delta=DELTA).epsilon <= budget


def test_what_is_reserved_for_the_tails_is_no_longer_there(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = make_noise(2.0)
    half = spent_by_agent(noise, n_rounds=10, delta=DELTA / 2)
    monkeypatch.setattr(agent_accounting, "_RESERVE", 0.5)
    found = spent_by_agent(noise, n_rounds=10, delta=DELTA)
    assert found.pld == pytest.approx(half.pld, rel=2e-4)
    assert found.rdp == pytest.approx(half.rdp, rel=2e-4)


def test_fewer_honest_members_cost_more() -> None:
    def epsilon(honest: int) -> float:
        noise = AgentNoise(
            n_values=1000,
            clip_norm=1.0,
            steps_per_clip=2**16,
            share_variance=4e9,
            cohort=make_cohort(honest=honest),
        )
        return spent_by_agent(noise, n_rounds=1, delta=DELTA).epsilon

    found = [epsilon(honest) for honest in (9, 8, 4, 1)]
    assert found == sorted(found)
    # One ninth of the variance is a third of the deviation.
    alone = spent_by_agent(make_noise(math.sqrt(4e9) / 2**16), n_rounds=1, delta=DELTA).epsilon
    assert found[-1] == pytest.approx(alone, rel=1e-6)


# Calibration


@pytest.mark.parametrize(
    ("epsilon", "delta", "n_rounds", "honest", "steps"),
    [
        (8.0, 1e-5, 10, 9, 2**16),
        (2.0, 1e-5, 100, 9, 2**16),
        (1.0, 1e-7, 1, 1, 2**16),
        (30.0, 1e-3, 10, 14, 2**16),
        (8.0, 1e-5, 10, 9, 6),  # so coarse that what the discrete noise lacks shows
    ],
)
def test_calibration_finds_the_least_noise(
    epsilon: float, delta: float, n_rounds: int, honest: int, steps: int
) -> None:
    # Guarantee 1
    noise = calibrated(
        epsilon=epsilon,
        delta=delta,
        n_rounds=n_rounds,
        cohort=make_cohort(honest=honest),
        steps_per_clip=steps,
        most_noise=math.inf,
    )
    assert spent_by_agent(noise, n_rounds=n_rounds, delta=delta).epsilon <= epsilon
    less = AgentNoise(
        n_values=noise.n_values,
        clip_norm=noise.clip_norm,
        steps_per_clip=noise.steps_per_clip,
        share_variance=noise.share_variance * 0.997,
        cohort=noise.cohort,
    )
    assert spent_by_agent(less, n_rounds=n_rounds, delta=delta).epsilon > epsilon


def test_the_shares_of_more_honest_members_are_smaller() -> None:
    few, many = (
        calibrated(n_values=100, cohort=make_cohort(honest=honest)).share_variance
        for honest in (5, 10)
    )
    assert few == pytest.approx(2 * many)


def test_the_clip_norm_is_only_a_unit() -> None:
    small, large = calibrated(clip_norm=1e-3), calibrated(clip_norm=1e3)
    assert small.share_variance == large.share_variance
    assert small.step * 1e6 == pytest.approx(large.step)


def test_finer_steps_change_nothing_but_the_unit() -> None:
    coarse, fine = calibrated(steps_per_clip=2**12), calibrated(steps_per_clip=2**18)
    relative = [math.sqrt(noise.share_variance) / noise.steps_per_clip for noise in (coarse, fine)]
    assert relative[0] == pytest.approx(relative[1], rel=3e-3)
    assert relative[0] > relative[1], "rounding to coarse steps costs"


def test_a_budget_that_protects_nobody_is_refused() -> None:
    with pytest.raises(AccountingError, match=r"ε = 200.* at most \d\d.\d+ can be asked for"):
        calibrated(epsilon=200.0)


@pytest.mark.parametrize(
    "changed",
    [{"epsilon": 0.0}, {"epsilon": math.nan}, {"n_rounds": 0}, {"delta": 0.0}, {"delta": 1.0}],
)
def test_arguments_outside_their_range_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(AccountingError):
        calibrated(**changed)


def test_steps_too_coarse_for_the_noise_are_refused() -> None:
    with pytest.raises(NoiseError, match="Choose more than 2 steps"):
        calibrated(n_values=1, steps_per_clip=2)


def test_steps_too_fine_for_the_word_are_refused() -> None:
    with pytest.raises(NoiseError, match="Choose fewer than 4194304 steps"):
        calibrated(steps_per_clip=2**22, epsilon=0.5, most_noise=math.inf)


# Too many values


def test_updates_that_would_drown_are_refused_and_the_message_says_what_fits() -> None:
    # Guarantee 2
    with pytest.raises(DrownedError) as caught:
        calibrated(n_values=10_000, most_noise=1.0)
    message = str(caught.value)
    assert "10000 values and 20 agents, it is 4.47 times as long" in message
    assert "up to about 499 values" in message
    assert "from about 90 agents" in message
    for way in ("rank", "modules", "only B", "more agents", "larger ε", "P1", "P3"):
        assert way in message
    assert isinstance(caught.value, ValueError)
    # What it says is true: those values fit, and that many agents would do.
    calibrated(n_values=499, most_noise=1.0)
    with pytest.raises(DrownedError):
        calibrated(n_values=500, most_noise=1.0)
    calibrated(n_values=10_000, cohort=make_cohort(90, 41), most_noise=1.0)
    with pytest.raises(DrownedError, match="10 is the limit"):
        calibrated(n_values=100_000)  # by default


def test_a_limit_of_ones_own_may_be_set() -> None:
    noise = calibrated(n_values=10_000, most_noise=5.0)
    assert drowning(noise, n_rounds=10) == pytest.approx(4.475, abs=0.001)
    with pytest.raises(DrownedError, match=r"4.4 is the limit"):
        calibrated(n_values=10_000, most_noise=4.4)


def test_drowning_is_the_noise_of_the_run_over_the_longest_sum_of_means() -> None:
    noise = make_noise(3.0, honest=9, n_values=400)
    # Of the mean of 20: √(400·9/9/20)·… = 20·(3/√9)/√20 clip norms; over 25 rounds, a fifth of it.
    assert noise.relative_noise(20) == pytest.approx(math.sqrt(20.0))
    assert drowning(noise, n_rounds=25) == pytest.approx(math.sqrt(20.0) / 5.0)


def test_the_smallest_cohort_counts() -> None:
    cohort = Cohort(min_members=10, max_members=40, n_honest=5)
    noise = calibrated(n_values=50, cohort=cohort)
    assert drowning(noise, n_rounds=4) == pytest.approx(noise.relative_noise(10) / 2.0)


# Of a manifest


def make_blocks(noise: AgentNoise, epsilon: float) -> tuple[AgentPrivacy, CellMasking]:
    cohort = noise.cohort
    privacy = AgentPrivacy(
        epsilon=epsilon,
        delta=DELTA,
        clip_norm=noise.clip_norm,
        steps_per_clip=noise.steps_per_clip,
        share_variance=noise.share_variance,
    )
    masking = CellMasking(
        word_bits=32,
        max_change=noise.clip_norm,
        clip_norm=noise.clip_norm,
        cell_target=cohort.min_members,
        min_cell=cohort.min_members,
        max_cell=cohort.max_members,
    )
    return privacy, masking


def test_a_manifest_whose_noise_does_not_keep_its_promise_is_refused() -> None:
    noise = calibrated(epsilon=8.0, n_values=100, cohort=Cohort.of_cells(20, 39))
    kept = {"n_values": 100, "n_rounds": 10}
    require_kept(*make_blocks(noise, 8.0), **kept)
    with pytest.raises(AccountingError, match=r"P2 promises ε ≤ 7.5 over 10 rounds, and .* 7.99"):
        require_kept(*make_blocks(noise, 7.5), **kept)
    with pytest.raises(AccountingError, match="fewer rounds"):
        require_kept(*make_blocks(noise, 8.0), n_values=100, n_rounds=11)
    central = CentralPrivacy(epsilon=8.0, delta=DELTA, clip_norm=1.0, noise_multiplier=1.9)
    require_kept(central, NoMasking(), **kept)
    with pytest.raises(AccountingError, match="P3 promises"):
        require_kept(central.model_copy(update={"noise_multiplier": 1.8}), NoMasking(), **kept)
    require_kept(NoPrivacy(), NoMasking(), **kept)
    with pytest.raises(AccountingError, match="at most 16777216 can be"):
        require_kept(*make_blocks(noise, 8.0), n_values=2**24 + 1, n_rounds=1)


def test_an_example_moves_the_sum_twice_as_far_as_zero() -> None:
    noise = calibrated(epsilon=8.0, n_values=100, cohort=Cohort.of_cells(20, 39))
    event = event_of_example(*make_blocks(noise, 8.0))
    once = SampledGaussian(
        noise_multiplier=2.0 * event.noise_multiplier, sampling_probability=1.0, n_steps=10
    )
    found = spent([once], delta=DELTA).epsilon
    whole = spent_by_agent(noise, n_rounds=10, delta=DELTA).epsilon
    assert whole <= found <= 1.01 * whole  # that of more values than there are
    assert spent([event] * 10, delta=DELTA).epsilon > 2 * whole
