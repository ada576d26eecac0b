"""Predicts the peak memory of a training step, term by term.

Arithmetic on a model's shape alone; docs/memory.md derives it. For one decoder layer, e bytes a
number, and a token, our engine keeps

    2 (4h + 4)       the inputs of both norms in float32, and 1/rms
    2 e h            their outputs, each saved once for all adapted layers that read it
    e (2q + 2k)      queries, keys, values, the attention's output
    4 n              the log-sum-exp of each head
    4 e i            gate, its activation, up, their product

with h hidden, i intermediate, q = heads · head size, k = the same of keys, n heads. In 16 bit and
with q = h that is 16h + 4k + 8i + 4n + 8. LoRA's u = x Aᵀ is computed again in backward, so the
rank does not appear (peft keeps 14 r, and with float32 adapters six more copies of the inputs).
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from quant.model_shape import FloatType, LoraShape, ModelShape, Norm

DEFAULT_LOSS_CHUNK: Final = 1024
"""Positions whose logits exist at once."""

_LOGITS_COPIES_BYTES: Final = 16  # logits, their log-softmax, and the gradients of both, float32
_NORM_BACKWARD_BYTES: Final = 24  # six float32 copies of the residual stream
_CUDA_CONTEXT_BYTES: Final = 600_000_000
_CUDA_FRAGMENTATION_FRAC: Final = 0.05
_LSE_ALIGNMENT: Final = 32


MICRO_COST_TOKENS: Final = 128
"""The usual cost of a micro-batch: a dequantisation takes about the time of 100 tokens on a
processor and of 150 on a consumer GPU at 7B."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How one step is cut so that it fits; nothing here changes its gradient.

    Attributes:
        micro_tokens: Token budget of a micro-batch, padding included.
        max_examples: Examples of a micro-batch, where the gradient of each is kept (DP); None: any
            number.
        loss_chunk: Positions whose logits exist at once in the output layer.
        n_checkpointed_layers: Decoder layers, counted from the input, whose activations are
            recomputed in backward; more than the model has means all.
        micro_cost_tokens: What a micro-batch costs besides its tokens, in the time of so many
            tokens: each dequantises the whole base again, and starts every kernel.
    """

    micro_tokens: int = 4096
    max_examples: int | None = None
    loss_chunk: int = DEFAULT_LOSS_CHUNK
    n_checkpointed_layers: int = 0
    micro_cost_tokens: int = MICRO_COST_TOKENS


class Attention(StrEnum):
    """What the attention kernel saves besides queries, keys, values and output."""

    FLASH = "flash"
    """4 bytes a head and token: flash attention on the CPU and on CUDA, and cuDNN's."""
    MEMORY_EFFICIENT = "memory-efficient"
    """The same, with each sequence rounded up to 32 tokens; below compute capability 8.0."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What of a device enters the prediction.

    Attributes:
        compute: Type that the base computes in.
        attention: The kernel that torch chooses there.
        context_bytes: What the driver and its libraries take beside the tensors.
        fragmentation_frac: What the allocator wastes, as a part of the tensors.
        fills: A micro-batch pays a dequantisation of the whole base, so it should be large.
    """

    compute: FloatType
    attention: Attention
    context_bytes: int
    fragmentation_frac: float
    fills: bool

    @classmethod
    def cuda(cls, compute: FloatType = FloatType.BFLOAT16) -> "Device":
        """A CUDA device that computes in this type; float16 means one without native bfloat16."""
        old = compute is FloatType.FLOAT16
        return cls(
            compute=compute,
            attention=Attention.MEMORY_EFFICIENT if old else Attention.FLASH,
            context_bytes=_CUDA_CONTEXT_BYTES,
            fragmentation_frac=_CUDA_FRAGMENTATION_FRAC,
            fills=True,
        )

    @classmethod
    def cpu(cls, compute: FloatType = FloatType.FLOAT32) -> "Device":
        """The CPU: no context and no fragmentation are counted."""
        return cls(
            compute=compute,
            attention=Attention.FLASH,
            context_bytes=0,
            fragmentation_frac=0.0,
            fills=False,
        )


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences that go through the model together, each padded to the same length."""

    n_sequences: int
    length: int

    @property
    def n_tokens(self) -> int:
        """Padding included."""
        return self.n_sequences * self.length


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak memory of a training step, term by term, in bytes.

    Attributes:
        weights: The base.
        adapters: Both factors, float32.
        optimizer: Adam's two moments, float32.
        gradients: Of the micro-batch and their sum over the step, float32.
        per_example: Gradients of the examples in flight (DP).
        activations: What the decoder layers keep until backward.
        output_layer: The last norm, the logits of a chunk and their gradients.
        recomputed: The checkpointed layer whose backward runs, when no layer's memory is free by
            then: with all layers checkpointed.
        backward: Gradients and copies inside the backward pass of one layer.
        dequantized: The largest linear layer in 16 or 32 bit.
        context: Driver and libraries.
        fragmentation: What the allocator wastes.
    """

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    per_example: int
    activations: int
    output_layer: int
    recomputed: int
    backward: int
    dequantized: int
    context: int
    fragmentation: int

    @property
    def standing(self) -> int:
        """What stands between micro-batches, but for context and fragmentation."""
        return self.weights + self.adapters + self.optimizer + self.gradients

    @property
    def step(self) -> int:
        """What a micro-batch adds; the output layer is done before backward begins."""
        passing = max(self.output_layer, self.recomputed + self.backward)
        return self.activations + passing + self.dequantized

    @property
    def total(self) -> int:
        """The peak."""
        return self.standing + self.step + self.per_example + self.context + self.fragmentation


def layer_bytes(
    shape: ModelShape,
    lora: LoraShape,
    device: Device,
    batch: MicroBatch,
    *,
    first: bool = False,
) -> int:
    """Bytes that autograd saves in one decoder layer that is not checkpointed.

    Guarantees:
        1. Equals the sum of the distinct storages that `saved_tensors_hooks` sees in the layer,
           parameters, buffers and the rotary tables apart.

    Args:
        shape: The base.
        lora: The adapter.
        device: Where.
        batch: The micro-batch.
        first: The layer reads the embeddings, which need no gradient, so less is saved.
    """
    size, n_tokens = device.compute.n_bytes, batch.n_tokens
    adapted = lora.modules
    flows = not first  # whether a gradient flows through the tensor at hand
    total = _norm_bytes(shape, shape.hidden, 1, n_tokens) if flows else 0
    if adapted & {"q_proj", "k_proj", "v_proj"}:
        total += size * shape.hidden * n_tokens
    if shape.norms_heads:
        heads = (("q_proj", shape.n_heads), ("k_proj", shape.n_kv_heads))
        for name, n_heads in heads:
            if flows or name in adapted:
                width = n_heads * shape.head_dim
                total += _norm_bytes(shape, width, n_heads, n_tokens)
    attends = flows or bool(adapted & {"q_proj", "k_proj", "v_proj"})
    if attends:
        total += size * (2 * shape.query + 2 * shape.key) * n_tokens
        total += _log_sum_exp_bytes(shape, device, batch)
    elif "o_proj" in adapted:
        total += size * shape.query * n_tokens
    flows = attends or "o_proj" in adapted
    if flows:
        total += _norm_bytes(shape, shape.hidden, 1, n_tokens)
    if adapted & {"gate_proj", "up_proj"}:
        total += size * shape.hidden * n_tokens
    gate, up = flows or "gate_proj" in adapted, flows or "up_proj" in adapted
    # The gate's output for its activation, up for the gate's gradient, the activation for up's.
    n_wide = 2 * gate + up + ("down_proj" in adapted)
    return total + size * shape.intermediate * n_tokens * n_wide


def checkpoint_bytes(shape: ModelShape, device: Device, batch: MicroBatch) -> int:
    """Bytes that a checkpointed decoder layer keeps: its input.

    Args:
        shape: The base.
        device: Where.
        batch: The micro-batch.
    """
    return device.compute.n_bytes * shape.hidden * batch.n_tokens


def _norm_bytes(shape: ModelShape, width: int, n_rows: int, n_tokens: int) -> int:
    # The input in float32 (in float32 already: the input itself) and one over its rms.
    own = 4 * width // n_rows if shape.norm is Norm.GEMMA else 0
    return (4 * width + 4 * n_rows) * n_tokens + own


def _log_sum_exp_bytes(shape: ModelShape, device: Device, batch: MicroBatch) -> int:
    length = batch.length
    if device.attention is Attention.MEMORY_EFFICIENT:
        length = math.ceil(length / _LSE_ALIGNMENT) * _LSE_ALIGNMENT
    return 4 * shape.n_heads * batch.n_sequences * length


def rotary_bytes(shape: ModelShape, device: Device, batch: MicroBatch) -> int:
    """Bytes of the cosines and sines that all layers share.

    Args:
        shape: The base.
        device: Where.
        batch: The micro-batch.
    """
    return 2 * device.compute.n_bytes * shape.head_dim * batch.length


def estimate(
    shape: ModelShape,
    lora: LoraShape,
    *,
    device: Device,
    batch: MicroBatch,
    settings: StepSettings,
    n_dp_examples: int = 0,
) -> MemoryEstimate:
    """Peak memory of a step of our engine.

    Args:
        shape: The base.
        lora: The adapter.
        device: Where.
        batch: The largest micro-batch.
        settings: Chunk and checkpointing; the micro-batch is given apart.
        n_dp_examples: Examples whose gradients are in flight; 0 without DP.

    Raises:
        BaseModelError: The adapter names a module that the model does not have.
    """
    size, n_tokens, hidden = device.compute.n_bytes, batch.n_tokens, shape.hidden
    n_trained = lora.n_parameters(shape, trained=True)
    n_checkpointed = min(settings.n_checkpointed_layers, shape.n_layers)
    n_plain = shape.n_layers - n_checkpointed
    layer = layer_bytes(shape, lora, device, batch)
    activations = n_checkpointed * checkpoint_bytes(shape, device, batch) + n_plain * layer
    if n_checkpointed == 0:
        activations += layer_bytes(shape, lora, device, batch, first=True) - layer
    activations += rotary_bytes(shape, device, batch)
    # Hidden states, those of them with loss, and the gradient of these in float32.
    output_layer = _norm_bytes(shape, hidden, 1, n_tokens) + (2 * size + 4) * hidden * n_tokens
    output_layer += _LOGITS_COPIES_BYTES * shape.vocab * min(n_tokens, settings.loss_chunk)
    recomputed = 0 if n_plain else layer
    if recomputed and device.compute is FloatType.FLOAT32:
        # Its first norm keeps its input as it is: the very tensor that the checkpoint holds.
        recomputed -= checkpoint_bytes(shape, device, batch)
    inside = max(
        recomputed + _inside_layer_bytes(shape, lora, size, n_tokens),
        _NORM_BACKWARD_BYTES * hidden * n_tokens,
    )
    stored = shape.stored or device.compute
    casts = stored is not device.compute
    largest = max(d_out * d_in for d_out, d_in in shape.linears.values())
    found = MemoryEstimate(
        weights=shape.weight_bytes(device.compute),
        adapters=4 * lora.n_parameters(shape),
        optimizer=8 * n_trained,
        gradients=8 * n_trained,
        per_example=4 * n_trained * n_dp_examples,
        activations=activations,
        output_layer=output_layer,
        recomputed=recomputed,
        backward=inside - recomputed,
        dequantized=largest * (size + (stored.n_bytes if casts else 0)),
        context=device.context_bytes,
        fragmentation=0,
    )
    return with_fragmentation(found, device)


def _inside_layer_bytes(shape: ModelShape, lora: LoraShape, size: int, n_tokens: int) -> int:
    """What the backward pass of a layer needs at its widest point, beside what is saved."""
    residual = size * shape.hidden  # the gradient of the layer's output
    # At the product of gate and up: its gradient, and those of its two factors.
    widest = 3 * size * shape.intermediate
    if "down_proj" in lora.modules:
        copied = 0 if size == 4 else 4  # the input in float32, for the gradient of A
        at_down = (size + copied) * shape.intermediate
        widest = max(at_down, widest - size * shape.intermediate)
    return (residual + widest) * n_tokens


def with_fragmentation(found: MemoryEstimate, device: Device) -> MemoryEstimate:
    """The estimate with its fragmentation as a part of its tensors.

    Args:
        found: Whatever stood there is replaced.
        device: Where.
    """
    tensors = found.standing + found.step + found.per_example
    return replace(found, fragmentation=round(device.fragmentation_frac * tensors))
