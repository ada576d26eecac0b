"""Medians: the geometric one through inner products, the coordinate-wise ones through slices."""

from typing import Final

import numpy as np

from aggregator_server.aggregation.robust.gram import distances_to
from aggregator_server.aggregation.robust.units import (
    SLICE_BYTES,
    BoolArray,
    Float64Array,
    Units,
    slices,
)
from aggregator_server.errors import AggregationError

MAX_ITERATIONS: Final = 1000
_SMOOTHING_FRAC: Final = 1e-6
_TOLERANCE: Final = 1e-10


def geometric_median(
    gram: Float64Array, weights: Float64Array, *, max_iterations: int = MAX_ITERATIONS
) -> Float64Array:
    """The point with the least weighted sum of distances to the units, as weights over them.

    Guarantees:
        1. The result is at least 0 and sums to 1: the median lies within the units' hull.
        2. The smoothed objective never rises from one iteration to the next.
        3. Units that hold less than half of the weight move it no further than a bound set by the
           others.

    Args:
        gram: [k, k] float64 inner products of the units, k at least 1.
        weights: [k], finite, above 0; need not sum to 1.
        max_iterations: Most steps; it ends before, once no coefficient moves by 1e-10.

    Returns:
        [k] float64: the median is Σ result_i·x_i.

    Raises:
        AggregationError: Shapes that do not match, or a weight that cannot be.

    Source: Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning" (RFA),
    IEEE TSP 2022, arXiv 1912.13445, algorithm 2, the smoothed Weiszfeld iteration. We deviate: the
    smoothing is a millionth of the mean distance instead of a constant, so that scaling all
    updates scales the median; it starts at the mean and runs until it stands still.
    """
    if gram.shape != (len(weights), len(weights)) or len(weights) == 0:
        msg = f"inner products of shape {gram.shape} for {len(weights)} weights; expected k × k"
        raise AggregationError(msg)
    if not (np.isfinite(weights).all() and weights.min() > 0.0 and np.isfinite(gram).all()):
        msg = "weights of a geometric median must be above 0, and inner products finite"
        raise AggregationError(msg)
    shares = weights / weights.sum()
    point: Float64Array = shares.copy()
    distances = distances_to(gram, point)
    smoothing = _SMOOTHING_FRAC * float(shares @ distances)
    if smoothing == 0.0:
        return point  # all units are equal
    for _ in range(max_iterations):
        pulls = shares / np.maximum(distances, smoothing)
        moved = pulls / pulls.sum()
        step = float(np.abs(moved - point).max())
        point = moved
        if step < _TOLERANCE:
            break
        distances = distances_to(gram, point)
    return point


def coordinate_median(
    units: Units, kept: BoolArray, *, slice_bytes: int = SLICE_BYTES
) -> Float64Array:
    """The median of each value by itself; units count equally, as in the paper.

    Guarantees:
        1. Equals the median of all updates in memory, to the bit.
        2. Memory: the result, and three times `slice_bytes`.

    Args:
        units: The round's units.
        kept: [n] bool, at least one; these must be finite.
        slice_bytes: Most bytes of rows at a time.

    Returns:
        [n_values] float64.

    Source: Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018, arXiv 1803.01498,
    definition 1.
    """
    result = np.empty(units.n_values)
    for start, stop in slices(units, slice_bytes=slice_bytes):
        rows = units.rows(start, stop)[kept].astype(np.float64)
        result[start:stop] = np.median(rows, axis=0, overwrite_input=True)
        del rows
    return result


def trimmed_mean(
    units: Units, kept: BoolArray, *, n_trimmed: int, slice_bytes: int = SLICE_BYTES
) -> Float64Array:
    """The mean of each value without its largest and smallest; units count equally.

    Guarantees:
        1. Equals the trimmed mean of all updates in memory, but for rounding.
        2. Memory: the result, and three times `slice_bytes`.

    Args:
        units: The round's units.
        kept: [n] bool; these must be finite.
        n_trimmed: How many values go at each end; less than half of the kept.
        slice_bytes: Most bytes of rows at a time.

    Returns:
        [n_values] float64.

    Raises:
        AggregationError: Nothing would be left.

    Source: Yin et al., ICML 2018, arXiv 1803.01498, definition 2.
    """
    n_kept = int(kept.sum())
    if not 0 <= 2 * n_trimmed < n_kept:
        msg = f"{n_trimmed} values trimmed at each end of {n_kept}; expected less than half"
        raise AggregationError(msg)
    result = np.empty(units.n_values)
    for start, stop in slices(units, slice_bytes=slice_bytes):
        rows = np.sort(units.rows(start, stop)[kept], axis=0)
        rows[n_trimmed : n_kept - n_trimmed].mean(axis=0, dtype=np.float64, out=result[start:stop])
        del rows
    return result
