"""The discrete Gaussian: against exact probabilities, and against three wrong distributions."""

import math
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_mechanism import DiscreteGaussianPrivacyLoss
from hypothesis import given
from hypothesis import strategies as st

from privacy import discrete_gaussian
from privacy.discrete_gaussian import (
    MAX_VARIANCE,
    TAIL,
    DiscreteGaussian,
    alias_table,
    reach,
)
from privacy.errors import NoiseError
from privacy.noise import SecureStream

KEY = bytes(range(32))
N_VALUES = 400_000
DEVIATIONS = [0.3, 0.5, 1.0, 3.7, 64.0, 127.9, 1000.0, 2.0**16, 2.0**20, 2.0**26]
"""Blocks of one integer, up to the widest."""


def draw(deviation: float, n_values: int = N_VALUES, key: bytes = KEY) -> Any:
    return DiscreteGaussian(deviation**2).sample(n_values, SecureStream(key))


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def bins_of(deviation: float) -> tuple[Any, Any]:
    """Edges, upper ends of bins of integers, and the probability of each bin under N_Z(0, σ²)."""
    if deviation < 2000.0:
        numbers = np.arange(-math.ceil(12 * deviation) - 2, math.ceil(12 * deviation) + 3)
        shape = np.exp(-(numbers.astype(float) ** 2) / (2 * deviation**2))
        cdf_at = dict(zip(numbers.tolist(), np.cumsum(shape / shape.sum()).tolist(), strict=True))
    else:  # so wide that the middle rule is right to 1 part in σ²
        cdf_at = None
    wide = np.round(np.arange(-3.6, 3.61, 0.1) * deviation).astype(np.int64)
    edges = np.unique(wide)
    cdf = [cdf_at[e] if cdf_at else normal_cdf((e + 0.5) / deviation) for e in edges.tolist()]
    return edges, np.diff([0.0, *cdf, 1.0])


def misfit(values: Any, deviation: float) -> float:
    """How many standard deviations too large χ² is, for N_Z(0, σ²)."""
    edges, probabilities = bins_of(deviation)
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
    expected = probabilities * len(values)
    rare = expected < 20.0
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 20.0:
        counts, expected = counts[:-1], expected[:-1]
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    n_free = len(counts) - 1
    return (chi_square - n_free) / math.sqrt(2.0 * n_free)


# What is drawn


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_values_have_the_distribution_of_the_discrete_gaussian(deviation: float) -> None:
    # Guarantee 1
    values = draw(deviation)
    assert values.dtype == np.int32
    assert misfit(values, deviation) < 5.0


@pytest.mark.parametrize("deviation", DEVIATIONS)
@pytest.mark.parametrize("factor", [1.02, 1.0 / 1.02])
def test_the_test_rejects_a_scale_that_is_two_percent_wrong(
    deviation: float, factor: float
) -> None:
    assert misfit(draw(deviation * factor), deviation) > 8.0


@pytest.mark.parametrize("deviation", [0.3, 0.5])
def test_the_test_rejects_a_continuous_gaussian_that_is_rounded(deviation: float) -> None:
    normal = np.random.default_rng(0).normal(0.0, deviation, N_VALUES)
    assert misfit(np.round(normal).astype(np.int64), deviation) > 50.0


@pytest.mark.parametrize("deviation", [0.4, 1.0, 5.3, 200.0])
def test_dp_accounting_means_the_same_distribution(deviation: float) -> None:
    theirs = DiscreteGaussianPrivacyLoss(deviation)
    numbers = np.arange(-reach(deviation**2), reach(deviation**2) + 1)
    probabilities = theirs.noise_cdf(numbers) - theirs.noise_cdf(numbers - 1)
    variance = float((probabilities * numbers.astype(float) ** 2).sum())
    values = draw(deviation).astype(float)
    fourth = float((probabilities * numbers.astype(float) ** 4).sum())
    assert abs(values.var() - variance) < 5.0 * math.sqrt((fourth - variance**2) / N_VALUES)
    assert abs(values.mean()) < 5.0 * math.sqrt(variance / N_VALUES)
    ours = np.cumsum(np.bincount(values.astype(int) - numbers[0], minlength=len(numbers)))
    assert np.abs(ours / N_VALUES - theirs.noise_cdf(numbers)).max() < 2.3 / math.sqrt(N_VALUES)


@pytest.mark.parametrize("deviation", [1000.0, 2.0**16, 2.0**26])
def test_places_within_a_block_are_uniform(deviation: float) -> None:
    law = DiscreteGaussian(deviation**2)
    values = law.sample(N_VALUES, SecureStream(KEY))
    n_bins = min(law._width, 256)
    assert n_bins > 1
    counts = np.bincount((values % law._width) * n_bins // law._width, minlength=n_bins)
    chi_square = float(((counts - N_VALUES / n_bins) ** 2).sum() / (N_VALUES / n_bins))
    assert abs(chi_square - (n_bins - 1)) < 5.0 * math.sqrt(2.0 * n_bins)


@pytest.mark.parametrize("deviation", [0.7, 2.0**16])
def test_values_are_independent_of_their_neighbours(deviation: float) -> None:
    values = draw(deviation).astype(float)
    for transform in (lambda x: x, np.abs, np.sign):
        for lag in (1, 2, 8192):
            first, second = transform(values[:-lag]), transform(values[lag:])
            assert abs(np.corrcoef(first, second)[0, 1]) < 5.0 / math.sqrt(N_VALUES)


@pytest.mark.parametrize("deviation", [0.5, 2.0**16])
def test_tails_are_there(deviation: float) -> None:
    values = np.abs(draw(deviation).astype(float)) / deviation
    beyond = [float((values > k).mean()) for k in (3.0, 4.0)]
    edges = [math.floor(k * deviation) for k in (3.0, 4.0)]
    numbers = np.arange(0, math.ceil(12 * deviation) + 1)
    shape = np.exp(-(numbers.astype(float) ** 2) / (2 * deviation**2))
    total = 2 * shape.sum() - 1
    for found, edge in zip(beyond, edges, strict=True):
        exact = float(2 * shape[edge + 1 :].sum() / total)
        assert abs(found - exact) < 5.0 * math.sqrt(exact / N_VALUES)


# Exactness


def drawn_slowly(law: DiscreteGaussian, n_values: int) -> list[int]:
    """What `sample` does, one candidate after the other, in whole numbers and decimals only."""
    n_tries = n_values + n_values // 32 + 8
    words = np.frombuffer(SecureStream(KEY).take_bytes(16 * n_tries), "<u8").tolist()
    values = []
    for word, uniform in zip(words[:n_tries], words[n_tries:], strict=True):
        column, share, place = word >> 52, word >> 20 & (2**32 - 1), word % law._width
        block = column if share < law._kept[column] else int(law._alias[column])
        value = int(law._start[block]) + place
        if abs(value) <= law.reach:
            shape = (Decimal(-(value**2)) / (2 * Decimal(law.variance))).exp()
            if uniform < 2**64 * law._scale * shape / law._weights[block]:
                values.append(value)
    return values[:n_values]


@pytest.mark.parametrize("deviation", [0.3, 1.0, 60.0, 127.9, 1000.0, 2.0**20, 2.0**26])
def test_a_slow_reading_of_the_method_gives_the_same_values(deviation: float) -> None:
    law = DiscreteGaussian(deviation**2)
    with localcontext(Context(prec=60)):
        slow = drawn_slowly(law, 8000)
    assert law.sample(8000, SecureStream(KEY)).tolist() == slow


class FakeWords(SecureStream):
    """Gives these words once."""

    def __init__(self, *words: int) -> None:
        super().__init__(KEY)
        self.words = b"".join(word.to_bytes(8, "little") for word in words)

    def take_bytes(self, n_bytes: int) -> bytes:
        assert n_bytes == len(self.words)
        return self.words


def test_the_border_in_a_column_is_where_its_item_says() -> None:
    law = DiscreteGaussian(50.0**2)
    column = next(c for c in range(4096) if law._kept[c] > 0 and law._weights[c] > 2**20)
    own, other = int(law._start[column]), int(law._start[law._alias[column]])
    border = int(law._kept[column])
    for share, expected in ((border - 1, own), (border, other), (0, own), (2**32 - 1, other)):
        word = column << 52 | share << 20
        assert law._candidates(1, FakeWords(word, 0)).tolist() == [expected]


class FakeStream(SecureStream):
    """Gives the bytes that it is told to, and no more."""

    def __init__(self, *words: int) -> None:
        super().__init__(KEY)
        self.words = list(words)

    def take_bytes(self, n_bytes: int) -> bytes:
        assert n_bytes == 8
        return self.words.pop(0).to_bytes(8, "little")


def test_what_is_beyond_the_reach_is_never_kept() -> None:
    law = DiscreteGaussian(1000.0**2)
    edge = next(block for block in range(len(law._weights)) if law._surely[block] == 0)
    values = np.array([-law.reach - 1, -law.reach, law.reach, law.reach + 1])
    uniform, blocks = np.zeros(4, np.uint64), np.full(4, edge)
    # What is at the reach has a probability below 2^-64, so each takes one word more.
    kept = law._decide(values, uniform, blocks, FakeStream(0, 0))
    assert kept.tolist() == [False, True, True, False]


@pytest.mark.parametrize("deviation", [0.5, 60.0, 1000.0, 2.0**20])
def test_shortcuts_change_nothing(deviation: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tables and float64 decide exactly what decimal arithmetic decides, only faster.
    expected = draw(deviation, 20_000)
    law = DiscreteGaussian(deviation**2)
    law._surely[:] = 0
    law._perhaps[:] = 2**64 - 1
    assert np.array_equal(law.sample(20_000, SecureStream(KEY)), expected)
    monkeypatch.setattr(discrete_gaussian, "_FLOAT_SLACK", 2.0)
    few = DiscreteGaussian(deviation**2).sample(20_000, SecureStream(KEY))
    assert np.array_equal(few, expected)
    all_exact = law.sample(2000, SecureStream(KEY))
    monkeypatch.undo()
    assert np.array_equal(all_exact, draw(deviation, 2000))


@pytest.mark.parametrize("value", [0, 3, -3, 40])
def test_a_number_that_begins_as_the_probability_does_is_compared_further(value: int) -> None:
    law = DiscreteGaussian(25.3)
    weight = law._weights[-law._start[0] + value]
    with localcontext(Context(prec=200)):
        exponent = Decimal(-(value**2)) / (2 * Decimal(law.variance))
        probability = Decimal(law._scale) / weight * exponent.exp()
        bits = int(probability * 2**192)
    first, second, third = bits >> 128, bits >> 64 & (2**64 - 1), bits & (2**64 - 1)

    def decide(uniform: int, *more: int) -> bool:
        stream = FakeStream(*more)
        found = law._decide_exactly(value, uniform, weight, stream)
        assert not stream.words
        return found

    assert decide(first - 1)
    assert not decide(first + 1)
    assert decide(first, second - 1)
    assert not decide(first, second + 1)
    assert decide(first, second, third - 1)
    assert not decide(first, second, third + 1)


@pytest.mark.parametrize("deviation", [0.01, 0.3, 1.0, 64.0, 127.9, 128.0, 1000.0, 2.0**26.4])
def test_tables_bound_what_they_stand_for(deviation: float) -> None:
    law = DiscreteGaussian(deviation**2)
    n_blocks = len(law._weights) - 1
    assert sum(law._weights) == 2**44
    assert min(law._weights[:-1]) >= 1
    assert law._start[0] <= -law.reach
    assert law._start[n_blocks - 1] + law._width > law.reach
    random = np.random.default_rng(1)
    with localcontext(Context(prec=80)):
        edges = [0, 1, n_blocks - 2, n_blocks - 1]
        for block in [*edges, *random.choice(n_blocks, min(n_blocks, 200)).tolist()]:
            start = int(law._start[block])
            inside = random.integers(0, law._width, 3).tolist()
            for value in (start, start + law._width - 1, *(start + at for at in inside)):
                shape = (Decimal(-(value**2)) / (2 * Decimal(law.variance))).exp()
                scaled = 2**64 * law._scale * shape / law._weights[block]
                assert scaled <= 2**64, "kept more often than always"
                assert scaled < int(law._perhaps[block]) + 1
                if abs(value) <= law.reach:
                    assert int(law._surely[block]) <= scaled
                else:
                    assert law._surely[block] == 0, "what is beyond the reach could be kept"
    assert law._surely[n_blocks] == 0
    assert law._start[n_blocks] > law.reach
    # And they do decide: all but a few percent of what is drawn.
    weights = np.array(law._weights[:-1], float)
    open_share = (law._perhaps[:n_blocks] - law._surely[:n_blocks]).astype(float) * 2.0**-64
    assert float((weights * open_share).sum() / 2**44) < (0.02 if law._width > 1 else 1e-9)


@given(st.data())
def test_an_alias_table_gives_each_item_its_weight(data: st.DataObject) -> None:
    # Guarantee 1
    n_columns, column = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 100))
    n_items = data.draw(st.integers(1, n_columns))
    total = n_columns * column
    cuts = sorted(
        data.draw(st.lists(st.integers(0, total), min_size=n_items - 1, max_size=n_items - 1))
    )
    weights = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    kept, alias = alias_table(weights, n_columns=n_columns, column=column)
    found = [0] * n_columns
    for item, (own, other) in enumerate(zip(kept, alias, strict=True)):
        assert 0 <= own < column
        found[item] += own
        found[other] += column - own
    assert found == [*weights, *[0] * (n_columns - n_items)]


@pytest.mark.parametrize("deviation", [0.05, 0.3, 0.5, 1.0, 7.0, 50.0])
def test_what_lies_beyond_the_reach_is_next_to_impossible(deviation: float) -> None:
    law_reach = reach(deviation**2)
    with localcontext(Context(prec=60)):
        variance = Decimal(deviation**2)
        shapes = [
            (Decimal(-k * k) / (2 * variance)).exp()
            for k in range(law_reach + int(30 * deviation) + 9)
        ]
        tail = 2 * sum(shapes[law_reach + 1 :]) / (2 * sum(shapes) - 1)
        assert Fraction(tail) <= Fraction(TAIL)
    assert law_reach <= 13.4 * deviation


def test_the_reach_fits_a_signed_word() -> None:
    assert reach(MAX_VARIANCE) < 2**31


# Use


def test_equal_keys_give_equal_values_everywhere() -> None:
    # Guarantee 2: these come out on every machine.
    assert draw(1.5, 12).tolist() == [1, 0, 2, -1, 1, 0, -1, -1, -3, -1, 1, 2]
    assert draw(2.0**16, 6).tolist() == [51442, -7255, 74224, 125606, 34830, 9224]


def test_another_key_gives_other_values() -> None:
    assert not np.array_equal(draw(50.0, 100), draw(50.0, 100, bytes(32)))


def test_a_stream_goes_on_and_never_repeats() -> None:
    law, stream = DiscreteGaussian(1e6), SecureStream(KEY)
    first, second = law.sample(1000, stream), law.sample(1000, stream)
    assert np.array_equal(first, draw(1000.0, 1000))
    assert len(np.intersect1d(first, second)) < 300


@pytest.mark.parametrize("n_values", [0, 1, 2, 16_383, 16_384, 16_385, 40_000])
def test_every_place_is_filled(n_values: int) -> None:
    values = draw(2.0**20, n_values)
    assert values.shape == (n_values,)
    assert (values == 0).sum() <= 1
    assert len(np.unique(values)) > 0.95 * n_values - 1


@pytest.mark.parametrize("variance", [5e-324, 1e-300, 1e-9, 1e-3])
def test_almost_no_noise_is_none(variance: float) -> None:
    law = DiscreteGaussian(variance)
    assert law.reach == 0
    assert not law.sample(1000, SecureStream(KEY)).any()


def test_the_widest_is_possible() -> None:
    values = DiscreteGaussian(MAX_VARIANCE).sample(N_VALUES, SecureStream(KEY))
    assert misfit(values, math.sqrt(MAX_VARIANCE)) < 5.0


@pytest.mark.parametrize(
    "variance", [0.0, -1.0, math.nan, math.inf, math.nextafter(MAX_VARIANCE, math.inf)]
)
def test_a_variance_that_is_none_is_refused(variance: float) -> None:
    with pytest.raises(NoiseError, match=r"a variance of .* above 0 and at most 9.0072e\+15"):
        DiscreteGaussian(variance)


def test_the_context_of_a_caller_does_not_matter() -> None:
    with localcontext(Context(prec=3, rounding="ROUND_UP")):
        coarse = draw(1000.0, 1000)
    assert np.array_equal(coarse, draw(1000.0, 1000))
