"""The adapted model with gradients of single examples from opacus' hooks: a second opinion.

An owner who trusts the field's reference more than our own function may select it
(`dp_engine = "opacus"` in agent.toml); clipping, noise and account stay the same. It is slower, and
hooks lose gradients where activations are computed again (TRAINING, trap 3), so that is refused.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from opacus.grad_sample import GradSampleModule

from protocol.blocks import Factor, LoraBlock
from quant.base_model import LoadedBase
from quant.errors import AdapterError
from quant.lora import AdaptedModel
from quant.lora_function import AdaptedLayer

_NOISY_HOOK: Final = "Full backward hook is firing when gradients are computed"


class OpacusModel(AdaptedModel):
    """peft's own LoRA layers under opacus' hooks.

    Guarantees:
        1. Gradients of single examples equal those of `AdaptedModel` within float32 rounding.
        2. Recomputed activations are refused, by a sentence.

    Args:
        base: The frozen base. One adapter at a time may be attached to it.
        lora: The adapter's shape; without dropout.

    Raises:
        AdapterError: The adapter has dropout, which hooks could not seed by example.
    """

    def __init__(self, base: LoadedBase, lora: LoraBlock) -> None:
        """Attach an adapter and hooks."""
        if lora.dropout > 0.0:
            msg = f'dp_engine = "opacus" works without dropout; the adapter has {lora.dropout:g}'
            raise AdapterError(msg)
        super().__init__(base, lora)
        self._set_hooks()

    def _take_over(self, module: torch.nn.Module, layer: AdaptedLayer) -> None:
        """Leave peft's own forward."""

    def train_only(self, factors: tuple[Factor, ...]) -> None:
        """As `AdaptedModel`'s; hooks are set anew, as opacus asks once who is trained."""
        super().train_only(factors)
        self._hooks.remove_hooks()
        self._set_hooks()

    def _set_hooks(self) -> None:
        self._hooks = GradSampleModule(self.model, loss_reduction="sum", strict=False)

    @contextmanager
    def per_example_gradients(self) -> Iterator[dict[str, torch.Tensor]]:
        """As `AdaptedModel`'s; filled when the context closes."""
        collected: dict[str, torch.Tensor] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _NOISY_HOOK, UserWarning)
            yield collected
        for name, factor in self.trainable.items():
            found = getattr(factor, "grad_sample", None)
            if isinstance(found, torch.Tensor):
                collected[name] = found
            factor.grad_sample = None  # type: ignore[attr-defined]  # opacus' attribute
            factor.grad = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone while the context is open."""
        with self.model.disable_adapter():
            yield

    def checkpoint_activations(self, n_layers: int) -> None:
        """None are recomputed.

        Args:
            n_layers: 0.

        Raises:
            AdapterError: Some layers should be.
        """
        if n_layers > 0:
            msg = (
                'dp_engine = "opacus" cannot compute activations again, and without that a step '
                "does not fit into the memory that is allowed; take the setting out of agent.toml"
            )
            raise AdapterError(msg)
        super().checkpoint_activations(0)

    def detach(self) -> None:
        """Give the base back as it was; this object is of no use afterwards."""
        self._hooks.remove_hooks()
        super().detach()
