"""A 4-bit base with LoRA: attaching it, swapping its numbers, saying what is trained."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Final, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from protocol.blocks import Factor, LoraBlock
from quant.adapter import tensor_name
from quant.base_model import LoadedBase
from quant.dropout import streams_of
from quant.lora_function import AdaptedLayer, LoraState, forward_of
from quant.lora_vector import FactorOrder, OneAdapter, split

_ADAPTER: Final = "default"
_PEFT_PREFIX: Final = "base_model.model."


class AttachedLora:
    """A base with LoRA factors whose numbers are swapped, never the model.

    Args:
        base: The frozen base. Nothing else may be attached to it.
        lora: An adapter's shape.
        stacked: Axes of the factors before their own.
    """

    def __init__(self, base: LoadedBase, lora: LoraBlock, *, stacked: tuple[int, ...] = ()) -> None:
        """Attach factors of the manifest's shape; their numbers are peft's."""
        self.base = base
        self.lora = lora
        self.state = LoraState()
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's annotation says int
            lora_dropout=0.0,  # ours is seeded; see `seed_dropout`
            target_modules=list(lora.target_modules),
            bias="none",
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # peft 0.21 asks for checkpointing by a name that transformers 5 deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            peft_model = get_peft_model(base.model, config, autocast_adapter_dtype=False)
        self.model = cast("PeftModel", peft_model)
        self.factors: dict[str, torch.nn.Parameter] = {}
        self._n_adapted = 0
        self._n_checkpointed: int | None = None
        """None: not known, as the base may come from another adapter."""
        for layer in self._adapted_layers():
            self._n_adapted = layer.index + 1
            self.factors[tensor_name(layer.name, Factor.A)] = layer.a
            self.factors[tensor_name(layer.name, Factor.B)] = layer.b
        shapes = {name: factor.shape[len(stacked) :] for name, factor in self.factors.items()}
        self._stacked = stacked
        self._arrange(FactorOrder({n: tuple(shape) for n, shape in shapes.items()}, lora.sent))
        self.model.train()

    def _adapted_layers(self) -> Iterator[AdaptedLayer]:
        index = 0
        for name, module in self.model.named_modules():
            if not isinstance(module, LoraLayer) or not isinstance(module, torch.nn.Module):
                continue
            layer = AdaptedLayer(
                name=name.removeprefix(_PEFT_PREFIX),
                index=index,
                scale=float(module.scaling[_ADAPTER]),
                dropout=self.lora.dropout,
                base=module.base_layer,
                a=cast("torch.nn.Parameter", module.lora_A[_ADAPTER].weight),
                b=cast("torch.nn.Parameter", module.lora_B[_ADAPTER].weight),
                state=self.state,
            )
            self._take_over(module, layer)
            index += 1
            yield layer

    def _take_over(self, module: torch.nn.Module, layer: AdaptedLayer) -> None:
        """Compute a layer by our function."""
        # An attribute of the instance, so that `unload` gives the plain base back.
        module.forward = forward_of(layer, module)

    def train_only(self, factors: tuple[Factor, ...]) -> None:
        """Say which factors are trained; at first, those that agents send.

        Args:
            factors: Of each pair.
        """
        if factors != self._order.factors:
            self._arrange(FactorOrder(self._order.shapes, factors))

    def _arrange(self, order: FactorOrder) -> None:
        """Move the factors' numbers into one vector of this order."""
        self.clear_gradients()
        self._gradients: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None
        n_values = sum(map(prod, order.shapes.values()))
        self._vector = torch.empty((*self._stacked, n_values), device=self.base.device)
        for name, part in split(self._vector, order.shapes).items():
            factor = self.factors[name]
            factor.data = part.copy_(factor.data)
            factor.requires_grad_(name in order.trained)
        self._order = order

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The factors that are trained, by tensor name."""
        return {name: self.factors[name] for name in self.order.trained}

    @property
    def order(self) -> FactorOrder:
        """Of the factors in the vector."""
        return self._order

    @property
    def vector(self) -> torch.Tensor:
        """All numbers, [n_values] float32, or [K, n_values] of a stack."""
        return self._vector

    def clear_gradients(self) -> None:
        """Forget the factors' gradients: backward makes new ones."""
        self.state.sums = None
        for factor in self.factors.values():
            factor.grad = None

    def _gradient_vector(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Room for the gradient of what is trained, and its parts; not zero yet."""
        if self._gradients is None:
            vector = torch.empty_like(self.vector[..., : self.order.n_trained])
            self._gradients = vector, split(vector, self.order.trained)
        return self._gradients

    def seed_dropout(self, seeds: Sequence[int]) -> None:
        """Say which masks the next micro-batch's examples get; without, nothing is dropped.

        Args:
            seeds: One for each example, of 64 bits.
        """
        unsigned = np.array([seed % 2**64 for seed in seeds], np.uint64)
        seeds_there = torch.from_numpy(unsigned.view(np.int64)).to(self.base.device)
        self.state.dropout_streams = streams_of(seeds_there, n_layers=self._n_adapted)

    @contextmanager
    def per_example_gradients(self) -> Iterator[dict[str, torch.Tensor]]:
        """Collect gradients of each example instead of their sum while the context is open.

        Yields:
            Filled by `backward`: [B, *shape] float32 by tensor name; `.grad` stays untouched.
            `backward` raises AdapterError where a base gives a layer all examples as one.
        """
        collected: dict[str, torch.Tensor] = {}
        self.state.per_example = collected
        try:
            yield collected
        finally:
            self.state.per_example = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone while the context is open."""
        self.state.enabled = False
        try:
            yield
        finally:
            self.state.enabled = True

    def checkpoint_activations(self, n_layers: int) -> None:
        """Recompute the activations of the first decoder layers in backward.

        The first, because backward comes to them last: what the others keep is free by then, so
        the peak is that of the forward pass.

        Args:
            n_layers: How many, from the input on; 0: none. More than there are: all.
        """
        n_wanted = max(0, n_layers)
        if n_wanted == self._n_checkpointed:
            return
        self._n_checkpointed = n_wanted
        model = self.base.model
        model.activation_checkpointing_disable()
        if n_wanted == 0:
            return
        model.activation_checkpointing_enable({"use_reentrant": False})
        # Asked for by transformers for the sake of reentrant checkpointing; here it would only
        # compute the gradient of the embeddings for nobody.
        model.disable_input_require_grads()
        for layer in self._decoder_layers()[n_layers:]:
            layer.gradient_checkpointing = False

    @property
    def n_layers(self) -> int:
        """How many decoder layers the base has."""
        return len(self._decoder_layers())

    def _decoder_layers(self) -> list[GradientCheckpointingLayer]:
        modules = self.base.model.modules()
        return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]

    def detach(self) -> None:
        """Give the base back as it was; this object is of no use afterwards."""
        self.model.unload()


class AdaptedModel(AttachedLora, OneAdapter):
    """A base with one LoRA adapter.

    Guarantees:
        1. Gradients equal peft's within float32 rounding, with and without checkpointing.
        2. Per-example gradients equal those of a loop over the examples.
        3. `load` then `arrays` returns the same bytes.

    Args:
        base: The frozen base. One adapter at a time may be attached to it.
        lora: The adapter's shape.
    """

    def __init__(self, base: LoadedBase, lora: LoraBlock) -> None:
        """Attach an adapter of the manifest's shape; its numbers are peft's until `load`."""
        super().__init__(base, lora)

    def fresh_gradient(self) -> torch.Tensor:
        """The vector that the next backward adds the gradient to, zero by now.

        Returns:
            [n_trained] float32, in the order of `weights`; the next call takes it again.
        """
        vector, parts = self._gradient_vector()
        for name, part in parts.items():
            if self.factors[name].grad is not part:
                self.factors[name].grad = part
        return vector.zero_()
