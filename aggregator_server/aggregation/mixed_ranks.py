"""Agents of different ranks in one sum: updates padded with zeros, and a weight for each rank row.

Row i of A and column i of B are rank row i. An agent of rank r trains the rows below r; the others
are zero in its padded update, and zero in its row weights. Both are sums over agents, so both may
travel under masks, and a row is divided by the weight of those who have it:

    mean of row i = Σ_k w_k x_k,i / Σ_{k has i} w_k

All agents must use one scale s whatever their rank (alpha_k = s·rank_k), or their rows would not
mean the same. Dividing every row by the total weight instead gives the zero-padding mean, in which
rows that few agents have move little.

Source: padding, HetLoRA (Cho et al.), arXiv 2401.06432, whose weights by the norm of each agent's
product a server of masked updates cannot know; rows over those who have them, RBLA, arXiv
2408.08699. Here over updates instead of adapters, and as two sums.
"""

from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from aggregator_server.errors import AggregationError
from privacy.updates import CellSum, PlainUpdate
from protocol.layout import TensorSlot, VectorLayout
from protocol.manifest import Factor
from quant.adapter import factor_of

Float32Array = NDArray[np.float32]
_Float = TypeVar("_Float", bound=np.floating)
_RANK_AXIS: Final = {Factor.A: 0, Factor.B: 1}


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedSum:
    """A weighted sum of padded updates; of one agent, or of any number of them."""

    weighted_sum: Float32Array
    """Σ w·x over the members, [n_values] float32 in the layout of the highest rank."""
    row_weights: NDArray[np.int64]
    """Σ w over the members that have the rank row, [max_rank]."""


def pad(update: PlainUpdate, layout: VectorLayout, padded: VectorLayout) -> PaddedSum:
    """One agent's update, as its addend of a sum over mixed ranks.

    Guarantees:
        1. Linear: the sum of padded updates is the padded sum.
        2. `crop` of the vector is w·update, bit for bit.

    Args:
        update: In the layout of the agent's own rank.
        layout: Of its own rank.
        padded: Of the highest rank; the same tensors otherwise.

    Raises:
        AggregationError: Layouts that do not fit, a weight below 1, or an update of another
            length.
        quant.errors.AdapterError: A name that is not of a LoRA factor.
    """
    rank = _fitting_rank(layout, padded)
    if update.vector.shape != (layout.n_values,) or update.weight < 1:
        msg = (
            f"an update of {update.vector.shape} values and weight {update.weight}; "
            f"expected ({layout.n_values},) and at least 1"
        )
        raise AggregationError(msg)
    weighted = CellSum.of_plain(update).weighted_sum
    vector = np.zeros(padded.n_values, np.float32)
    for (slot, small), (wide, large) in zip(layout.slices(), padded.slices(), strict=True):
        _by_row(vector[large], wide)[:rank] = _by_row(weighted[small], slot)
    row_weights = np.zeros(rank_of(padded), np.int64)
    row_weights[:rank] = update.weight
    return PaddedSum(weighted_sum=vector, row_weights=row_weights)


def crop(vector: Float32Array, layout: VectorLayout, padded: VectorLayout) -> Float32Array:
    """What an agent of a lower rank takes of a padded vector: its rank rows.

    Args:
        vector: [n_values] float32 in the padded layout.
        layout: Of the agent's own rank.
        padded: Of the highest rank.

    Returns:
        [n_values] float32 in `layout`.

    Raises:
        AggregationError: Layouts that do not fit, or a vector of another length.
        quant.errors.AdapterError: A name that is not of a LoRA factor.
    """
    rank = _fitting_rank(layout, padded)
    _check_length(vector, padded)
    small = np.empty(layout.n_values, np.float32)
    for (slot, where), (wide, large) in zip(layout.slices(), padded.slices(), strict=True):
        _by_row(small[where], slot)[...] = _by_row(vector[large], wide)[:rank]
    return small


def mean_of_padded(
    weighted_sum: NDArray[np.floating], row_weights: NDArray[np.int64], padded: VectorLayout
) -> NDArray[np.float64]:
    """The mean update over mixed ranks, each rank row over the agents that have it.

    Guarantees:
        1. Depends on the sums alone, so it works on masked ones, however agents were grouped.
        2. Where all agents have the highest rank it is the weighted mean (FedAvg).
        3. A row that no agent has is zero: the global adapter keeps it as it was.

    Args:
        weighted_sum: Σ w·x, [n_values] in the padded layout. An agent that adds to rows which its
            weights do not count is not seen in a sum; what it adds where nobody counts is dropped.
        row_weights: Σ w of those who have the row, [max_rank].
        padded: Layout of the highest rank.

    Returns:
        [n_values] float64.

    Raises:
        AggregationError: Other lengths, a weight that is negative or grows with the row, no
            weight at all, or a mean that is not finite.
        quant.errors.AdapterError: A name that is not of a LoRA factor.
    """
    _check_length(weighted_sum, padded)
    rank = rank_of(padded)
    if row_weights.shape != (rank,):
        msg = f"{row_weights.shape} row weights; the layout has rank {rank}"
        raise AggregationError(msg)
    if row_weights[0] < 1 or row_weights[-1] < 0 or (np.diff(row_weights) > 0).any():
        msg = (
            f"row weights {row_weights.tolist()}: the first must be at least 1, and who has a row "
            "has all before it"
        )
        raise AggregationError(msg)
    mean = weighted_sum.astype(np.float64)
    n_held = np.count_nonzero(row_weights)
    for slot, where in padded.slices():
        rows = _by_row(mean[where], slot)
        rows[:n_held] /= row_weights[:n_held, None]
        rows[n_held:] = 0.0
    if not np.isfinite(mean).all():
        msg = "the mean update has values that are not finite"
        raise AggregationError(msg)
    return mean


def rank_of(layout: VectorLayout) -> int:
    """The rank that all tensors of a layout have.

    Raises:
        AggregationError: Several ranks, or a tensor that is no matrix.
        quant.errors.AdapterError: A name that is not of a LoRA factor.
    """
    if any(len(slot.shape) != 2 for slot in layout.slots):
        msg = "a LoRA factor is a matrix"
        raise AggregationError(msg)
    ranks = {slot.shape[_RANK_AXIS[factor_of(slot.name)]] for slot in layout.slots}
    if len(ranks) > 1:
        msg = f"one rank in all modules is needed, not {sorted(ranks)}"
        raise AggregationError(msg)
    return ranks.pop()


def _fitting_rank(layout: VectorLayout, padded: VectorLayout) -> int:
    rank, highest = rank_of(layout), rank_of(padded)
    if rank > highest or [_outer(slot) for slot in layout.slots] != [
        _outer(slot) for slot in padded.slots
    ]:
        msg = (
            f"an adapter of rank {rank} and {len(layout)} tensors does not fit in one of rank "
            f"{highest} and {len(padded)} tensors"
        )
        raise AggregationError(msg)
    return rank


def _outer(slot: TensorSlot) -> tuple[str, int]:
    """A tensor's name, and its side that is not the rank."""
    return slot.name, slot.shape[1 - _RANK_AXIS[factor_of(slot.name)]]


def _by_row(values: NDArray[_Float], slot: TensorSlot) -> NDArray[_Float]:
    """A view of one tensor's values as [rank, the other side]: A, or B transposed."""
    matrix = values.reshape(slot.shape)
    return matrix if factor_of(slot.name) is Factor.A else matrix.T


def _check_length(vector: NDArray[np.floating], padded: VectorLayout) -> None:
    if vector.shape != (padded.n_values,):
        msg = f"a vector of {vector.shape} values; the layout has {padded.n_values}"
        raise AggregationError(msg)
