"""The discrete Gaussian N_Z(0, σ²), drawn exactly and many values at a time.

It takes the integer x with a probability proportional to g(x) = exp(−x²/2σ²). Floating point would
leave traces in it by which noise can be told from value (Mironov, CCS 2012), so no value depends on
a rounded probability:

1. The integers from −`reach` to `reach` are cut into blocks of equal width, σ/128 to σ/64, or of
   one integer each. A block has an integer weight, at least S·max g over it, and the weights of all
   of them and of one block that is always refused add up to 2^44.
2. A block is drawn by its weight (Walker's alias method on integers), a place in it uniformly.
3. The candidate x is kept with the probability p = S·g(x) ÷ weight. A uniform number of 64 bits is
   compared with bounds on p from the block's table, which decides 99 % of them; then with p in
   float64 give or take far more than its error; then, about once in 10^13 values, with p in decimal
   arithmetic, with as many more random bits and digits as it takes.

Source: Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy" (arXiv
2004.00010): the distribution, and its tails (sub-Gaussian). We deviate from its sampler, exact
Bernoulli trials on a discrete Laplace, whose loops of random length do not go well with arrays.
Walker, "An efficient method for generating discrete random variables" (1977), for the blocks.
"""

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from privacy.errors import NoiseError
from privacy.noise import SecureStream

MAX_VARIANCE: Final = 2.0**53
"""For every value to fit 32 bits."""
TAIL: Final = 2.0**-128
"""At most the probability of a value beyond `reach`, which is never drawn."""

_REACH: Final = 178.9
"""At least 2·ln(2/TAIL): P(|X| ≥ m) ≤ 2·exp(−m²/2σ²)."""
_COLUMN_BITS: Final = 12
_SHARE_BITS: Final = 32
_PLACE_BITS: Final = 20
_COLUMN: Final = 1 << _SHARE_BITS
_TOTAL: Final = 1 << (_COLUMN_BITS + _SHARE_BITS)
_FINENESS: Final = 6
"""A block is at most σ/2^6 wide."""
_DIGITS: Final = 50
_TABLE_SLACK: Final = Decimal("1e-40")
"""Relative, for what the tables hold of p: far more than the error at `_DIGITS`."""
_FLOAT_SLACK: Final = 2.0**-40
"""Relative, for p in float64: x²/2σ² is at most 90, so its error is below 90·3·2^-53 < 2^-44, and
exp and two factors add a few units of 2^-53."""
_CHUNK: Final = 1 << 14
_U64: Final = 2.0**-64


def reach(variance: float) -> int:
    """The largest absolute value that is ever drawn, 13.4·σ.

    Args:
        variance: σ², above 0 and at most `MAX_VARIANCE`.

    Raises:
        NoiseError: A variance outside its range.
    """
    if not 0.0 < variance <= MAX_VARIANCE:
        raise NoiseError(
            f"a variance of {variance!r} for discrete Gaussian noise; above 0 and at most "
            f"{MAX_VARIANCE:.6g} is possible"
        )
    return math.isqrt(int(_REACH * variance))


class DiscreteGaussian:
    """N_Z(0, σ²) of one σ², with its tables (100 KiB, made in some 50 ms).

    σ² is the number that the float stands for, exactly. It is the distribution's parameter; its
    variance is a little less, by under 10^-6 of it from σ = 1.

    Guarantees:
        1. Values are independent, and each is distributed exactly as N_Z(0, σ²) conditioned on
           |x| ≤ `reach`: within `TAIL` of N_Z(0, σ²) in total variation, if the stream is uniform.
        2. Equal keys give equal values on every machine.

    What is drawn may show in how long it takes; a caller does not let others time it.

    Args:
        variance: σ², above 0 and at most `MAX_VARIANCE`.

    Raises:
        NoiseError: A variance outside its range.
    """

    def __init__(self, variance: float) -> None:
        """Make the tables."""
        self.variance = float(variance)
        self.reach = reach(self.variance)
        exponent = math.frexp(math.sqrt(self.variance))[1] - 1  # ⌊log2 σ⌋
        width = 1 << max(0, exponent - _FINENESS)
        n_side = self.reach // width + 1  # at most 13.4·128 + 1, so all fit the columns
        self._width = width
        starts = [index * width for index in range(-n_side, n_side)]
        # The smallest and the largest |x| of each block; 0 ends no block on the left side.
        nearest = [start if start >= 0 else 1 - start - width for start in starts]
        farthest = [start + width - 1 if start >= 0 else -start for start in starts]
        with localcontext(_context(_DIGITS)):
            shapes = {k: self._shape(k) for k in {*nearest, *farthest}}
            tops = [shapes[k] for k in nearest]
            self._scale = int((_TOTAL - len(starts)) / (sum(tops) * (1 + _TABLE_SLACK)))
            weights = [int(self._scale * top * (1 + _TABLE_SLACK)) + 1 for top in tops]
            surely, perhaps = [], []
            for top, far, weight in zip(tops, farthest, weights, strict=True):
                unit = Decimal(self._scale << 64) / weight
                # 0 where a block goes beyond the reach, as p is below 2^-64 there: a closer look
                # then tells what is not to be kept.
                surely.append(int(unit * shapes[far] * (1 - _TABLE_SLACK)))
                perhaps.append(min(int(unit * top * (1 + _TABLE_SLACK)), (1 << 64) - 1))
        # One more block, beyond the reach, takes what is left of the total.
        weights.append(_TOTAL - sum(weights))
        n_columns = 1 << _COLUMN_BITS
        self._weights = weights
        self._start = _padded([*starts, self.reach + 1], n_columns, np.int64)
        self._surely = _padded([*surely, 0], n_columns, np.uint64)
        self._perhaps = _padded([*perhaps, 0], n_columns, np.uint64)
        self._ratio = _padded([self._scale / weight for weight in weights[:-1]], n_columns, float)
        kept, alias = alias_table(weights, n_columns=n_columns, column=_COLUMN)
        self._kept = np.array(kept, np.uint64)
        self._alias = np.array(alias, np.intp)

    def sample(self, n_values: int, stream: SecureStream) -> NDArray[np.int32]:
        """Draw values.

        Args:
            n_values: How many, at least 0.
            stream: Of a secret key; it goes on from where it stands.

        Returns:
            [n_values] int32, each from −`reach` to `reach`.
        """
        values = np.empty(n_values, np.int32)
        n_drawn = 0
        while n_drawn < n_values:
            n_missing = n_values - n_drawn
            found = self._candidates(min(_CHUNK, n_missing + n_missing // 32 + 8), stream)
            found = found[:n_missing]
            values[n_drawn : n_drawn + len(found)] = found
            n_drawn += len(found)
        return values

    def _candidates(self, n_tries: int, stream: SecureStream) -> NDArray[np.int64]:
        """Those of some candidates that are kept, in order."""
        words: NDArray[np.uint64] = np.frombuffer(stream.take_bytes(16 * n_tries), "<u8")
        word, uniform = words[:n_tries], words[n_tries:]
        column = (word >> np.uint64(64 - _COLUMN_BITS)).astype(np.intp)
        share = (word >> np.uint64(_PLACE_BITS)) & np.uint64(_COLUMN - 1)
        block = np.where(share < self._kept[column], column, self._alias[column])
        place = (word & np.uint64(self._width - 1)).astype(np.int64)
        values: NDArray[np.int64] = self._start[block] + place
        keep = uniform < self._surely[block]
        unsure = np.flatnonzero(~keep & (uniform <= self._perhaps[block]))
        if len(unsure):
            keep[unsure] = self._decide(values[unsure], uniform[unsure], block[unsure], stream)
        return values[keep]

    def _decide(
        self,
        values: NDArray[np.int64],
        uniform: NDArray[np.uint64],
        blocks: NDArray[np.intp],
        stream: SecureStream,
    ) -> NDArray[np.bool_]:
        """Which candidates are kept, of those that the tables cannot tell."""
        size = values.astype(np.float64)
        probability = np.exp(size * size / (-2.0 * self.variance)) * self._ratio[blocks]
        number = uniform * _U64  # the uniform real number is in [number, number + 2^-64)
        within = np.abs(values) <= self.reach
        keep: NDArray[np.bool_] = within & (number + _U64 < probability * (1.0 - _FLOAT_SLACK))
        unsure = within & ~keep & (number <= probability * (1.0 + _FLOAT_SLACK))
        for at in np.flatnonzero(unsure):
            keep[at] = self._decide_exactly(
                int(values[at]), int(uniform[at]), self._weights[blocks[at]], stream
            )
        return keep

    def _decide_exactly(self, value: int, uniform: int, weight: int, stream: SecureStream) -> bool:
        """Whether a uniform real number, of which the first 64 bits are known, is below p."""
        n_bits, n_digits = 64, _DIGITS
        while True:
            with localcontext(_context(n_digits)):
                scaled = Decimal(self._scale << n_bits) / weight * self._shape(value)
                slack = scaled.scaleb(10 - n_digits)
                low, high = int(scaled - slack), int(scaled + slack)
            if uniform < low:
                return True
            if uniform > high:
                return False
            uniform = uniform << 64 | int.from_bytes(stream.take_bytes(8), "little")
            n_bits, n_digits = n_bits + 64, n_digits + 20  # 64 bits are 19.3 digits

    def _shape(self, value: int) -> Decimal:
        """The function g, in the present context; correctly rounded by decimal's specification."""
        return (Decimal(-value * value) / (2 * Decimal(self.variance))).exp()


def alias_table(
    weights: Sequence[int], *, n_columns: int, column: int
) -> tuple[list[int], list[int]]:
    """Walker's table: a uniform column, and in it the item itself or one other.

    Guarantees:
        1. Item i has exactly its weight: over all columns c, `kept[c]` where c = i, and
           `column − kept[c]` where `alias[c]` = i.

    Args:
        weights: Integers from 0, at most one for each column, that add up to all columns.
        n_columns: How many.
        column: The weight of one.

    Returns:
        For each column, what of it belongs to its own item, below `column`; and whose the rest is.
    """
    left = [*weights, *[0] * (n_columns - len(weights))]
    kept, alias = [0] * n_columns, list(range(n_columns))
    poor = [item for item, weight in enumerate(left) if weight < column]
    rich = [item for item, weight in enumerate(left) if weight >= column]
    # Each turn fills a poor column from a rich item. The weights of the columns not yet filled add
    # up to theirs, so while there is a poor one there is a rich one.
    while poor:
        item, giver = poor.pop(), rich[-1]
        kept[item], alias[item] = left[item], giver
        left[giver] -= column - left[item]
        if left[giver] < column:
            poor.append(rich.pop())
    return kept, alias  # what is rich still has one column, all of it its own: kept 0, alias itself


def _context(n_digits: int) -> Context:
    """Of our own, so that a caller's rounding or traps change nothing."""
    return Context(prec=n_digits, rounding=ROUND_HALF_EVEN, Emin=-999999, Emax=999999, traps=[])


def _padded(values: Sequence[float], length: int, dtype: Any) -> NDArray[Any]:  # noqa: ANN401
    padded = np.zeros(length, dtype)
    padded[: len(values)] = values
    return padded
