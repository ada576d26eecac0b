"""Several adapters over one frozen base, trained in one pass.

The factors of K adapters lie one behind the other, A [K, r, d_in] and B [K, d_out, r]; each example
of a micro-batch belongs to one of them (`quant.lora.Rows`). The base's own products, and on 4-bit
weights their dequantisation, are paid once for all adapters, where one after the other would pay
them K times.
"""

from collections.abc import Iterable, Mapping

import torch
from peft import PeftModel

from protocol.blocks import LoraBlock
from quant.base_model import LoadedBase
from quant.errors import AdapterError
from quant.lora import AttachedLora
from quant.lora_function import AdaptedLayer, Rows
from quant.lora_vector import FactorOrder, OneAdapter


class StackedModel(AttachedLora):
    """A base with K adapters of one shape.

    Guarantees:
        1. Losses and gradients of an example equal those of `AdaptedModel` with the example's own
           adapter, within float32 rounding, and depend on no other adapter.
        2. No adapter has a base, or activations, of its own beyond those of its examples.

    Args:
        base: The frozen base. Nothing else may be attached to it.
        lora: The shape of every adapter.
        n_slots: K, at least 1.

    Raises:
        AdapterError: No adapter.
    """

    def __init__(self, base: LoadedBase, lora: LoraBlock, *, n_slots: int) -> None:
        """Attach K adapters of zeros."""
        if n_slots < 1:
            msg = f"{n_slots} adapters cannot be attached; at least 1"
            raise AdapterError(msg)
        self.n_slots = n_slots
        super().__init__(base, lora, stacked=(n_slots,))
        self.slots = tuple(StackSlot(self, number) for number in range(n_slots))

    def _take_over(self, module: torch.nn.Module, layer: AdaptedLayer) -> None:
        """Put stacks in the place of the layer's two factors."""
        layer.a, layer.b = self._stack(layer.a), self._stack(layer.b)
        super()._take_over(module, layer)

    def _stack(self, factor: torch.nn.Parameter) -> torch.nn.Parameter:
        factor.requires_grad = False  # peft's own, which is not used
        shape = (self.n_slots, *factor.shape)
        return torch.nn.Parameter(torch.zeros(shape, device=factor.device))

    def assign(self, counts: Mapping[int, int]) -> Rows:
        """Say whose the examples of the next micro-batch are: slot by slot, ascending.

        Args:
            counts: Number of examples of each slot that has any.
        """
        slots = tuple(sorted(counts))
        self.state.rows = Rows(slots=slots, counts=tuple(counts[slot] for slot in slots))
        return self.state.rows

    def fresh_gradients(self, slots: Iterable[int]) -> torch.Tensor:
        """The vectors that the next backward adds the gradients to.

        Args:
            slots: Whose are zero by now; the others' keep what they have, and get zeros added.

        Returns:
            [K, n_trained] float32, each in the order of the slot's `weights`; the next call for a
            slot takes its vector again.
        """
        # Not the factors' `.grad`: they are no dense tensors, of which autograd warns.
        vectors, self.state.sums = self._gradient_vector()
        for slot in slots:
            vectors[slot].zero_()
        return vectors


class StackSlot(OneAdapter):
    """One adapter of a stack, for whoever trains it: its numbers are a part of the stack's.

    Args:
        stack: Whose adapter it is.
        number: Which.
    """

    def __init__(self, stack: StackedModel, number: int) -> None:
        """Nothing is copied."""
        self.stack = stack
        self.number = number

    @property
    def order(self) -> FactorOrder:
        """Of all slots."""
        return self.stack.order

    @property
    def vector(self) -> torch.Tensor:
        """The slot's part of the stack's, [n_values]."""
        return self.stack.vector[self.number]

    @property
    def base(self) -> LoadedBase:
        """Of all slots."""
        return self.stack.base

    @property
    def model(self) -> PeftModel:
        """Of all slots."""
        return self.stack.model

    @property
    def n_layers(self) -> int:
        """How many decoder layers the base has."""
        return self.stack.n_layers

    def checkpoint_activations(self, n_layers: int) -> None:
        """As the stack's: it holds for all slots.

        Args:
            n_layers: How many, from the input on.
        """
        self.stack.checkpoint_activations(n_layers)
