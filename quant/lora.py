"""LoRA on a 4-bit base: one autograd function for private and non-private steps.

peft gives the adapter its structure, names and file format; the computation is ours, because we
need per-example gradients on request and exactness in all three modes of activation checkpointing
(none, reentrant, non-reentrant), where hooks silently fail (TRAINING, traps 3 and 7).

For one layer with input x [B, T, d_in], factors A [r, d_in] and B [d_out, r], scale s and dropout
mask m (1 without dropout, else 0 or 1/(1 - p), a factor that the code puts into s):

    z = m ∘ x,  u = z Aᵀ                    [B, T, r]
    y = base(x) + s · u Bᵀ
    v = s · g B                             [B, T, r]      g is the gradient of y, [B, T, d_out]
    ∇x = base'(g) + m ∘ (v A),   ∇A = Σ_bt v ⊗ z,   ∇B = s · Σ_bt g ⊗ u

Where several adapters are trained in one pass (`quant.lora_stack`), A is [K, r, d_in] and B
[K, d_out, r], each example of the batch belongs to one of them, and the same products are taken
adapter by adapter.

Only x is saved, once for all layers that share it, in its own dtype; m is drawn again and u
computed again in backward, which costs r/d of the layer. The per-example gradients leave out only
the sum over b: the same products, summed later, so they cost 4 bytes a parameter for each example
in flight and no further pass.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from protocol.blocks import Factor, LoraBlock
from quant.adapter import AdapterArrays, Float32Array, factor_of, tensor_name
from quant.base_model import LoadedBase
from quant.dropout import drop, dropped_places, streams_of
from quant.errors import AdapterError

_ADAPTER: Final = "default"
_PEFT_PREFIX: Final = "base_model.model."


@dataclass(frozen=True)
class Rows:
    """To which of several adapters the examples of a micro-batch belong, in the batch's order.

    Attributes:
        slots: Numbers of adapters, ascending.
        counts: How many examples each has, at least 1.
    """

    slots: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def are_even(self) -> bool:
        """Whether all have as many."""
        return len(set(self.counts)) == 1

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Each adapter and its examples."""
        start = 0
        for slot, count in zip(self.slots, self.counts, strict=True):
            yield slot, slice(start, start + count)
            start += count


@dataclass
class LoraState:
    """What all adapted layers of one model share."""

    enabled: bool = True
    rows: Rows | None = None
    """Whose example is whose, where factors are stacks of several adapters'; None: of one."""
    dropout_streams: torch.Tensor | None = None
    """[n_adapted, B] int64: of the dropout masks of the current micro-batch's examples."""
    per_example: dict[str, torch.Tensor] | None = None
    """Where backward puts per-example gradients [B, …] by tensor name; None: sum as usual."""


@dataclass
class AdaptedLayer:
    """One adapted layer."""

    name: str
    index: int
    scale: float
    dropout: float
    base: torch.nn.Module
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    state: LoraState = field(repr=False)


class _LoraFunction(torch.autograd.Function):
    """base(x) + s · (m ∘ x) Aᵀ Bᵀ. Saves x alone; accumulates gradients in float32."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives the context no public type
        x: torch.Tensor,  # [B, T, d_in]
        a: torch.Tensor,  # [r, d_in] float32, or [K, r, d_in]
        b: torch.Tensor,  # [d_out, r] float32, or [K, d_out, r]
        layer: AdaptedLayer,
        streams: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = layer.state.rows
        if rows is not None:
            _require_examples(layer, x)
        ctx.save_for_backward(x, a, b)
        ctx.layer, ctx.streams, ctx.rows = layer, streams, rows
        y = cast("torch.Tensor", layer.base(x))
        z = _dropped(x, _places(x, layer, streams))
        u = _product(z, a.to(x.dtype).mT, rows)  # [B, T, r], without m's factor
        _add_product(y, u, b.to(x.dtype).mT, _scale(layer, streams), rows)
        return y

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - torch gives the context no public type
        g: torch.Tensor,  # [B, T, d_out]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None, None]:
        x, a, b = ctx.saved_tensors
        layer: AdaptedLayer = ctx.layer
        rows: Rows | None = ctx.rows
        need_x, need_a, need_b = ctx.needs_input_grad[:3]
        places, scale = _places(x, layer, ctx.streams), _scale(layer, ctx.streams)
        v = _product(g, b.to(g.dtype), rows) * scale  # [B, T, r]
        grad_x = None
        if need_x:
            grad_x = _base_gradient(layer.base, g)
            if places is None:
                _add_product(grad_x, v, a.to(v.dtype), 1.0, rows)
            else:
                grad_x.add_(_dropped(_product(v, a.to(v.dtype), rows), places))
        per_example = layer.state.per_example
        if per_example is not None:
            _require_examples(layer, g)
        grad_a = grad_b = None
        if need_a or need_b:
            z = _dropped(x, places)
            if need_a:
                grad_a = _outer(v, z, by_example=per_example is not None, like=a, rows=rows)
            if need_b:
                u = _product(z, a.to(x.dtype).mT, rows) * scale
                grad_b = _outer(g, u, by_example=per_example is not None, like=b, rows=rows)
        if per_example is None:
            return grad_x, grad_a, grad_b, None, None
        for factor, gradient in ((Factor.A, grad_a), (Factor.B, grad_b)):
            if gradient is not None:
                name = tensor_name(layer.name, factor)
                earlier = per_example.get(name)  # of a layer that is used more than once
                per_example[name] = gradient if earlier is None else earlier + gradient
        return grad_x, None, None, None, None


def _base_gradient(base: torch.nn.Module, g: torch.Tensor) -> torch.Tensor:
    """The gradient of base(x) by x: g [B, T, d_out] times the weight [d_out, d_in]."""
    weight: Any = base.weight
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return cast("torch.Tensor", g @ weight.to(g.dtype))


def _require_examples(layer: AdaptedLayer, x: torch.Tensor) -> None:
    if x.ndim != 3:
        msg = (
            f"layer {layer.name!r} gets the examples of a batch as one: nothing can be had of each "
            "example from this base; choose one such as Llama, Mistral or Qwen"
        )
        raise AdapterError(msg)


def _product(
    left: torch.Tensor,  # [B, T, n]
    right: torch.Tensor,  # [n, m], or [K, n, m]
    rows: Rows | None,
) -> torch.Tensor:
    """The product, [B, T, m]; each example by the matrix of its adapter."""
    if rows is None:
        return left @ right
    if rows.are_even:
        product = _by_adapter(left, rows) @ _of_slots(right, rows)
        return product.view(*left.shape[:-1], -1)
    return torch.cat([left[part] @ right[slot] for slot, part in rows.parts()])


def _add_product(
    total: torch.Tensor,  # [B, T, m], contiguous, changed in place
    left: torch.Tensor,  # [B, T, n]
    right: torch.Tensor,  # [n, m], or [K, n, m]
    scale: float,
    rows: Rows | None,
) -> None:
    """Add scale · left right, in one pass over the sum."""
    if rows is None:
        flat = left.reshape(-1, left.shape[-1])
        total.view(-1, total.shape[-1]).addmm_(flat, right, alpha=scale)
    elif rows.are_even:
        grouped = total.view(len(rows.slots), -1, total.shape[-1])
        grouped.baddbmm_(_by_adapter(left, rows), _of_slots(right, rows), alpha=scale)
    else:
        for slot, part in rows.parts():
            _add_product(total[part], left[part], right[slot], scale, None)


def _by_adapter(x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """[B, T, n] as [K, B/K · T, n]: the examples of each adapter one after the other."""
    return x.reshape(len(rows.slots), -1, x.shape[-1])


def _of_slots(stack: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The adapters that the batch has examples of, in the batch's order."""
    return stack if len(rows.slots) == len(stack) else stack[list(rows.slots)]


def _scale(layer: AdaptedLayer, streams: torch.Tensor | None) -> float:
    """The adapter's scale; with dropout, times what keeps the mean."""
    return layer.scale if streams is None else layer.scale / (1.0 - layer.dropout)


def _places(
    x: torch.Tensor, layer: AdaptedLayer, streams: torch.Tensor | None
) -> torch.Tensor | None:
    if streams is None:
        return None
    return dropped_places(x, streams=streams, probability=layer.dropout)


def _dropped(x: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    return x if places is None else drop(x, places)


def _outer(
    left: torch.Tensor,  # [B, T, n]
    right: torch.Tensor,  # [B, T, m]
    *,
    by_example: bool,
    like: torch.Tensor,  # [n, m], or [K, n, m]
    rows: Rows | None,
) -> torch.Tensor:
    """Σ_t left_bt ⊗ right_bt, [B, n, m], or its sum over each adapter's examples; float32."""
    if by_example:
        return _outer_of(left, right, n_groups=len(left))
    if rows is None:
        return _outer_of(left, right, n_groups=1)[0]
    if rows.are_even and len(rows.slots) == len(like):
        return _outer_of(left, right, n_groups=len(like))
    found = torch.zeros_like(like)
    for slot, part in rows.parts():
        found[slot] = _outer_of(left[part], right[part], n_groups=1)[0]
    return found


def _outer_of(left: torch.Tensor, right: torch.Tensor, *, n_groups: int) -> torch.Tensor:
    """Σ left ⊗ right within each of so many equal groups of examples: [groups, n, m]."""
    if left.shape[-1] > right.shape[-1]:
        # Libraries multiply a short left factor by a long right one twice as fast.
        return _outer_of(right, left, n_groups=n_groups).mT
    return _exact_product(
        left.reshape(n_groups, -1, left.shape[-1]).mT,
        right.reshape(n_groups, -1, right.shape[-1]),
    )


def _exact_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B, n, k] times [B, k, m] in float32, which holds every product of two 16-bit numbers."""
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def load_into(
    factors: Mapping[str, torch.nn.Parameter], arrays: Mapping[str, Float32Array]
) -> None:
    """Put an adapter's numbers in place; tensors that are not named stay as they are.

    Args:
        factors: Of an adapter, by PEFT's names.
        arrays: float32 arrays by the same.

    Raises:
        AdapterError: A name or shape that the adapter does not have; nothing was changed.
    """
    for name, array in arrays.items():
        factor = factors.get(name)
        if factor is None or tuple(factor.shape) != array.shape:
            has = "no such tensor" if factor is None else f"shape {tuple(factor.shape)}"
            msg = f"cannot load {name!r} of shape {array.shape}: the adapter has {has}"
            raise AdapterError(msg)
    with torch.no_grad():
        for name, array in arrays.items():
            factors[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))


def flat_copy(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A copy of some tensors as one vector, and its parts by name.

    Args:
        tensors: Of one type on one device, at least one.
    """
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
    return flat, parts_of(flat, tensors)


def parts_of(flat: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vector's parts, by name.

    Args:
        flat: As long as all of them.
        like: Names and shapes, in order.
    """
    parts = flat.split([tensor.numel() for tensor in like.values()])
    named = zip(like.items(), parts, strict=True)
    return {name: part.view(tensor.shape) for (name, tensor), part in named}


def copied(factors: Mapping[str, torch.nn.Parameter]) -> AdapterArrays:
    """A copy of an adapter's numbers as float32 arrays on the CPU.

    Args:
        factors: By tensor name.
    """
    return {
        name: factor.detach().to("cpu", torch.float32, copy=True).numpy()
        for name, factor in factors.items()
    }


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
        self._n_adapted = 0
        self._n_checkpointed: int | None = None
        """None: not known, as the base may come from another adapter."""
        for layer in self._adapted_layers():
            self._n_adapted = layer.index + 1
            self.factors[tensor_name(layer.name, Factor.A)] = layer.a
            self.factors[tensor_name(layer.name, Factor.B)] = layer.b
        for parameter in self.factors.values():
            parameter.data = parameter.data.float()
        self.train_only(lora.sent)
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
        module.forward = _forward_of(layer, module)

    def train_only(self, factors: tuple[Factor, ...]) -> None:
        """Say which factors are trained; at first, those that agents send.

        Args:
            factors: Of each pair.
        """
        self._trained = factors
        for name, parameter in self.factors.items():
            parameter.requires_grad_(factor_of(name) in factors)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The factors that are trained, by tensor name."""
        return {
            name: factor
            for name, factor in self.factors.items()
            if factor_of(name) in self._trained
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
        load_into(self.factors, arrays)

    def arrays(self) -> AdapterArrays:
        """A copy of the adapter's numbers as float32 arrays on the CPU."""
        return copied(self.factors)

    def gathered(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The trained factors as one vector: whoever changes it changes them.

        Returns:
            The vector [n_trained], and its parts by tensor name, in the order of `trainable`.
        """
        flat, parts = flat_copy(self.trainable)
        for name, factor in self.trainable.items():
            factor.data = parts[name]
        return flat, parts

    def spread(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Nothing is to be done: the parts of `gathered` are the factors themselves.

        Args:
            parts: Of `gathered`.
        """

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


def _forward_of(layer: AdaptedLayer, module: torch.nn.Module) -> Any:  # noqa: ANN401 - assigned to Module.forward
    def forward(x: torch.Tensor) -> torch.Tensor:
        if not layer.state.enabled:
            return cast("torch.Tensor", layer.base(x))
        drawn = layer.state.dropout_streams if layer.dropout > 0.0 and module.training else None
        streams = None if drawn is None else drawn[layer.index]
        return cast("torch.Tensor", _LoraFunction.apply(x, layer.a, layer.b, layer, streams))  # type: ignore[no-untyped-call]

    return forward
