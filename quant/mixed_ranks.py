"""Agents that train parts of one adapter: its first rank rows, and some of its modules.

Row i of A and column i of B are rank row i. An agent of rank r trains the first r rows of a module;
of a module that it leaves out it trains none. Its update is padded with zeros to the common layout,
and says beside it which rows were trained (`participation`).

All agents use the scale s of the manifest whatever their rank, or their rows would not mean the
same in the global adapter: an agent of rank r has an α of its own, s·r.

Source: FedIT, arXiv 2305.05644, section 3.3; padding as HetLoRA, arXiv 2401.06432.
"""

from collections.abc import Mapping
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from protocol.blocks import Factor, LoraBlock
from protocol.layout import TensorSlot, VectorLayout
from quant.adapter import (
    AdapterArrays,
    Float32Array,
    factor_of,
    module_of,
)
from quant.errors import AdapterError

_Float = TypeVar("_Float", bound=np.floating)
_RANK_AXIS: Final = {Factor.A: 0, Factor.B: 1}


def own_lora(lora: LoraBlock, *, rank: int | None, left_out: tuple[str, ...]) -> LoraBlock:
    """The part of an adapter that one agent trains, as an adapter of its own with the same scale.

    Args:
        lora: The manifest's block.
        rank: How many rank rows; None: all.
        left_out: Of `lora.target_modules`, those that it does not train.

    Raises:
        AdapterError: The manifest does not allow it.
    """
    own_rank = lora.rank if rank is None else rank
    lowest = lora.rank if lora.min_rank is None else lora.min_rank
    if not lowest <= own_rank <= lora.rank:
        allowed = str(lora.rank) if lowest == lora.rank else f"{lowest} to {lora.rank}"
        msg = f"rank {own_rank}: this federation allows {allowed}"
        raise AdapterError(msg)
    refused = sorted(set(left_out) - set(lora.optional_modules))
    if refused:
        allowed = ", ".join(lora.optional_modules) or "none"
        msg = f"{refused[0]!r} cannot be left out; of this federation's modules: {allowed}"
        raise AdapterError(msg)
    return LoraBlock(
        rank=own_rank,
        alpha=lora.alpha if own_rank == lora.rank else lora.scale * own_rank,
        dropout=lora.dropout,
        target_modules=tuple(name for name in lora.target_modules if name not in left_out),
        sent=lora.sent,
        rule=lora.rule,
        init_seed=lora.init_seed,
    )


def crop(arrays: AdapterArrays, shapes: Mapping[str, tuple[int, ...]]) -> AdapterArrays:
    """An agent's part of the whole adapter: its modules, of each the first rank rows.

    Args:
        arrays: The whole adapter.
        shapes: Of the agent's own tensors.

    Raises:
        AdapterError: A tensor that the adapter has not, or not as large.
    """
    cropped: AdapterArrays = {}
    for name, shape in shapes.items():
        whole = arrays.get(name)
        if whole is None or any(mine > theirs for mine, theirs in zip(shape, whole.shape)):  # noqa: B905 - of two axes, both
            msg = f"cannot take {shape} of {name!r} from the adapter"
            raise AdapterError(msg)
        cropped[name] = np.ascontiguousarray(whole[tuple(slice(axis) for axis in shape)])
    return cropped


def pad(vector: Float32Array, own: VectorLayout, whole: VectorLayout) -> Float32Array:
    """An agent's update in the common layout: zero wherever it trained nothing.

    Guarantees:
        1. Linear, and what was trained is kept bit for bit.

    Args:
        vector: [own.n_values] float32.
        own: Layout of the agent's own tensors.
        whole: Layout of all tensors.

    Returns:
        [whole.n_values] float32.

    Raises:
        AdapterError: A vector of another length, or a tensor that does not fit.
    """
    if vector.shape != (own.n_values,):
        msg = f"a vector of {vector.shape} values; the layout has {own.n_values}"
        raise AdapterError(msg)
    places = {slot.name: (slot, where) for slot, where in whole.slices()}
    padded = np.zeros(whole.n_values, np.float32)
    for slot, where in own.slices():
        wide, large = _fitting(slot, places)
        rows = by_row(vector[where], slot)
        by_row(padded[large], wide)[: len(rows)] = rows
    return padded


def participation(own: VectorLayout, whole: VectorLayout) -> Float32Array:
    """Which rank rows of which modules an agent trains.

    Args:
        own: Layout of the agent's own tensors.
        whole: Layout of all tensors.

    Returns:
        [n_modules × rank] float32 of 0 and 1, modules in the order of `modules_of`.

    Raises:
        AdapterError: A tensor that does not fit.
    """
    places = {slot.name: (slot, where) for slot, where in whole.slices()}
    modules = modules_of(whole)
    ranks = np.zeros(len(modules), np.int64)
    highest = 0
    for slot in own.slots:
        wide, _ = _fitting(slot, places)
        ranks[modules[module_of(slot.name)]] = rank_of(slot)
        highest = rank_of(wide)
    trained = np.arange(highest) < ranks[:, None]
    return trained.astype(np.float32).reshape(-1)


def modules_of(layout: VectorLayout) -> dict[str, int]:
    """The place of each module among all of a layout, by name.

    Raises:
        AdapterError: A name that is not of a LoRA factor.
    """
    names = sorted({module_of(slot.name) for slot in layout.tensors.slots})
    return {name: place for place, name in enumerate(names)}


def rank_of(slot: TensorSlot) -> int:
    """The rank of one tensor.

    Raises:
        AdapterError: Not the name of a factor.
    """
    return slot.shape[_RANK_AXIS[factor_of(slot.name)]]


def by_row(values: NDArray[_Float], slot: TensorSlot) -> NDArray[_Float]:
    """A view of one tensor's values as [rank, the other side]: A, or B transposed.

    Raises:
        AdapterError: Not the name of a factor.
    """
    matrix = values.reshape(slot.shape)
    return matrix if factor_of(slot.name) is Factor.A else matrix.T


def _fitting(
    slot: TensorSlot, places: Mapping[str, tuple[TensorSlot, slice]]
) -> tuple[TensorSlot, slice]:
    found = places.get(slot.name)
    axis = 1 - _RANK_AXIS[factor_of(slot.name)]
    if (
        found is None
        or slot.shape[axis] != found[0].shape[axis]
        or rank_of(slot) > rank_of(found[0])
    ):
        msg = f"{slot.name!r} of shape {slot.shape} does not fit into the federation's adapter"
        raise AdapterError(msg)
    return found
