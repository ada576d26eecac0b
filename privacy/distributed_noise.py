"""Profile P2: every agent adds a share of discrete Gaussian noise, and only the noisy sum is seen.

The unit is one agent. Neighbours differ in what one agent's update is: its own, or zero (it takes
part in either case, with its share of the noise). Whoever replaces "zero" by "another update" moves
the sum twice as far. It protects against the server, against the public, and against up to c
colluding members who tell it their noise; not against the agent's own machine.

An update x is clipped to ‖x‖ ≤ C and divided by the step Δ = 1/s. Each value is rounded at random
to a neighbouring integer, all of them anew until the norm is within `AgentNoise.sensitivity`. Then
a value of N_Z(0, σ²) is added to each. The sum of a cohort has the noise of at least h honest
members, this agent among them; what is added beyond that is independent of the data, so it takes
nothing from the guarantee. The step is one for all tensors: the sensitivity is a norm over them.

Nothing wraps: m·(A + 1 + reach) ≤ 2^31 − 1, as no noise is beyond its `reach`. (Wrapping would cost
accuracy and no privacy.) What truncation at `reach` costs is part of δ in `agent_accounting`.

Source: Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation" (arXiv 2102.06387), Theorem 1: conditional rounding and its
sensitivity. We leave out the random rotation, as words of 32 bits make the step fine enough, and
let nothing wrap.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from privacy.discrete_gaussian import DiscreteGaussian, reach
from privacy.errors import NoiseError, UpdateRangeError
from privacy.noise import SecureStream
from privacy.secagg.cells import colluders, threshold
from privacy.updates import Float32Array, l2_norm
from protocol.blocks import CellMasking, MaskingBlock
from protocol.limits import MIN_CELL
from protocol.privacy import AgentPrivacy, PrivacyBlock

Int32Array = NDArray[np.int32]

LEAST_SHARE_VARIANCE: Final = 16.0
"""Of one share, in steps²: with less, that the noise is discrete begins to show in ε."""
MOST_STEPS: Final = 2**22
"""C in steps: squares of values add up in 64 bits, 2^16 of them at a time."""
RETRY_PROBABILITY: Final = 2.0**-40
"""β: how often a rounding may exceed the norm. It moves the mean by at most β·√d steps."""

_LARGEST_WORD: Final = 2**31 - 1
_ROUNDING: Final = 1e-9
"""Relative: far more than the norm of a vector clipped in floating point can exceed C by."""
_CHUNK: Final = 1 << 16
_MAX_TRIES: Final = 1000


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Who is summed in a round, at least and at most.

    Raises (at construction):
        NoiseError: Numbers that no cohort has.
    """

    min_members: int
    max_members: int
    """m of the no-wrap rule."""
    n_honest: int
    """h: of those whose noise is in an unmasked sum, at least so many follow the protocol and tell
    nobody their noise; the agent that is protected is one of them."""

    def __post_init__(self) -> None:
        """Refuse what no cohort has."""
        if not 1 <= self.n_honest <= self.min_members <= self.max_members:
            raise NoiseError(
                f"{self.n_honest} honest among {self.min_members} to {self.max_members} members; "
                "they must not be fewer than 1, nor more than the smallest cohort"
            )

    @classmethod
    def of_cells(
        cls, min_members: int, max_members: int, *, wanted_colluders: int | None = None
    ) -> "Cohort":
        """The one cell of a round by the rules of masking: h is the least t − c of all its sizes.

        Args:
            min_members: Of a cell, at least 5.
            max_members: Of a cell.
            wanted_colluders: The manifest's `colluders`.

        Raises:
            NoiseError: Sizes that no cell has.
        """
        if not MIN_CELL <= min_members <= max_members:
            raise NoiseError(
                f"a cell of {min_members} to {max_members} members; at least {MIN_CELL} are needed"
            )
        honest = []
        for n_members in range(min_members, max_members + 1):
            n_colluders = colluders(n_members, wanted=wanted_colluders)
            honest.append(threshold(n_members, n_colluders) - n_colluders)
        return cls(min_members=min_members, max_members=max_members, n_honest=min(honest))


def agent_noise(
    privacy: PrivacyBlock, masking: MaskingBlock, *, n_values: int
) -> "AgentNoise | None":
    """The noise of a manifest's agents; None where its profile is not P2.

    Args:
        privacy: The manifest's block.
        masking: The same; of cells where the profile is P2.
        n_values: Of the layout.

    Raises:
        NoiseError: The sum could wrap, or the shares are too small.
    """
    if not isinstance(privacy, AgentPrivacy) or not isinstance(masking, CellMasking):
        return None
    return noise_of(privacy, masking, n_values=n_values)


def noise_of(privacy: AgentPrivacy, masking: CellMasking, *, n_values: int) -> "AgentNoise":
    """The noise of a manifest's agents.

    Args:
        privacy: The manifest's block.
        masking: The same.
        n_values: Of the layout.

    Raises:
        NoiseError: The sum could wrap, or the shares are too small.
    """
    return AgentNoise(
        n_values=n_values,
        clip_norm=privacy.clip_norm,
        steps_per_clip=privacy.steps_per_clip,
        share_variance=privacy.share_variance,
        cohort=Cohort.of_cells(
            masking.min_cell, masking.max_cell, wanted_colluders=masking.colluders
        ),
    )


def rounded_norm(scaled_norm: float, n_values: int, retry_probability: float) -> float:
    """The norm that a vector has after random rounding, except with the probability β.

    min(sC + √d, √(s²C² + d/4 + √(2·ln(1/β))·(sC + √d/2))); the first is never exceeded.

    Guarantees:
        1. A rounding exceeds it with a probability of at most β.

    Args:
        scaled_norm: sC, the norm before, in steps.
        n_values: d.
        retry_probability: β, above 0 and below 1.

    Source: arXiv 2102.06387, Theorem 1 and the proposition on conditional randomised rounding.
    """
    root = math.sqrt(n_values)
    likely = scaled_norm**2 + n_values / 4.0
    likely += math.sqrt(-2.0 * math.log(retry_probability)) * (scaled_norm + root / 2.0)
    return min(scaled_norm + root, math.sqrt(likely))


def largest_square(
    n_values: int, steps_per_clip: int, *, retry_probability: float = RETRY_PROBABILITY
) -> int:
    """The largest squared norm that a rounded update may have, in steps²; whole, as they all are.

    Args:
        n_values: d.
        steps_per_clip: sC.
        retry_probability: β.

    Raises:
        NoiseError: An argument outside its range.
    """
    if n_values < 1:
        raise NoiseError(f"{n_values} values; noise needs at least one")
    if not 1 <= steps_per_clip <= MOST_STEPS:
        raise NoiseError(f"{steps_per_clip} steps for the clip norm; from 1 to {MOST_STEPS} can be")
    if not 0.0 < retry_probability < 1.0:
        raise NoiseError(f"a retry probability of {retry_probability} is not above 0 and below 1")
    scaled = steps_per_clip * (1.0 + _ROUNDING)
    return math.floor(rounded_norm(scaled, n_values, retry_probability) ** 2)


@dataclass(frozen=True, kw_only=True)
class AgentNoise:
    """How the agents of a federation round and add noise; equal on every machine.

    Guarantees:
        1. A sum over at most `cohort.max_members` noisy vectors fits 32 bits with its sign.
        2. The shares of `cohort.n_honest` members have a variance of at least their number times
           `share_variance`, whoever drops out (to 10^-30 of it, which tails and integers take).

    Raises (at construction):
        NoiseError: A field outside its range; a sum could wrap; or a share below
            `LEAST_SHARE_VARIANCE`.
    """

    n_values: int
    """d, of the vector of all tensors together."""
    clip_norm: float
    """C, the largest L2 norm of an update, in the units of the adapter's values."""
    steps_per_clip: int
    """sC = C/Δ."""
    share_variance: float
    """σ², the parameter of the noise of each agent, in steps²."""
    cohort: Cohort
    retry_probability: float = RETRY_PROBABILITY
    """β."""

    def __post_init__(self) -> None:
        """Refuse what would wrap, or would not protect as it is accounted for."""
        _ = self.max_square  # refuses its arguments outside their range
        if not 0.0 < self.clip_norm < math.inf:
            raise NoiseError(f"a clip norm of {self.clip_norm} is not a finite number above 0")
        n_reach = reach(self.share_variance)
        if self.share_variance < LEAST_SHARE_VARIANCE:
            raise NoiseError(
                f"a share has a variance of {self.share_variance:.4g} steps²; with less than "
                f"{LEAST_SHARE_VARIANCE:g} that it is discrete would show. Choose more than "
                f"{self.steps_per_clip} steps for the clip norm"
            )
        longest = self.cohort.max_members * (self.amplitude + 1 + n_reach)
        if longest > _LARGEST_WORD:
            raise NoiseError(
                f"the sum of {self.cohort.max_members} members with values up to {self.amplitude} "
                f"and noise up to {n_reach} would wrap a word of 32 bits: {longest} is above "
                f"{_LARGEST_WORD}. Choose fewer than {self.steps_per_clip} steps for the clip norm"
            )

    @property
    def step(self) -> float:
        """Δ, in the units of the adapter's values."""
        return self.clip_norm / self.steps_per_clip

    @property
    def amplitude(self) -> int:
        """A: no rounded value is larger, so nothing is clamped."""
        return self.steps_per_clip + 1

    @property
    def max_square(self) -> int:
        """The largest ‖e‖² of a rounded update e."""
        return largest_square(
            self.n_values, self.steps_per_clip, retry_probability=self.retry_probability
        )

    @property
    def sensitivity(self) -> float:
        """Δ₂, in steps: how far the sum moves if one update becomes zero."""
        return math.nextafter(math.sqrt(self.max_square), math.inf)

    @cached_property
    def distribution(self) -> DiscreteGaussian:
        """Of one share."""
        return DiscreteGaussian(self.share_variance)

    def relative_noise(self, n_members: int) -> float:
        """The expected norm of the noise of a mean, relative to the clip norm.

        The mean of the updates has at most 1, and less where agents disagree.

        Args:
            n_members: Whose noisy updates are averaged.
        """
        return math.sqrt(self.n_values * self.share_variance / n_members) / self.steps_per_clip

    def longest_of_mean(self, n_members: int) -> float:
        """What the noise of a mean is no longer than, but for one time in 10²¹; in units of values.

        Args:
            n_members: Whose noisy updates are averaged.
        """
        std = self.step * math.sqrt(self.share_variance / n_members)
        return std * (math.sqrt(self.n_values) + 10.0)


def round_within(vector: Float32Array, noise: AgentNoise, stream: SecureStream) -> Int32Array:
    """Clip an update and round it at random to whole steps, anew until its norm is small enough.

    It is not noisy yet, and leaves the agent only with noise: `noisy_update`.

    Guarantees:
        1. ‖e‖ ≤ `noise.sensitivity`, always; so PROTOCOL's check 15 is met too.
        2. On average over `stream`, a value is what it was, to β·√d steps and 2^-32 of one.

    Args:
        vector: [n_values] float32; unchanged.
        noise: Of the federation.
        stream: Fresh.

    Returns:
        [n_values] int32, in steps.

    Raises:
        UpdateRangeError: NaN or infinity, another length, or a norm that stayed too large.
    """
    if vector.shape != (noise.n_values,):
        raise UpdateRangeError(
            f"an update of {vector.shape}, the noise is for {noise.n_values} values"
        )
    norm = l2_norm(vector)
    if not math.isfinite(norm):
        raise UpdateRangeError("the update has values that are not finite")
    shrink = min(1.0, noise.clip_norm / norm) if norm > 0.0 else 1.0
    scale = shrink * (noise.steps_per_clip / noise.clip_norm)
    rounded = np.empty(noise.n_values, np.int32)
    for _ in range(_MAX_TRIES):
        square = 0
        for start in range(0, noise.n_values, _CHUNK):
            run = slice(start, start + _CHUNK)
            scaled = vector[run].astype(np.float64) * scale
            whole = np.floor(scaled + stream.uniform(len(scaled))).astype(np.int64)
            square += int((whole * whole).sum())
            rounded[run] = whole
        if square <= noise.max_square:
            return rounded
    raise UpdateRangeError(
        f"{_MAX_TRIES} roundings of the update all had a squared norm above {noise.max_square}; "
        f"one in {1.0 / noise.retry_probability:.3g} is expected to"
    )


def noisy_update(vector: Float32Array, noise: AgentNoise, stream: SecureStream) -> Int32Array:
    """What an agent puts under its masks: the rounded update with its share of the noise.

    It is made once for each update and stored. Two of one update, or one in two sums, would tell
    more than is accounted for. Alone, without masks, it protects h times less than in a sum.

    Guarantees:
        1. |value| ≤ `amplitude` + `distribution.reach`.

    Args:
        vector: [n_values] float32; unchanged.
        noise: Of the federation.
        stream: Fresh.

    Returns:
        [n_values] int32, in steps.

    Raises:
        UpdateRangeError: As `round_within`.
    """
    values = round_within(vector, noise, stream)
    values += noise.distribution.sample(noise.n_values, stream)
    return values
