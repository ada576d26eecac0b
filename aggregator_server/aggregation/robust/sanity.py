"""Finite values, and sizes that other units and their tensors have too.

A broken agent, with a learning rate that exploded or weights in another unit, shows in one tensor
long before it shows in the whole norm. The factor is wide on purpose: an honest agent with unusual
data must never be removed here, and a hostile one just below the limit is the cap's business.
"""

from typing import Final

import numpy as np

from aggregator_server.aggregation.robust.units import BoolArray, Float64Array
from aggregator_server.errors import AggregationError
from privacy.updates import Float32Array, l2_norm
from protocol.layout import VectorLayout

TENSOR_FACTOR: Final = 20.0
LENGTH_FACTOR: Final = 2.0
_LENGTH_MADS: Final = 8.0
_CHUNK_VALUES: Final = 1 << 16
_LARGEST_LOG: Final = 700.0
_TINY_SQUARES: Final = 1e-24
"""Below this a float32 sum of squares of 2^31 values may have lost more than it kept."""

NOT_FINITE: Final = "its update has values that are not finite"


def tensor_norms(vector: Float32Array, layout: VectorLayout) -> Float64Array:
    """The L2 norm of each tensor of an update, in one pass and without a copy of it.

    Guarantees:
        1. Accurate to one part in 10^5 for any finite values, also where their squares leave
           float32's range.
        2. All norms are finite exactly where all values are.

    Args:
        vector: [layout.n_values] float32.
        layout: Where the tensors lie.

    Returns:
        [len(layout)] float64, in the layout's order; NaN for a tensor that is not finite.
    """
    buffer = np.empty(_CHUNK_VALUES, np.float32)
    return np.array([_norm(vector[place], buffer) for _, place in layout.slices()])


def _norm(values: Float32Array, buffer: Float32Array) -> float:
    """Squares in float32, which is four times as fast; in float64 where that cannot hold them."""
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for start in range(0, len(values), _CHUNK_VALUES):
            run = values[start : start + _CHUNK_VALUES]
            part = buffer[: len(run)]
            np.multiply(run, run, out=part)
            total += float(part.sum())
    if not _TINY_SQUARES < total < np.inf:
        return l2_norm(values)
    return float(np.sqrt(total))


def oversized_tensors(
    norms: Float64Array, layout: VectorLayout, *, factor: float = TENSOR_FACTOR
) -> dict[int, tuple[float, str]]:
    """Units with a tensor far larger than the same tensor of the other units.

    Guarantees:
        1. A unit is named exactly where a tensor's norm exceeds `factor` times its median over the
           units (the lower one of an even number), so while most units are honest, an honest one
           is named only if it is `factor` times as large as another honest one.
        2. A tensor that most units left untouched (median 0) says nothing of a scale: not judged.

    Args:
        norms: [n, len(layout)] float64, finite: `tensor_norms` of each unit.
        layout: Names of the tensors.
        factor: How many medians are too many; above 1.

    Returns:
        For each unit named, the largest ratio to the median, and the reason in words.

    Raises:
        AggregationError: Another shape, norms that are not finite, or a factor of at most 1.
    """
    if norms.ndim != 2 or norms.shape[1] != len(layout) or not np.isfinite(norms).all():
        msg = f"norms of shape {norms.shape} or not finite; expected (n, {len(layout)}) and finite"
        raise AggregationError(msg)
    if not factor > 1.0:
        msg = f"a factor of {factor} of the median norm; expected more than 1"
        raise AggregationError(msg)
    medians = np.sort(norms, axis=0)[(len(norms) - 1) // 2]
    judged: BoolArray = medians > 0.0
    ratios = np.divide(norms, medians, out=np.zeros_like(norms), where=judged)
    found = {}
    for index in np.flatnonzero((ratios > factor).any(axis=1)):
        tensor = int(np.argmax(ratios[index]))
        ratio = float(ratios[index, tensor])
        name = layout.slots[tensor].name
        reason = f"{name} is {ratio:.3g} times as large as the median; the limit is {factor:g}"
        found[int(index)] = (ratio, reason)
    return found


def oversized_units(lengths: Float64Array) -> dict[int, tuple[float, str]]:
    """Units far longer than the others, where the others are nearly of one length.

    A cap makes an update as long as others, and leaves a cell's mean in the direction of the one
    member that outgrew the rest. Where all train alike, lengths hardly differ; where agents make
    more steps the more records they have, they differ much, and the limit is as much wider.

    Guarantees:
        1. A unit is named exactly where its length exceeds the median (the lower one of an even
           number) by a factor of 2, and of e to eight times the median deviation of the log length.

    Args:
        lengths: [n] float64 norms, finite, n at least 1.

    Returns:
        For each unit named, its ratio to the median, and the reason in words.

    Raises:
        AggregationError: No length, or one that is not finite.
    """
    if lengths.size == 0 or not np.isfinite(lengths).all():
        msg = f"{lengths.size} lengths of units; expected at least one, and all finite"
        raise AggregationError(msg)
    median = float(np.sort(lengths)[(len(lengths) - 1) // 2])
    if median == 0.0:
        return {}
    ratios = lengths / median
    apart = np.abs(np.log(np.maximum(ratios, np.finfo(np.float64).tiny)))
    deviation = float(np.sort(apart)[(len(apart) - 1) // 2])
    # Beyond the largest float the limit is none; ratios are finite.
    limit = max(LENGTH_FACTOR, float(np.exp(min(_LENGTH_MADS * deviation, _LARGEST_LOG))))
    return {
        int(index): (
            float(ratios[index]),
            f"it is {ratios[index]:.3g} times as long as the median; the limit is {limit:.3g}",
        )
        for index in np.flatnonzero(ratios > limit)
    }
