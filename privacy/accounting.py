"""From what was released to ε: all releases in one composition, by privacy loss distributions.

A unit is what one user protects, an example or an agent. ε is for adding or removing one unit: the
neighbouring relation of everything here. ε values are never added; the releases are composed
afresh each time, once with privacy loss distributions (PLD), which give the answer, and once with
Rényi divergences (RDP), whose ε can only be larger.

Source: dp-accounting; Koskela et al., AISTATS 2020 (PLD); Doroshenko et al., PoPETs 2022 (the
grid, "connect the dots"); Mironov et al., 2019, arXiv 1908.10530 (RDP of the sampled Gaussian). We
deviate from dp-accounting in the width of the grid's cells, which follows from the composition.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Final

import numpy as np
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_gaussian_mechanism,
)
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from numpy.typing import NDArray

from privacy.errors import AccountingError

WEAK_MULTIPLIER: Final = 0.5
"""Less noise than this deserves a warning."""
LEAST_MULTIPLIER: Final = 0.03
"""Less noise than this counts as none: ε is infinite."""
MAX_MULTIPLIER: Final = 1e3
"""The most noise that `calibrate` considers."""
MAX_EPSILON: Final = 500.0
"""A larger ε, by RDP, promises nothing and counts as infinite: e^ε would leave float64's range."""
MAX_STEPS: Final = 10**6
"""The longest composition."""
LEAST_DELTA: Final = 1e-12
"""The smallest δ for 100 steps, and in proportion for more: below it stands float64's rounding."""

_PRECISION: Final = 1e-3
"""Of a calibrated multiplier, relative; and how far PLD may exceed RDP, relative and absolute."""
_ROUNDING: Final = 1e-16
"""By how much float64 may change δ, for each step: measured, at most 7e-17."""
_MOST_NOISE: Final = 1e6
_LEAST_SAMPLING: Final = 1e-6
_CELL: Final = 5e-4
"""Of the grid, for ε = 1 and up to `_N_FINE_STEPS` steps."""
_N_FINE_STEPS: Final = 400
_MAX_CELLS: Final = 1 << 17
"""For the losses of one step, on either side of 0; dp-accounting takes 10 µs for each."""
_LEAST_CELL: Final = 1e-6
"""In narrower ones, rounding adds up to probabilities that are not there."""


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """Releases of the sum over a Poisson sample of the units, each with fresh Gaussian noise.

    Raises (at construction):
        AccountingError: A field outside its range.
    """

    noise_multiplier: float
    """Standard deviation of the noise ÷ clip norm, above 0."""
    sampling_probability: float
    """Of each unit at each step, above 0; 1 takes everybody."""
    n_steps: int
    """How many releases; 0 is nothing."""

    def __post_init__(self) -> None:
        """Refuse what no mechanism can have."""
        if not 0.0 < self.noise_multiplier < math.inf:
            raise AccountingError(
                f"noise multiplier {self.noise_multiplier} is not a finite number above 0"
            )
        if not 0.0 < self.sampling_probability <= 1.0:
            raise AccountingError(
                f"sampling probability {self.sampling_probability} is not above 0 and at most 1"
            )
        if type(self.n_steps) is not int or self.n_steps < 0:
            raise AccountingError(f"{self.n_steps!r} steps; a whole number from 0 is needed")


@dataclass(frozen=True, kw_only=True)
class Spent:
    """ε of a composition by two accountants; infinite where nothing is promised."""

    pld: float
    rdp: float

    @property
    def epsilon(self) -> float:
        """The answer: PLD's, the tighter of two upper bounds."""
        return self.pld


def usual_delta(n_units: int) -> float:
    """δ for a data set of so many units: n^−1.1 (LEARNING, "Differential privacy").

    Args:
        n_units: Units in the data, at least 2.

    Raises:
        AccountingError: Fewer than 2 units.
    """
    if n_units < 2:
        raise AccountingError(f"{n_units} units; no δ protects one among fewer than 2")
    return float(n_units**-1.1)


def spent(events: Sequence[SampledGaussian], *, delta: float) -> Spent:
    """ε at δ of all events together.

    Guarantees:
        1. ε by PLD is an upper bound. With up to 10⁴ steps, and a sampling probability from 10⁻⁴,
           it is at most 0.1 % or 0.002 above the true value, whichever is larger.
        2. Neither the order of the events nor how steps are split among them matters.
        3. ε by PLD is at most ε by RDP, but for that error.

    Args:
        events: Whatever was released about the same units, in any order.
        delta: Below 1, and not below what `LEAST_DELTA` allows.

    Returns:
        0 for no events. Infinity for a multiplier below `LEAST_MULTIPLIER`, or where RDP says more
        than `MAX_EPSILON`.

    Raises:
        AccountingError: δ outside its range; more than `MAX_STEPS` steps; PLD says more than RDP,
            which would be a fault of an accountant.
    """
    if not 0.0 < delta < 1.0:
        raise AccountingError(f"δ = {delta} is not above 0 and below 1")
    n_steps = sum(event.n_steps for event in events)
    if n_steps > MAX_STEPS:
        raise AccountingError(f"{n_steps} steps are too many to compose; at most {MAX_STEPS} are")
    if any(event.n_steps and event.noise_multiplier < LEAST_MULTIPLIER for event in events):
        return Spent(pld=math.inf, rdp=math.inf)
    merged = _merged(events)
    n_steps = sum(event.n_steps for event in merged)
    least = LEAST_DELTA * max(1.0, n_steps / 100.0)
    if merged and delta < least:
        raise AccountingError(
            f"δ = {delta:g} drowns in rounding over {n_steps} steps; choose {least:g} or more"
        )
    return _composed(merged, delta)


def calibrate(
    *,
    epsilon: float,
    delta: float,
    sampling_probability: float,
    n_steps: int,
    earlier: Sequence[SampledGaussian] = (),
) -> float:
    """The least noise with which some more steps keep within a budget.

    Guarantees:
        1. With the multiplier returned, the ε of `earlier` and the steps is at most `epsilon`.
        2. With a multiplier smaller by 0.1 %, it is more, or that is less than `LEAST_MULTIPLIER`.

    Args:
        epsilon: The budget for everything, above 0.
        delta: See `spent`.
        sampling_probability: Of the steps to come.
        n_steps: How many are to come, at least 1.
        earlier: What was released before.

    Returns:
        The noise multiplier.

    Raises:
        AccountingError: An argument outside its range; `earlier` alone exceeds the budget; or the
            steps exceed it even with `MAX_MULTIPLIER`.
    """
    if not 0.0 < epsilon < math.inf:
        raise AccountingError(f"a budget of ε = {epsilon} is not a finite number above 0")
    if n_steps < 1:
        raise AccountingError(f"{n_steps} steps need no noise; at least 1 is needed")

    def total(multiplier: float) -> float:
        more = SampledGaussian(
            noise_multiplier=multiplier,
            sampling_probability=sampling_probability,
            n_steps=n_steps,
        )
        return spent([*earlier, more], delta=delta).epsilon

    before = spent(earlier, delta=delta).epsilon
    if before > epsilon:
        raise AccountingError(
            f"ε = {before:.4g} is already spent, more than the budget of {epsilon}"
        )
    low, high = LEAST_MULTIPLIER, MAX_MULTIPLIER
    least = total(high)
    if least > epsilon:
        raise AccountingError(
            f"even a noise multiplier of {high:g} gives ε = {least:.4g} over {n_steps} steps; the "
            f"budget is {epsilon}, of which {before:.4g} is spent"
        )
    while high > low * (1.0 + _PRECISION):
        middle = math.sqrt(low * high)
        if total(middle) <= epsilon:
            high = middle
        else:
            low = middle
    return high


def _merged(events: Sequence[SampledGaussian]) -> tuple[SampledGaussian, ...]:
    """The same releases in one order, equal ones as one event.

    Without sampling, steps with multipliers z_i tell exactly as much as one step of (Σ z_i⁻²)^−½.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        if event.n_steps:
            # Where a number could overflow, a little less noise or a little more sampling than
            # there was is supposed: never in favour of privacy.
            noise = min(event.noise_multiplier, _MOST_NOISE)
            probability = max(event.sampling_probability, _LEAST_SAMPLING)
            counts[probability, noise] += event.n_steps
    merged = [
        SampledGaussian(noise_multiplier=noise, sampling_probability=probability, n_steps=n_steps)
        for (probability, noise), n_steps in sorted(counts.items())
        if probability < 1.0
    ]
    precision = math.fsum(
        n_steps / noise**2 for (probability, noise), n_steps in counts.items() if probability == 1.0
    )
    if precision > 0.0:
        noise = 1.0 / math.sqrt(precision)
        merged.append(SampledGaussian(noise_multiplier=noise, sampling_probability=1.0, n_steps=1))
    return tuple(merged)


@lru_cache(maxsize=256)
def _composed(events: tuple[SampledGaussian, ...], delta: float) -> Spent:
    if not events:
        return Spent(pld=0.0, rdp=0.0)
    rdp = _epsilon_by_rdp(events, delta)
    if not rdp <= MAX_EPSILON:
        return Spent(pld=math.inf, rdp=math.inf)
    pld = _epsilon_by_pld(events, delta, _cell_width(events, rdp))
    if not pld <= rdp * (1.0 + _PRECISION) + _PRECISION:
        raise AccountingError(
            f"ε is {pld:.6g} by PLD and {rdp:.6g} by RDP, which cannot be less: one of them is "
            "wrong; please report these releases as a bug"
        )
    return Spent(pld=pld, rdp=rdp)


def _epsilon_by_rdp(events: Sequence[SampledGaussian], delta: float) -> float:
    divergences = sum(
        event.n_steps * _step_divergences(event.noise_multiplier, event.sampling_probability)
        for event in events
    )
    with _without_warnings_of_rdp():
        epsilon, _order = compute_epsilon(RdpAccountant().orders, divergences, delta)
    return float(epsilon)


def _epsilon_by_pld(events: Sequence[SampledGaussian], delta: float, cell_width: float) -> float:
    losses = [
        _step_loss(event.noise_multiplier, event.sampling_probability, cell_width).self_compose(
            event.n_steps
        )
        for event in events
    ]
    rounding = _ROUNDING * sum(event.n_steps for event in events)
    return float(reduce(lambda a, b: a.compose(b), losses).get_epsilon_for_delta(delta - rounding))


@lru_cache(maxsize=1024)
def _step_divergences(noise_multiplier: float, sampling_probability: float) -> NDArray[np.float64]:
    """Of one step, for each of RDP's orders."""
    event = PoissonSampledDpEvent(sampling_probability, GaussianDpEvent(noise_multiplier))
    with _without_warnings_of_rdp():
        divergences: NDArray[np.float64] = RdpAccountant().compose(event).rdp
    return divergences


@lru_cache(maxsize=64)  # of some 1 MB each
def _step_loss(
    noise_multiplier: float, sampling_probability: float, cell_width: float
) -> PrivacyLossDistribution:
    """Of one step, on the grid: adding a unit, and removing one."""
    return from_gaussian_mechanism(
        noise_multiplier,
        sampling_prob=sampling_probability,
        value_discretization_interval=cell_width,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def _cell_width(events: Sequence[SampledGaussian], rdp: float) -> float:
    """The width h of a cell of the grid of privacy losses; a power of two.

    Rounding to the grid is always against privacy: it adds at most h²/4 to the variance of each
    step's loss. dp-accounting's own 1e-4 suits ε near 1 and some thousand steps. It would take
    minutes and gigabytes where ε is large, and be too coarse for many steps of little loss.
    """
    n_steps = sum(event.n_steps for event in events)
    scale = min(rdp, math.sqrt(rdp))  # of the composition's loss: its spread grows as ε, then √ε
    wanted = _CELL * scale * min(1.0, math.sqrt(_N_FINE_STEPS / n_steps))
    # Ten deviations of the noise reach as far as the losses of one step do.
    reach = max(10.0 / e.noise_multiplier + 0.5 / e.noise_multiplier**2 for e in events)
    return 2.0 ** math.floor(math.log2(max(wanted, reach / _MAX_CELLS, _LEAST_CELL)))


@contextmanager
def _without_warnings_of_rdp() -> Iterator[None]:
    """Without dp-accounting's log of each order that it skips, or rounds to 0.

    Skipping one makes RDP's ε larger, never smaller. A divergence below 0 is one of 0, rounded.
    """
    logger = logging.getLogger("absl")
    logger.addFilter(_is_worth_logging)
    try:
        yield
    finally:
        logger.removeFilter(_is_worth_logging)


def _is_worth_logging(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("_compute_log_a_frac failed", "Negative Renyi"))
