"""Rounding and noise of profile P2: norms that hold, sums that do not wrap, shares that add up."""

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import distributed_noise
from privacy.distributed_noise import (
    LEAST_SHARE_VARIANCE,
    AgentNoise,
    Cohort,
    largest_square,
    noisy_update,
    round_within,
    rounded_norm,
)
from privacy.errors import NoiseError, UpdateRangeError
from privacy.noise import SecureStream
from privacy.secagg.cells import colluders, threshold
from protocol.limits import MAX_CELL

KEY = bytes(range(32))
quick = settings(deadline=None, max_examples=60, derandomize=True)


def make_cohort(least: int = 20, most: int = 20, honest: int = 9) -> Cohort:
    return Cohort(min_members=least, max_members=most, n_honest=honest)


def make_noise(n_values: int = 50, **changed: Any) -> AgentNoise:
    settings: dict[str, Any] = {
        "n_values": n_values,
        "clip_norm": 1.0,
        "steps_per_clip": 1000,
        "share_variance": 1e4,
        "cohort": make_cohort(),
    }
    return AgentNoise(**(settings | changed))


def make_vector(n_values: int, norm: float, seed: int = 0) -> Any:
    vector = np.random.default_rng(seed).normal(size=n_values)
    return (vector * (norm / np.linalg.norm(vector))).astype(np.float32)


# The norm after rounding


@pytest.mark.parametrize(
    ("scaled", "n_values", "beta", "expected"),
    [
        # s²C² + d/4 + √(2 ln 1/β)·(sC + √d/2), by hand: β = e^-½ makes the root 1.
        (100.0, 400, math.exp(-0.5), math.sqrt(10_000 + 100 + 110)),
        (100.0, 400, math.exp(-2.0), math.sqrt(10_000 + 100 + 220)),
        # Where d is small, or β, the bound that nothing exceeds is the less.
        (1.0, 1, 1e-9, 2.0),
        (5.0, 4, 1e-300, 7.0),
    ],
)
def test_the_norm_is_that_of_the_paper(
    scaled: float, n_values: int, beta: float, expected: float
) -> None:
    assert rounded_norm(scaled, n_values, beta) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.9, 0.5, 0.1, 0.01])
@pytest.mark.parametrize(("n_values", "part"), [(64, 0.5), (1000, 0.5), (1000, 0.03), (9, 0.9)])
def test_few_roundings_exceed_the_norm(beta: float, n_values: int, part: float) -> None:
    # Guarantee 1; at one half, a rounded norm is on average what the bound without β says.
    vector = np.full(n_values, part)
    rounded = np.floor(vector + SecureStream(KEY).uniform(4000 * n_values).reshape(4000, n_values))
    norms = np.sqrt((rounded**2).sum(1))
    limit = rounded_norm(float(np.linalg.norm(vector)), n_values, beta)
    share = float((norms > limit).mean())
    assert share <= beta + 4.0 * math.sqrt(beta / 4000)


# Rounding


@quick
@given(
    seed=st.integers(0, 1000),
    n_values=st.integers(1, 400),
    norm=st.floats(0.0, 20.0),
    steps=st.integers(1, 300),
    beta=st.sampled_from([2.0**-40, 0.1, 0.7]),
)
def test_a_rounded_update_is_never_longer_than_the_sensitivity(
    seed: int, n_values: int, norm: float, steps: int, beta: float
) -> None:
    # Guarantee 1, for updates that are clipped and for those that are not.
    noise = make_noise(n_values, steps_per_clip=steps, clip_norm=2.0, retry_probability=beta)
    rounded = round_within(make_vector(n_values, norm, seed), noise, SecureStream(KEY))
    assert rounded.dtype == np.int32
    square = int((rounded.astype(np.int64) ** 2).sum())
    assert square <= noise.max_square <= noise.sensitivity**2
    assert np.abs(rounded).max() <= noise.amplitude
    assert math.sqrt(square) * noise.step <= noise.clip_norm + noise.step * math.sqrt(n_values)


@quick
@given(at=st.integers(0, 4), sign=st.sampled_from([-1.0, 1.0]), steps=st.integers(1, 2**22))
def test_no_value_exceeds_the_amplitude(at: int, sign: float, steps: int) -> None:
    # All of the norm in one value is the most that one can have.
    noise = make_noise(5, steps_per_clip=steps, cohort=make_cohort(1, 1, 1), clip_norm=0.3)
    vector = np.zeros(5, np.float32)
    vector[at] = sign * 1e20
    rounded = round_within(vector, noise, SecureStream(KEY))
    assert steps - 1 <= abs(int(rounded[at])) <= noise.amplitude
    assert np.sign(rounded[at]) == sign


def rounded_often(vector: Any, noise: AgentNoise, n_times: int = 3000) -> Any:
    stream = SecureStream(KEY)
    return np.array([round_within(vector, noise, stream) for _ in range(n_times)])


@pytest.mark.parametrize("norm", [0.4, 1.0])
def test_rounding_is_right_on_average(norm: float) -> None:
    # Guarantee 2
    noise, vector = make_noise(20, steps_per_clip=10), make_vector(20, norm)
    mean = rounded_often(vector, noise).mean(0) * noise.step
    assert np.abs(mean - vector).max() < 5.0 * noise.step / math.sqrt(4 * 3000)


def test_a_longer_update_is_clipped() -> None:
    noise, vector = make_noise(20, steps_per_clip=10), make_vector(20, 5.0)
    mean = rounded_often(vector, noise).mean(0) * noise.step
    assert np.abs(mean - vector / 5.0).max() < 5.0 * noise.step / math.sqrt(4 * 3000)


def test_a_rounding_that_is_too_long_is_made_anew() -> None:
    # Every value is half a step, and the bound is the average: about every second try is too long.
    noise = make_noise(64, clip_norm=4.0, steps_per_clip=4, retry_probability=1.0 - 1e-9)
    assert noise.max_square == 32
    squares = rounded_often(np.full(64, 0.5, np.float32), noise).sum(1)  # of zeros and ones
    exact = np.array([math.comb(64, k) for k in range(33)], float)
    exact /= exact.sum()
    assert squares.max() == 32, "the bound itself is allowed"
    counts = np.bincount(squares, minlength=33)
    common = exact > 0.01
    found, expected = counts[common], 3000 * exact[common]
    assert float(((found - expected) ** 2 / expected).sum()) < 40.0  # of about 10 degrees


def test_a_norm_that_no_rounding_can_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_noise, "largest_square", lambda *_args, **_named: 3)
    with pytest.raises(UpdateRangeError, match=r"1000 roundings of the update .* above 3"):
        round_within(make_vector(50, 1.0), make_noise(), SecureStream(KEY))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    vector = make_vector(50, 1.0)
    vector[7] = bad
    with pytest.raises(UpdateRangeError, match="not finite"):
        noisy_update(vector, make_noise(), SecureStream(KEY))


@pytest.mark.parametrize("shape", [(49,), (51,), (50, 1), ()])
def test_another_length_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UpdateRangeError, match="for 50 values"):
        noisy_update(np.zeros(shape, np.float32), make_noise(), SecureStream(KEY))


@pytest.mark.parametrize("n_values", [65_535, 65_536, 65_537, 140_000])
def test_long_vectors_are_rounded_in_runs(n_values: int) -> None:
    noise, vector = make_noise(n_values, steps_per_clip=2**16), make_vector(n_values, 1.0)
    rounded = round_within(vector, noise, SecureStream(KEY))
    assert np.abs(rounded * noise.step - vector).max() <= noise.step * 1.001


# Noise


def test_a_noisy_update_is_the_rounded_one_and_a_share() -> None:
    noise, vector = make_noise(100_000, steps_per_clip=2**16), make_vector(100_000, 1.0)
    rounded = round_within(vector, noise, SecureStream(KEY))
    share = noisy_update(vector, noise, SecureStream(KEY)) - rounded
    assert np.abs(share).max() <= noise.distribution.reach
    assert share.var() == pytest.approx(noise.share_variance, rel=5 * math.sqrt(2 / 100_000))
    assert abs(np.corrcoef(share, rounded)[0, 1]) < 5.0 / math.sqrt(100_000)


def test_two_noisy_updates_of_one_update_differ() -> None:
    noise, vector = make_noise(), make_vector(50, 1.0)
    first, second = (noisy_update(vector, noise, SecureStream()) for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("n_left", [9, 12, 20])
def test_shares_reach_the_target_whoever_drops_out(n_left: int) -> None:
    # Guarantee 2 of AgentNoise: 9 of 20 are honest and left, at the least.
    noise = make_noise(40_000)
    target = noise.cohort.n_honest * noise.share_variance
    stream = SecureStream(KEY)
    total = sum(noisy_update(np.zeros(40_000, np.float32), noise, stream) for _ in range(n_left))
    ratio = float(total.astype(float).var()) / target
    error = 5.0 * math.sqrt(2.0 / 40_000)
    assert ratio > 1.0 - error
    assert ratio == pytest.approx(n_left / 9, rel=error)


def test_a_share_short_of_the_target_shows() -> None:
    noise = make_noise(40_000)
    stream = SecureStream(KEY)
    total = sum(noisy_update(np.zeros(40_000, np.float32), noise, stream) for _ in range(8))
    ratio = float(total.astype(float).var()) / (9 * noise.share_variance)
    assert ratio < 1.0 - 5.0 * math.sqrt(2.0 / 40_000)


def test_the_mean_of_a_cohort_is_that_of_its_updates_but_for_the_noise() -> None:
    noise = make_noise(2000, steps_per_clip=2**16)
    updates = [make_vector(2000, 1.0, seed) for seed in range(20)]
    stream = SecureStream(KEY)
    words = sum(noisy_update(u, noise, stream).view(np.uint32) for u in updates)  # modulo 2^32
    assert words.dtype == np.uint32
    mean = words.view(np.int32) * (noise.step / 20)
    error = mean - np.mean(updates, axis=0)
    assert np.linalg.norm(error) == pytest.approx(noise.relative_noise(20), rel=0.1)


# No wrap


@quick
@given(
    members=st.integers(1, 1000),
    steps=st.integers(1, 2**22),
    deviation=st.floats(4.0, 2.0**26),
    n_values=st.integers(1, 10**6),
)
def test_no_sum_wraps(members: int, steps: int, deviation: float, n_values: int) -> None:
    # Guarantee 1 of AgentNoise
    longest = members * (steps + 2 + distributed_noise.reach(deviation**2))
    allowed = nullcontext() if longest <= 2**31 - 1 else pytest.raises(NoiseError, match="wrap")
    with allowed:
        make_noise(
            n_values,
            steps_per_clip=steps,
            share_variance=deviation**2,
            cohort=make_cohort(1, members, 1),
        )


def test_the_largest_noise_that_fits_does_not_wrap() -> None:
    # m·(A + 1 + reach) to the last step: 4·(A + 1 + reach) is 2^31 − 4 and not one more.
    reach = 2**29 - 1 - 1 - 1001
    low, high = 1.0, 2.0**53
    while math.nextafter(low, high) < high:
        middle = (low + high) / 2.0
        fits = distributed_noise.reach(middle) <= reach
        low, high = (middle, high) if fits else (low, middle)
    cohort = make_cohort(4, 4, 1)
    noise = make_noise(share_variance=low, cohort=cohort)
    extreme = np.full(4, noise.amplitude + reach, np.int32)
    assert int(extreme.sum(dtype=np.int32)) == 4 * (noise.amplitude + reach) <= 2**31 - 1
    with pytest.raises(NoiseError, match=r"would wrap .* fewer than 1000 steps"):
        make_noise(share_variance=high, cohort=cohort)


# Refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_values": 0}, "0 values"),
        ({"clip_norm": 0.0}, "clip norm of 0.0"),
        ({"clip_norm": math.inf}, "clip norm of inf"),
        ({"clip_norm": math.nan}, "clip norm of nan"),
        ({"steps_per_clip": 0}, "0 steps"),
        ({"steps_per_clip": 2**22 + 1}, "from 1 to 4194304"),
        ({"share_variance": 15.9}, "Choose more than 1000 steps"),
        ({"share_variance": 0.0}, "variance of 0.0"),
        ({"share_variance": math.nan}, "variance of nan"),
        ({"retry_probability": 0.0}, "retry probability of 0.0"),
        ({"retry_probability": 1.0}, "retry probability of 1.0"),
    ],
)
def test_noise_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(NoiseError, match=message) as caught:
        make_noise(**changed)
    assert isinstance(caught.value, ValueError)


def test_the_least_share_is_allowed() -> None:
    assert make_noise(share_variance=LEAST_SHARE_VARIANCE).distribution.reach == 53


@pytest.mark.parametrize("numbers", [(20, 20, 0), (20, 20, 21), (20, 19, 9), (0, 5, 0)])
def test_a_cohort_that_cannot_be_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(NoiseError, match="honest among"):
        make_cohort(*numbers)


@pytest.mark.parametrize(
    ("least", "most", "wanted", "honest"),
    [(5, 5, None, 3), (20, 20, None, 9), (20, 20, 6, 8), (32, 32, None, 14), (5, 32, None, 3)],
)
def test_the_honest_of_a_cell_follow_from_its_threshold(
    least: int, most: int, wanted: int | None, honest: int
) -> None:
    assert Cohort.of_cells(least, most, wanted_colluders=wanted).n_honest == honest


@pytest.mark.parametrize("least", range(5, MAX_CELL + 1))
def test_no_cell_has_fewer_honest_members_than_its_cohort_says(least: int) -> None:
    cohort = Cohort.of_cells(least, MAX_CELL)
    for n_members in range(least, MAX_CELL + 1):
        n_colluders = colluders(n_members)
        assert threshold(n_members, n_colluders) - n_colluders >= cohort.n_honest >= 1


@pytest.mark.parametrize(("least", "most"), [(4, 10), (10, 9)])
def test_cells_that_cannot_be_are_refused(least: int, most: int) -> None:
    with pytest.raises(NoiseError, match="at least 5"):
        Cohort.of_cells(least, most)


def test_the_square_is_whole_and_the_sensitivity_no_less() -> None:
    noise = make_noise(steps_per_clip=2**16)
    assert noise.max_square == largest_square(50, 2**16)
    assert noise.max_square <= noise.sensitivity**2 < noise.max_square + 1
    assert noise.sensitivity == pytest.approx(rounded_norm(2.0**16, 50, 2.0**-40), rel=1e-8)
