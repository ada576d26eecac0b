"""The default filter, chosen by how many units there are.

| units that are finite | open mode | cells |
| --- | --- | --- |
| 8 or more | tensors' sizes, cap to the median norm, sketch, DnC, weighted mean | the same without tensors' sizes |
| 4 to 7 | cap, geometric median; nothing removed | the same |
| 1 to 3 | cap, geometric median; nothing removed | weighted mean |

What a cell must satisfy by itself (counts, checks, its mean's norm) is judged where it is unmasked.
None of this stops a bounded targeted backdoor, instructions that are poisoned in meaning, or a
third and more of the units: that is why at most a quarter is removed, and why a gate follows.
"""  # noqa: E501 - a table

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from aggregator_server.aggregation.robust.caps import cap_factors, median_norm
from aggregator_server.aggregation.robust.dnc import spectral_filter
from aggregator_server.aggregation.robust.gram import gram_matrix
from aggregator_server.aggregation.robust.medians import geometric_median
from aggregator_server.aggregation.robust.outcome import (
    Aggregated,
    FilterOutcome,
    Rule,
    robust_mean,
    uncounted,
)
from aggregator_server.aggregation.robust.sanity import (
    NOT_FINITE,
    oversized_tensors,
    tensor_norms,
)
from aggregator_server.aggregation.robust.sketch import N_DIMS, Sketcher
from aggregator_server.aggregation.robust.units import BoolArray, Float64Array, Units, loaded
from aggregator_server.errors import AggregationError
from protocol.layout import VectorLayout

MIN_DNC_UNITS: Final = 8
MIN_MEDIAN_CELLS: Final = 4
REMOVED_DIVISOR: Final = 4
"""At most one in so many finite units is removed."""


class Mode(StrEnum):
    """What a unit is."""

    OPEN = "open"
    """One agent's update."""
    CELLS = "cells"
    """The mean of a cell whose members' updates are masked."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What one pass over the units finds."""

    norms: Float64Array
    """[n, n_tensors] float64; NaN where not finite."""
    sketches: Float64Array | None
    """[n, n_dims] float64."""

    @property
    def finite(self) -> BoolArray:
        """Which units are finite, [n] bool."""
        return np.asarray(np.isfinite(self.norms).all(axis=1))

    @property
    def lengths(self) -> Float64Array:
        """The L2 norm of each unit, [n] float64."""
        lengths: Float64Array = np.sqrt(np.square(self.norms).sum(axis=1))
        return lengths


def survey(units: Units, layout: VectorLayout, sketcher: Sketcher | None = None) -> Survey:
    """Measure all units, one in memory at a time.

    Args:
        units: The round's units.
        layout: Of their values.
        sketcher: Where sketches are wanted.

    Raises:
        AggregationError: No unit, or units of another length than the layout's.
    """
    n = len(units.weights)
    if n == 0 or units.n_values != layout.n_values:
        msg = (
            f"{n} units of {units.n_values} values; "
            f"expected at least one, of the layout's {layout.n_values}"
        )
        raise AggregationError(msg)
    norms = np.empty((n, len(layout)))
    sketches = None if sketcher is None else np.zeros((n, sketcher.n_dims))
    for index in range(n):
        vector = loaded(units, index)
        norms[index] = tensor_norms(vector, layout)
        if sketcher is not None and sketches is not None and np.isfinite(norms[index]).all():
            sketches[index] = sketcher.sketch(vector)
        del vector  # or it would stay in memory while the next one is loaded
    return Survey(norms=norms, sketches=sketches)


def run_pipeline(units: Units, *, mode: Mode, layout: VectorLayout, seed: bytes) -> Aggregated:
    """Filter a round's units by the default rule, and average what is left.

    Guarantees:
        1. A unit that is not finite is dropped; of the finite ones at most a quarter, and none
           where fewer than eight are finite.
        2. The weights of what is removed go with it.
        3. No kept unit counts with more than the median norm, except where no filter runs.
        4. Equal inputs give equal results; the order of the units changes no verdict, but for
           units of equal scores.
        5. At most one unit, or `SLICE_BYTES` of all, is in memory at a time; units are read
           twice with DnC, three times with the geometric median.

    Args:
        units: The round's units.
        mode: What a unit is.
        layout: Of the values.
        seed: 32 bytes, drawn after the uploads were closed.

    Raises:
        AggregationError: No finite unit, units that do not fit the layout, a seed of another
            length, or a mean that is not finite.
    """
    sketcher = Sketcher(seed, n_values=layout.n_values, n_dims=N_DIMS)
    enough = len(units.weights) >= MIN_DNC_UNITS
    found = survey(units, layout, sketcher if enough else None)
    n_finite = int(found.finite.sum())
    if n_finite >= MIN_DNC_UNITS:
        outcome = capped_dnc(found, layout, seed=seed, judge_tensors=mode is Mode.OPEN)
    elif mode is Mode.OPEN or n_finite >= MIN_MEDIAN_CELLS:
        outcome = capped_geometric_median(units, found)
    else:
        outcome = plain(found)
    return Aggregated(mean=robust_mean(units, outcome.kept, outcome.factors), outcome=outcome)


def dropped(found: Survey) -> dict[int, str]:
    """The reason for each unit that is not finite.

    Raises:
        AggregationError: No unit is finite.
    """
    if not found.finite.any():
        msg = f"none of the {len(found.norms)} units is finite: there is nothing to average"
        raise AggregationError(msg)
    return {int(index): NOT_FINITE for index in np.flatnonzero(~found.finite)}


def plain(found: Survey) -> FilterOutcome:
    """No filter: all that is finite counts as it is."""
    reasons = dropped(found)
    finite = found.finite
    return FilterOutcome(
        rule=Rule.MEAN,
        kept=finite,
        factors=finite.astype(np.float64),
        reasons=reasons,
        scores=uncounted(len(finite)),
    )


def capped_dnc(
    found: Survey, layout: VectorLayout, *, seed: bytes, judge_tensors: bool
) -> FilterOutcome:
    """Tensors' sizes, a cap to the median norm, then DnC on the capped sketches.

    Both removals share one allowance, a quarter of the finite units: units of oversized tensors
    go first, the worst of them where there are too many. Those that stay are capped like all.

    Args:
        found: Of all units, with sketches.
        layout: Names of the tensors.
        seed: Of the coordinate subsets.
        judge_tensors: Whether the tensors' sizes are judged.

    Raises:
        AggregationError: No unit is finite, or there are no sketches.
    """
    reasons = dropped(found)
    kept = found.finite
    if found.sketches is None:
        msg = "DnC wants the units' sketches, and the survey made none"
        raise AggregationError(msg)
    allowance = int(kept.sum()) // REMOVED_DIVISOR
    scores = uncounted(len(kept))
    if judge_tensors:
        places = np.flatnonzero(kept)
        oversized = oversized_tensors(found.norms[kept], layout)
        worst_first = sorted(oversized, key=lambda place: -oversized[place][0])
        for place in worst_first[:allowance]:
            reasons[int(places[place])] = oversized[place][1]
            kept[places[place]] = False
            allowance -= 1
    places = np.flatnonzero(kept)
    lengths = found.lengths[kept]
    caps = cap_factors(lengths, median_norm(lengths))
    verdict = spectral_filter(
        found.sketches[kept] * caps[:, None], max_removed=allowance, seed=seed
    )
    scores[places] = verdict.scores
    for place in places[verdict.removed]:
        reasons[int(place)] = (
            f"along the direction in which the units differ most, its squared distance is "
            f"{scores[place]:.3g} times the mean of all"
        )
    factors = np.zeros(len(kept))
    factors[places] = np.where(verdict.removed, 0.0, caps)
    kept[places[verdict.removed]] = False
    return FilterOutcome(
        rule=Rule.CAPPED_DNC, kept=kept, factors=factors, reasons=reasons, scores=scores
    )


def capped_geometric_median(units: Units, found: Survey) -> FilterOutcome:
    """The geometric median of the updates, capped to their median norm; nothing is removed.

    In it a unit's weight counts up to the median weight (the lower one of an even number): a weight
    is its agent's own claim, and whoever held half of them would be the median alone.

    Args:
        units: The round's units.
        found: Of all units.

    Raises:
        AggregationError: No unit is finite.
    """
    reasons = dropped(found)
    kept = found.finite
    lengths = found.lengths[kept]
    caps = cap_factors(lengths, median_norm(lengths))
    weights = units.weights[kept].astype(np.float64)
    gram = gram_matrix(units, kept) * caps * caps[:, None]
    shares = geometric_median(gram, np.minimum(weights, median_norm(weights)))
    factors = np.zeros(len(kept))
    factors[kept] = as_factors(shares, weights) * caps
    return FilterOutcome(
        rule=Rule.CAPPED_GEOMETRIC_MEDIAN,
        kept=kept,
        factors=factors,
        reasons=reasons,
        scores=uncounted(len(kept)),
    )


def as_factors(coefficients: Float64Array, weights: Float64Array) -> Float64Array:
    """The factors with which `robust_mean` gives Σ c·x: c·Σw / w.

    Args:
        coefficients: [k] float64.
        weights: [k] float64 FedAvg weights, above 0.
    """
    factors: Float64Array = coefficients * weights.sum() / weights
    return factors
