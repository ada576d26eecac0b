"""P3: what the server clips, adds and may tell."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accounting import SampledGaussian, spent
from privacy.central import NoisyMean, noisy_mean, sum_multiplier
from privacy.errors import NoiseError
from privacy.noise import SecureStream
from privacy.updates import CellSum
from protocol.privacy import AdaptiveClip, CentralPrivacy

KEY = bytes(range(32))
C = 2.0
QUIET = 1e-12


def make_privacy(multiplier: float = QUIET, adaptive: AdaptiveClip | None = None) -> CentralPrivacy:
    return CentralPrivacy(
        epsilon=8.0, delta=1e-5, clip_norm=C, noise_multiplier=multiplier, adaptive=adaptive
    )


def cell(vector: np.ndarray, n_members: int = 1) -> CellSum:
    return CellSum(
        weighted_sum=np.asarray(vector, np.float32), weight_sum=n_members, n_members=n_members
    )


def mean_of(
    cells: list[CellSum],
    privacy: CentralPrivacy | None = None,
    *,
    key: bytes = KEY,
    slack: float = 0.0,
) -> NoisyMean:
    return noisy_mean(
        iter(cells),
        n_values=len(cells[0].weighted_sum),
        privacy=privacy or make_privacy(),
        clip_norm=C,
        rounding_norm=slack,
        stream=SecureStream(key),
    )


def test_the_mean_is_that_of_the_clipped_updates() -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(40) * scale for scale in (0.01, 0.2, 5.0, 1e6)]
    clipped = [v * min(1.0, C / np.linalg.norm(v)) for v in vectors]
    found = mean_of([cell(v) for v in vectors])
    np.testing.assert_allclose(found.mean, np.mean(clipped, axis=0), rtol=1e-5, atol=1e-7)
    assert (found.n_cells, found.n_agents) == (4, 4)


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.floats(-6, 30),
    n_members=st.integers(1, 40),
    seed=st.integers(0, 10_000),
)
def test_guarantee_1_one_agent_moves_the_sum_by_no_more_than_the_clip_norm(
    exponent: float, n_members: int, seed: int
) -> None:
    """In the open whatever it sends; in a cell it clips itself, among members that do not."""
    rng = np.random.default_rng(seed)
    others = [cell(rng.standard_normal(20)), cell(rng.standard_normal(20) * 1e3)]
    one = rng.standard_normal(20)
    alone = cell(one / np.linalg.norm(one) * 10.0**exponent)
    with_it, without = mean_of([*others, alone]), mean_of([*others, cell(np.zeros(20))])
    assert np.linalg.norm(with_it.mean - without.mean) * 3 <= C * (1 + 1e-9)
    rest = rng.standard_normal(20) * 10.0 ** min(exponent, 3.0)
    own = one / np.linalg.norm(one) * C
    pair = [mean_of([*others, cell(rest + x, n_members)]).mean for x in (own, np.zeros(20))]
    assert np.linalg.norm(pair[0] - pair[1]) * (2 + n_members) <= C * (1 + 1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_guarantee_3_what_is_not_finite_counts_as_zero_and_stays_in_the_divisor(bad: float) -> None:
    ones = np.full(5, 0.5)
    found = mean_of([cell(ones), cell(np.array([1.0, bad, 0.0, 0.0, 0.0]))])
    np.testing.assert_allclose(found.mean, ones / 2, rtol=1e-6)
    assert found.n_agents == 2


def test_the_noise_has_the_stated_deviation_and_is_that_of_the_sum() -> None:
    n_values, n_agents = 200_000, 7
    zero = cell(np.zeros(n_values))
    found = mean_of([zero] * n_agents, make_privacy(1.5), slack=0.25)
    std = 1.5 * (C + 0.25) / n_agents
    assert found.noise_std == pytest.approx(std)
    measured = found.mean.std()
    assert abs(measured / std - 1) < 5 / math.sqrt(2 * n_values)
    for wrong in (0.98, 1.02, 1.5 * C / n_agents / std):  # the last: rounding forgotten
        assert abs(measured / (wrong * std) - 1) > 5 / math.sqrt(2 * n_values)
    other = mean_of([zero] * n_agents, make_privacy(1.5), key=bytes(32))
    assert abs(np.corrcoef(found.mean, other.mean)[0, 1]) < 5 / math.sqrt(n_values)


def test_weights_and_lengths_that_would_break_the_bound_are_refused() -> None:
    weighted = CellSum(weighted_sum=np.zeros(3, np.float32), weight_sum=5, n_members=1)
    with pytest.raises(NoiseError, match="1 agents and weight 5; expected"):
        mean_of([cell(np.zeros(3)), weighted])
    with pytest.raises(NoiseError, match="expected \\(3,\\)"):
        mean_of([cell(np.zeros(3)), cell(np.zeros(4))])
    with pytest.raises(NoiseError, match="no cell"):
        noisy_mean(
            iter([]),
            n_values=3,
            privacy=make_privacy(),
            clip_norm=C,
            rounding_norm=0.0,
            stream=SecureStream(KEY),
        )


# The adaptive clip norm


def test_a_count_takes_its_part_of_the_budget() -> None:
    """Both sums together are one Gaussian mechanism of the round's multiplier."""
    adaptive = AdaptiveClip(count_std=3.0)
    privacy = make_privacy(1.5, adaptive)
    z = sum_multiplier(privacy)
    assert z > 1.5
    both = [
        SampledGaussian(noise_multiplier=multiplier, sampling_probability=1.0, n_steps=10)
        for multiplier in (z, 2.0 * adaptive.count_std)
    ]
    alone = SampledGaussian(noise_multiplier=1.5, sampling_probability=1.0, n_steps=10)
    together = spent(both, delta=1e-5).epsilon
    assert together == pytest.approx(spent([alone], delta=1e-5).epsilon, rel=2e-3)
    assert sum_multiplier(make_privacy(1.5)) == 1.5


@pytest.mark.parametrize(("norm", "grows"), [(10.0, True), (0.1, False)])
def test_the_clip_norm_follows_the_norms(norm: float, grows: bool) -> None:
    privacy = make_privacy(adaptive=AdaptiveClip(count_std=0.1))
    updates = [cell(np.full(4, norm / 2))] * 50
    clip_norm = C
    for round_number in range(60):
        clip_norm = noisy_mean(
            iter(updates),
            n_values=4,
            privacy=privacy,
            clip_norm=clip_norm,
            rounding_norm=0.0,
            stream=SecureStream(bytes([round_number]) * 32),
        ).next_clip_norm
    assert (clip_norm > C) is grows
    assert 0.8 < clip_norm / norm < 1.25


def test_noise_on_the_count_of_few_moves_the_norm_by_a_bounded_factor() -> None:
    privacy = make_privacy(adaptive=AdaptiveClip(count_std=1e6, learning_rate=0.2))
    factors = {
        round(mean_of([cell(np.ones(2))], privacy, key=bytes([n]) * 32).next_clip_norm / C, 3)
        for n in range(20)
    }
    assert factors == {round(math.exp(0.2), 3), round(math.exp(-0.2), 3)}


def test_a_norm_that_is_not_adaptive_stays() -> None:
    assert mean_of([cell(np.full(4, 100.0))]).next_clip_norm == C
