"""The layout of what agents send: tensors of the adapter, then what goes with them."""

from collections.abc import Mapping

from protocol.blocks import LoraBlock, TrainingBlock
from protocol.layout import CONTROL, PARTICIPATION, VectorLayout
from quant.adapter import sent_layout
from quant.lora_turns import turn_layouts
from quant.mixed_ranks import modules_of


def update_layout(
    shapes: Mapping[str, tuple[int, ...]], lora: LoraBlock, training: TrainingBlock
) -> VectorLayout:
    """The layout of all that agents of a federation send over all rounds, without masks' steps.

    Args:
        shapes: All tensors of the adapter.
        lora: The manifest's block: which are sent, and whether parts of them may be trained.
        training: The manifest's block: whether control variates go along.

    Raises:
        AdapterError: A name is not PEFT's name of a factor.
    """
    return _with_companions(sent_layout(shapes, lora.sent), lora, training)


def update_layouts(
    shapes: Mapping[str, tuple[int, ...]], lora: LoraBlock, training: TrainingBlock
) -> tuple[VectorLayout, ...]:
    """The same by turn (`lora_turns.turn_layouts`).

    Args:
        shapes: All tensors of the adapter.
        lora: The manifest's block.
        training: The manifest's block.

    Raises:
        AdapterError: A name is not PEFT's name of a factor.
    """
    turns = turn_layouts(lora.rule, shapes)
    return tuple(_with_companions(tensors, lora, training) for tensors in turns)


def _with_companions(
    tensors: VectorLayout, lora: LoraBlock, training: TrainingBlock
) -> VectorLayout:
    found: dict[str, tuple[int, ...]] = {slot.name: slot.shape for slot in tensors.slots}
    if training.scaffold:
        found[CONTROL] = (tensors.n_values,)
    if lora.is_mixed:
        found[PARTICIPATION] = (len(modules_of(tensors)), lora.rank)
    return VectorLayout.of_shapes(found)
