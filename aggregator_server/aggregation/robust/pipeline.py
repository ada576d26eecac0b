"""The default filter, chosen by how many units there are.

| units that are finite | open mode | cells |
| --- | --- | --- |
| 8 or more | sizes, cap to the median norm, sketch, opposition, copies, weighted mean | the same, without the sizes of tensors |
| 4 to 7 | cap, geometric median; nothing removed | the same |
| 1 to 3 | cap, geometric median; nothing removed | weighted mean |

What a cell must satisfy by itself (counts, checks, its mean's norm) is judged where it is unmasked.
A unit is removed on evidence only (see `evidence`), never because it lies apart: honest agents with
data of their own do. None of this stops a bounded targeted backdoor, instructions that are poisoned
in meaning, or a third and more of the units.
"""  # noqa: E501 - a table

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from aggregator_server.aggregation.robust.caps import cap_factors, median_norm
from aggregator_server.aggregation.robust.evidence import copies, opposed
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
    oversized_units,
    tensor_norms,
)
from aggregator_server.aggregation.robust.sketch import N_DIMS, Sketcher
from aggregator_server.aggregation.robust.units import (
    BoolArray,
    Float64Array,
    Int64Array,
    Units,
    loaded,
)
from aggregator_server.errors import AggregationError
from protocol.layout import VectorLayout

MIN_FILTER_UNITS: Final = 8
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
           twice with sketches, three times with the geometric median.
        6. A finite unit is removed for its size or a tensor's, for pulling against the others, or
           as a copy of another; nothing is removed for its distance.

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
    enough = len(units.weights) >= MIN_FILTER_UNITS
    found = survey(units, layout, sketcher if enough else None)
    n_finite = int(found.finite.sum())
    if n_finite >= MIN_FILTER_UNITS:
        outcome = capped_evidence(found, layout, judge_tensors=mode is Mode.OPEN)
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


@dataclass(frozen=True, kw_only=True)
class Sized:
    """What is left once sizes are judged, capped to the median norm."""

    places: Int64Array
    """[k], the units that are left."""
    caps: Float64Array
    """[k], what they are scaled by."""
    reasons: dict[int, str]
    """Why the others are not."""
    allowance: int
    """How many of those left may be removed."""


def sized(
    found: Survey, layout: VectorLayout, *, judge_tensors: bool, judge_lengths: bool
) -> Sized:
    """Drop what is not finite, and what is out of scale, the worst of it; cap the rest.

    All removals share one allowance, a quarter of the finite units.

    Args:
        found: Of all units.
        layout: Names of the tensors.
        judge_tensors: Whether the tensors' sizes are judged.
        judge_lengths: Whether the units' lengths are.

    Raises:
        AggregationError: No unit is finite.
    """
    reasons = dropped(found)
    places = np.flatnonzero(found.finite)
    allowance = len(places) // REMOVED_DIVISOR
    oversized = oversized_units(found.lengths[places]) if judge_lengths else {}
    if judge_tensors:
        oversized |= oversized_tensors(found.norms[places], layout)
    worst_first = sorted(oversized, key=lambda place: -oversized[place][0])[:allowance]
    reasons |= {int(places[place]): oversized[place][1] for place in worst_first}
    places = np.delete(places, worst_first)
    lengths = found.lengths[places]
    return Sized(
        places=places,
        caps=cap_factors(lengths, median_norm(lengths)),
        reasons=reasons,
        allowance=allowance - len(worst_first),
    )


def capped_evidence(found: Survey, layout: VectorLayout, *, judge_tensors: bool) -> FilterOutcome:
    """Sizes, a cap to the median norm, then opposition and copies on the capped sketches.

    Args:
        found: Of all units, with sketches.
        layout: Names of the tensors.
        judge_tensors: Whether the tensors' sizes are judged.

    Raises:
        AggregationError: No unit is finite, or there are no sketches.
    """
    left = sized(found, layout, judge_tensors=judge_tensors, judge_lengths=True)
    points = sketches_of(found)[left.places] * left.caps[:, None]
    gram = points @ points.T
    against = opposed(
        gram, max_removed=left.allowance, cosine_std=1.0 / float(np.sqrt(points.shape[1]))
    )
    n_opposed = int(against.removed.sum())
    rest = np.flatnonzero(~against.removed)
    again = rest[copies(gram[np.ix_(rest, rest)], max_removed=left.allowance - n_opposed)]
    reasons = dict(left.reasons)
    for index in np.flatnonzero(against.removed):
        reasons[int(left.places[index])] = (
            "it pulls against what the others have in common, "
            f"{-against.pulls[index]:.3g} times as hard as the median unit pulls with it"
        )
    for index in again:
        reasons[int(left.places[index])] = (
            "it is nearly the same as another one, as no two trainings are"
        )
    return verdict(Rule.CAPPED_EVIDENCE, found, left, reasons=reasons, scores=against.pulls)


def verdict(
    rule: Rule, found: Survey, left: Sized, *, reasons: dict[int, str], scores: Float64Array
) -> FilterOutcome:
    """The outcome of a rule that removes some of the capped units.

    Args:
        rule: Which.
        found: Of all units.
        left: What it was chosen from.
        reasons: For each unit that is not kept.
        scores: [k], of those that were left.
    """
    kept = found.finite
    kept[list(reasons)] = False
    factors, all_scores = np.zeros(len(kept)), uncounted(len(kept))
    factors[left.places] = left.caps
    all_scores[left.places] = scores
    return FilterOutcome(
        rule=rule,
        kept=kept,
        factors=np.where(kept, factors, 0.0),
        reasons=reasons,
        scores=all_scores,
    )


def sketches_of(found: Survey) -> Float64Array:
    """The sketches of all units, [n, n_dims].

    Raises:
        AggregationError: The survey made none.
    """
    if found.sketches is None:
        msg = "the rule wants the units' sketches, and the survey made none"
        raise AggregationError(msg)
    return found.sketches


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
