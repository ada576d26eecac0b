"""FlexLoRA for a round whose updates do not fit into memory together: some modules at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregator_server.aggregation.lora import flexlora
from aggregator_server.aggregation.lora_pairs import Cohort, local_adapter
from aggregator_server.aggregation.robust.units import Float64Array, Units
from aggregator_server.errors import AggregationError
from privacy.updates import Float32Array, PlainUpdate
from protocol.blocks import LoraBlock
from protocol.layout import TensorSlot, VectorLayout
from quant.adapter import flatten, module_of, unflatten

GROUP_BYTES: Final = 1 << 28
"""Most bytes that all agents' float32 factors of one group of modules take, if one module fits."""


@dataclass(frozen=True, kw_only=True)
class FlexStep:
    """From the factors that a round started from to the new ones."""

    step: Float64Array
    """[n_values] float64."""
    error_norm: float
    """Frobenius norm over all modules of the mean product beyond the adapter's rank."""


def flexlora_step(
    units: Units,
    start: Float32Array,
    layout: VectorLayout,
    lora: LoraBlock,
    *,
    group_bytes: int = GROUP_BYTES,
) -> FlexStep:
    """Average the products B·A of all agents and cut the mean to the adapter's rank.

    Guarantees:
        1. start + step is what `lora.flexlora` makes of all agents at once, to float32's rounding.
        2. Memory: the step, one update, and a small multiple of `group_bytes` or of one module of
           all agents, whichever is more; updates are read once for each group.

    Args:
        units: The round's updates, each of one agent.
        start: [n_values], what the round started from.
        layout: Of both; A and B of each module.
        lora: Rank and scale of the adapter.
        group_bytes: See `GROUP_BYTES`.

    Raises:
        AggregationError: A unit of more than one agent, a module without one of its factors, or
            values that are not finite.

    Source: FlexLoRA (Bai et al.), arXiv 2402.11505; see `lora.flexlora`.
    """
    if (units.n_members != 1).any():
        msg = f"FlexLoRA needs single agents' factors, not sums over {int(units.n_members.max())}"
        raise AggregationError(msg)
    step = np.empty(layout.n_values)
    errors = []
    for group in _groups(layout, n_units=len(units.weights), group_bytes=group_bytes):
        part = VectorLayout.of_shapes({slot.name: slot.shape for slot, _ in group})
        before = _part(start, group)
        arrays = unflatten(before, part)
        agents = tuple(
            local_adapter(
                PlainUpdate(vector=_part(units.load(index), group), weight=int(weight)),
                arrays,
                part,
                scale=lora.scale,
            )
            for index, weight in enumerate(units.weights)
        )
        best = flexlora(Cohort(agents=agents), rank=lora.rank, scale=lora.scale)
        after = flatten(best.adapter.arrays(), part).astype(np.float64)
        for (_slot, where), (_same, there) in zip(group, part.slices(), strict=True):
            step[where] = after[there] - before[there]
        errors.append(best.error_norm)
    return FlexStep(step=step, error_norm=float(np.linalg.norm(errors)))


def _groups(
    layout: VectorLayout, *, n_units: int, group_bytes: int
) -> Iterator[list[tuple[TensorSlot, slice]]]:
    """Whole modules, as many at a time as fit."""
    modules: dict[str, list[tuple[TensorSlot, slice]]] = {}
    for slot, where in layout.slices():
        modules.setdefault(module_of(slot.name), []).append((slot, where))
    group: list[tuple[TensorSlot, slice]] = []
    n_bytes = 0
    for slots in modules.values():
        more = 4 * n_units * sum(slot.n_values for slot, _ in slots)
        if group and n_bytes + more > group_bytes:
            yield sorted(group, key=_name)
            group, n_bytes = [], 0
        group += slots
        n_bytes += more
    yield sorted(group, key=_name)


def _name(item: tuple[TensorSlot, slice]) -> str:
    return item[0].name


def _part(vector: Float32Array, group: Sequence[tuple[TensorSlot, slice]]) -> Float32Array:
    return np.concatenate([vector[where] for _, where in group])
