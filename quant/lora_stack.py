"""Several adapters over one frozen base, trained in one pass.

The factors of K adapters lie one behind the other, A [K, r, d_in] and B [K, d_out, r]; each example
of a micro-batch belongs to one of them (`quant.lora.Rows`). The base's own products, and on 4-bit
weights their dequantisation, are paid once for all adapters, where one after the other would pay
them K times.
"""

from collections.abc import Mapping

import torch
from peft import PeftModel

from protocol.blocks import LoraBlock
from quant.adapter import AdapterArrays, Float32Array
from quant.base_model import LoadedBase
from quant.errors import AdapterError
from quant.lora import AdaptedLayer, AdaptedModel, Rows, copied, flat_copy, load_into


class StackedModel(AdaptedModel):
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
        super().__init__(base, lora)
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


class StackSlot:
    """One adapter of a stack, for whoever trains it: its numbers are views of the stack's.

    Args:
        stack: Whose adapter it is.
        number: Which.
    """

    def __init__(self, stack: StackedModel, number: int) -> None:
        """Nothing is copied."""
        self.stack = stack
        self.number = number
        self._factors = {
            name: torch.nn.Parameter(factor.data[number]) for name, factor in stack.factors.items()
        }

    @property
    def base(self) -> LoadedBase:
        """Of all slots."""
        return self.stack.base

    @property
    def model(self) -> PeftModel:
        """Of all slots."""
        return self.stack.model

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The factors that are trained, by tensor name."""
        return {name: self._factors[name] for name in self.stack.trainable}

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

    def load(self, arrays: Mapping[str, Float32Array]) -> None:
        """Put an adapter's numbers into this slot; tensors that are not named stay as they are.

        Args:
            arrays: float32 arrays by PEFT's names.

        Raises:
            AdapterError: A name or shape that the adapter does not have; nothing was changed.
        """
        load_into(self._factors, arrays)

    def gathered(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A copy of the trained factors as one vector; `spread` brings its changes back.

        Returns:
            The vector [n_trained], and its parts by tensor name, in the order of `trainable`.
        """
        return flat_copy(self.trainable)

    def spread(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Put the parts of a vector in the factors' places.

        Args:
            parts: Of `gathered`.
        """
        with torch.no_grad():
            for name, factor in self.trainable.items():
                factor.copy_(parts[name])

    def arrays(self) -> AdapterArrays:
        """A copy of the adapter's numbers as float32 arrays on the CPU."""
        return copied(self._factors)
