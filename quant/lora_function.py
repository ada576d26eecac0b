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

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit

from protocol.blocks import Factor
from quant.adapter import tensor_name
from quant.dropout import drop, dropped_places
from quant.errors import AdapterError


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
    sums: dict[str, torch.Tensor] | None = None
    """To which backward adds the sums' gradients, by tensor name; None: to the factors' `.grad`."""

    def keep(self, name: str, gradient: torch.Tensor) -> None:
        """Add a gradient to what there is; a layer may be used more than once.

        Args:
            name: Of the tensor.
            gradient: [B, *shape] where those of examples are wanted, else of the factor's shape.
        """
        if self.per_example is None:
            if self.sums is not None:
                self.sums[name] += gradient
        else:
            earlier = self.per_example.get(name)
            self.per_example[name] = gradient if earlier is None else earlier + gradient


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
        state = layer.state
        if state.per_example is None and state.sums is None:
            return grad_x, grad_a, grad_b, None, None
        for factor, gradient in ((Factor.A, grad_a), (Factor.B, grad_b)):
            if gradient is not None:
                state.keep(tensor_name(layer.name, factor), gradient)
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


def forward_of(layer: AdaptedLayer, module: torch.nn.Module) -> Any:  # noqa: ANN401 - assigned to Module.forward
    """What computes an adapted layer, in the place of its module's `forward`.

    Args:
        layer: The layer.
        module: Whose it is; dropout is for its training mode alone.
    """

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not layer.state.enabled:
            return cast("torch.Tensor", layer.base(x))
        drawn = layer.state.dropout_streams if layer.dropout > 0.0 and module.training else None
        streams = None if drawn is None else drawn[layer.index]
        return cast("torch.Tensor", _LoraFunction.apply(x, layer.a, layer.b, layer, streams))  # type: ignore[no-untyped-call]

    return forward
