"""LoRA on a 4-bit base: one autograd function for private and non-private steps.

peft gives the adapter its structure, names and file format; the computation is ours, because we
need per-example gradients on request and exactness in all three modes of activation checkpointing
(none, reentrant, non-reentrant), where hooks silently fail (TRAINING, traps 3 and 7).

For one layer with input x [B, T, d_in], factors A [r, d_in] and B [d_out, r] and scale s:

    u = x Aᵀ            [B, T, r]
    y = base(x) + s · u Bᵀ
    v = s · g B         [B, T, r]      g is the gradient of y, [B, T, d_out]
    ∇x += v A,   ∇A = Σ_bt v ⊗ x,   ∇B = s · Σ_bt g ⊗ u

The per-example gradients leave out only the sum over b: the same products, summed later, so they
cost 4 bytes a parameter for each example in flight and no further pass.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from protocol.manifest import Factor, LoraBlock
from quant.adapter import AdapterArrays, Float32Array, factor_of, tensor_name
from quant.base_model import LoadedBase
from quant.errors import AdapterError

_ADAPTER: Final = "default"
_PEFT_PREFIX: Final = "base_model.model."
_SEED_MIX: Final = 0x9E3779B97F4A7C15


@dataclass
class LoraState:
    """What all adapted layers of one model share."""

    enabled: bool = True
    dropout_seed: int = 0
    """Seed of the dropout masks of the current micro-batch: the same on recomputation."""
    per_example: dict[str, torch.Tensor] | None = None
    """Where backward puts per-example gradients [B, …] by tensor name; None: sum as usual."""
    positions: torch.Tensor | None = None
    """Flat indices into [B·T] at which the output layer is evaluated; None: everywhere."""


@dataclass
class _Layer:
    """One adapted layer."""

    name: str
    index: int
    scale: float
    dropout: float
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    state: LoraState = field(repr=False)


class _LoraFunction(torch.autograd.Function):
    """s · (x Aᵀ) Bᵀ. Saves the input once, in its own dtype; accumulates gradients in float32."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives the context no public type
        x: torch.Tensor,  # [B, T, d_in]
        a: torch.Tensor,  # [r, d_in] float32
        b: torch.Tensor,  # [d_out, r] float32
        layer: _Layer,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.layer = layer
        u = x @ a.to(x.dtype).T
        return (u @ b.to(x.dtype).T) * layer.scale

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - torch gives the context no public type
        g: torch.Tensor,  # [B, T, d_out]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        x, a, b = ctx.saved_tensors
        layer: _Layer = ctx.layer
        v = (g @ b.to(g.dtype)) * layer.scale  # [B, T, r]
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        grad_x = v @ a.to(v.dtype) if need_x else None
        per_example = layer.state.per_example
        grad_a = grad_b = None
        if need_a:
            grad_a = _outer(v, x, summed=per_example is None)
        if need_b:
            u = (x @ a.to(x.dtype).T) * layer.scale
            grad_b = _outer(g, u, summed=per_example is None)
        if per_example is None:
            return grad_x, grad_a, grad_b, None
        for factor, gradient in ((Factor.A, grad_a), (Factor.B, grad_b)):
            if gradient is not None:
                per_example[tensor_name(layer.name, factor)] = gradient
        return grad_x, None, None, None


def _outer(left: torch.Tensor, right: torch.Tensor, *, summed: bool) -> torch.Tensor:
    """Σ_t left_bt ⊗ right_bt, [B, d_left, d_right], or its sum over b; float32."""
    left, right = left.float(), right.float()
    if summed:
        return left.flatten(0, -2).T @ right.flatten(0, -2)
    n_examples = left.shape[0]
    left, right = (
        left.reshape(n_examples, -1, left.shape[-1]),
        right.reshape(n_examples, -1, right.shape[-1]),
    )
    return left.transpose(1, 2) @ right


class AdaptedModel:
    """A base with one LoRA adapter whose numbers are swapped, never the model.

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
        self.base = base
        self.lora = lora
        self.state = LoraState()
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's annotation says int
            lora_dropout=0.0,  # ours is seeded; see `_forward`
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
        for layer in self._adapted_layers():
            self.factors[tensor_name(layer.name, Factor.A)] = layer.a
            self.factors[tensor_name(layer.name, Factor.B)] = layer.b
        for name, parameter in self.factors.items():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(factor_of(name) in lora.sent)
        head = cast("torch.nn.Module", base.model.get_output_embeddings())
        self._head_hook = head.register_forward_pre_hook(self._select_positions)
        self.model.train()

    def _adapted_layers(self) -> Iterator[_Layer]:
        index = 0
        for name, module in self.model.named_modules():
            if not isinstance(module, LoraLayer) or not isinstance(module, torch.nn.Module):
                continue
            layer = _Layer(
                name=name.removeprefix(_PEFT_PREFIX),
                index=index,
                scale=float(module.scaling[_ADAPTER]),
                dropout=self.lora.dropout,
                a=cast("torch.nn.Parameter", module.lora_A[_ADAPTER].weight),
                b=cast("torch.nn.Parameter", module.lora_B[_ADAPTER].weight),
                state=self.state,
            )
            # An attribute of the instance, so that `unload` gives the plain base back.
            module.forward = _forward_of(layer, module.base_layer, module)
            index += 1
            yield layer

    def _select_positions(
        self,
        module: torch.nn.Module,  # noqa: ARG002 - torch's hook signature
        args: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...] | None:
        positions = self.state.positions
        if positions is None:
            return None
        hidden, *rest = args  # [B, T, h]
        return (hidden.reshape(-1, hidden.shape[-1])[positions].unsqueeze(0), *rest)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The factors that agents send, by tensor name."""
        return {
            name: factor
            for name, factor in self.factors.items()
            if factor_of(name) in self.lora.sent
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the adapter, by PEFT's names."""
        return {name: tuple(factor.shape) for name, factor in self.factors.items()}

    def load(self, arrays: Mapping[str, Float32Array]) -> None:
        """Put an adapter's numbers in place; tensors that are not named stay as they are.

        Args:
            arrays: float32 arrays by PEFT's names.

        Raises:
            AdapterError: A name or shape that this adapter does not have; nothing was changed.
        """
        for name, array in arrays.items():
            factor = self.factors.get(name)
            if factor is None or tuple(factor.shape) != array.shape:
                has = "no such tensor" if factor is None else f"shape {tuple(factor.shape)}"
                msg = f"cannot load {name!r} of shape {array.shape}: the adapter has {has}"
                raise AdapterError(msg)
        with torch.no_grad():
            for name, array in arrays.items():
                self.factors[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))

    def arrays(self) -> AdapterArrays:
        """A copy of the adapter's numbers as float32 arrays on the CPU."""
        return {
            name: factor.detach().to("cpu", torch.float32, copy=True).numpy()
            for name, factor in self.factors.items()
        }

    @contextmanager
    def per_example_gradients(self) -> Iterator[dict[str, torch.Tensor]]:
        """Collect gradients of each example instead of their sum while the context is open.

        Yields:
            Filled by `backward`: [B, *shape] float32 by tensor name; `.grad` stays untouched.
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

    def checkpoint_activations(self, *, enabled: bool) -> None:
        """Recompute activations in backward: less memory, about a third more time."""
        if enabled:
            self.base.model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        else:
            self.base.model.activation_checkpointing_disable()

    def detach(self) -> None:
        """Give the base back as it was; this object is of no use afterwards."""
        self._head_hook.remove()
        self.model.unload()


def _forward_of(layer: _Layer, base_layer: torch.nn.Module, module: torch.nn.Module) -> Any:  # noqa: ANN401 - assigned to Module.forward
    def forward(x: torch.Tensor) -> torch.Tensor:
        result = cast("torch.Tensor", base_layer(x))
        if not layer.state.enabled:
            return result
        dropped = _dropout(x, layer) if layer.dropout > 0.0 and module.training else x
        delta: torch.Tensor = _LoraFunction.apply(dropped, layer.a, layer.b, layer)  # type: ignore[no-untyped-call]
        return result + delta.to(result.dtype)

    return forward


def _dropout(x: torch.Tensor, layer: _Layer) -> torch.Tensor:
    # Drawn from a generator of its own, so that recomputation in backward, a resumed run and an
    # uninterrupted one see the same mask; checkpointing restores only the global generator.
    generator = torch.Generator(x.device)
    generator.manual_seed((layer.state.dropout_seed * _SEED_MIX + layer.index) % 2**63)
    keep = torch.empty_like(x).bernoulli_(1.0 - layer.dropout, generator=generator)
    return x * keep / (1.0 - layer.dropout)


def example_losses(
    adapted: AdaptedModel,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    loss_mask: torch.Tensor,
) -> torch.Tensor:
    """The mean cross-entropy of each example over its own loss tokens.

    The loss of one example never depends on another: the token mean of transformers couples
    examples through their lengths (TRAINING, trap 4). Positions without loss are dropped before
    the output layer.

    Args:
        adapted: The model.
        input_ids: [B, T] int64, right-padded.
        attention_mask: [B, T], 1 for tokens.
        loss_mask: [B, T] bool, True where a token is predicted with loss; column 0 is ignored.

    Returns:
        [B] float32; 0 for an example without loss tokens.
    """
    n_examples, n_tokens = input_ids.shape
    predicted = loss_mask[:, 1:]  # [B, T-1]: the token at t+1 is predicted at t
    example, position = predicted.nonzero(as_tuple=True)
    targets = input_ids[:, 1:][predicted]  # [N]
    adapted.state.positions = example * n_tokens + position
    try:
        output = adapted.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        adapted.state.positions = None
    logits = output.logits[0].float()  # [N, V]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")  # [N]
    counts = predicted.sum(1).clamp(min=1)
    sums = torch.zeros(n_examples, device=losses.device).index_add(0, example, losses)
    return sums / counts
