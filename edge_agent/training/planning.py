"""Chooses how a step is cut on this machine: from a prediction, and on a GPU from two probe steps.

What is chosen changes the speed and never the gradient. When it turns out too much all the same
(another program took memory), the trainer halves it.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

import psutil
import torch

from edge_agent.errors import OutOfMemoryError
from protocol.blocks import LoraBlock
from quant.base_model import LoadedBase
from quant.errors import BaseModelError, MemoryLimitError
from quant.fitting import (
    PROBE_TOKENS,
    Calibration,
    Choice,
    Probe,
    Workload,
    calibrate,
    choose,
    least,
    micro_cost,
)
from quant.lora import AdaptedModel
from quant.loss import example_losses
from quant.memory import Device, StepSettings
from quant.model_shape import FloatType, LoraShape, read_shape

_GB: Final = 1e9
_FREE_RAM_FRAC: Final = 0.5
_N_TIMED: Final = 3


class Meter(Protocol):
    """Measures a device's memory."""

    def limit_bytes(self) -> int:
        """What this process may use in all, what it holds and the driver's part included."""
        ...

    def added_bytes(self, work: Callable[[], None]) -> int:
        """The most that `work` holds at once, beyond what stood before it.

        Raises:
            torch.OutOfMemoryError: It does not fit.
        """
        ...

    def seconds(self, work: Callable[[], None]) -> float:
        """How long `work` takes there."""
        ...


@dataclass(frozen=True, kw_only=True)
class CudaMeter:
    """Measures a CUDA device by torch's own counters of allocated tensors.

    Attributes:
        device: The device.
        max_bytes: The owner's `--max-vram`; None: whatever is free.
        context_bytes: What driver and libraries hold outside torch's counters.
    """

    device: torch.device
    max_bytes: int | None
    context_bytes: int

    def limit_bytes(self) -> int:
        """What is free, and what this process holds already; at most what the owner allows."""
        free, _ = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device) + self.context_bytes
        return free + held if self.max_bytes is None else min(free + held, self.max_bytes)

    def added_bytes(self, work: Callable[[], None]) -> int:
        """The peak of allocated tensors during `work`, less what was allocated before.

        Raises:
            torch.OutOfMemoryError: It does not fit.
        """
        gc.collect()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def seconds(self, work: Callable[[], None]) -> float:
        """From its first kernel to its last, the waiting for kernels that start late included."""
        torch.cuda.synchronize(self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.current_stream(self.device))
        work()
        end.record(torch.cuda.current_stream(self.device))
        torch.cuda.synchronize(self.device)
        elapsed_ms: float = begin.elapsed_time(end)
        return elapsed_ms / 1000.0


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """How steps are cut, and one line for the owner."""

    settings: StepSettings
    text: str


def choose_settings(
    adapted: AdaptedModel,
    *,
    longest: int,
    private: bool = False,
    max_vram_bytes: int | None = None,
    meter: Meter | None = None,
    free_ram_bytes: int | None = None,
) -> Chosen:
    """The fastest settings that fit on this machine.

    Guarantees:
        1. The adapter's numbers and torch's generators are as they were.
        2. A base whose memory cannot be predicted, and a CPU short of memory, train all the same.

    Args:
        adapted: The base on its device with the federation's adapter.
        longest: Tokens of the owner's longest example.
        private: Gradients are kept example by example.
        max_vram_bytes: The owner's `--max-vram`; None: whatever is free.
        meter: Of the device; None: torch's counters on CUDA, no probe steps on the CPU.
        free_ram_bytes: For the CPU; None: what the system says.

    Raises:
        OutOfMemoryError: Not even one example fits on the GPU; says what is needed.
    """
    try:
        workload = workload_of(adapted, longest=longest, private=private)
    except BaseModelError as error:
        settings = StepSettings()
        text = (
            f"steps of up to {settings.micro_tokens:,} tokens, halved if they do not fit: {error}"
        )
        return Chosen(settings=settings, text=text)
    if meter is None:
        meter = _meter_of(adapted.base, workload, max_vram_bytes)
    if meter is None:
        free = psutil.virtual_memory().available if free_ram_bytes is None else free_ram_bytes
        return _choose_on_cpu(workload, free)
    limit = meter.limit_bytes()
    chosen: Choice | None = None
    calibration: Calibration | None = None
    failure = ""
    try:
        first = choose(workload, limit_bytes=limit)
        calibration = measure(adapted, workload, first, meter)
        chosen = choose(workload, limit_bytes=limit, calibration=calibration)
    except MemoryLimitError as error:
        raise OutOfMemoryError(str(error)) from error
    except torch.OutOfMemoryError as error:
        failure = str(error)  # and no more: the traceback holds the tensors that did not fit
    if chosen is None:
        # Less is free than the driver says. The smallest steps may still fit, and the trainer tells
        # the owner when they do not.
        torch.cuda.empty_cache()
        smallest = least(workload)
        text = (
            f"a probe step did not fit, so the smallest: {_described(smallest, workload)} "
            f"({failure})"
        )
        return Chosen(settings=smallest.settings, text=text)
    settings = chosen.settings
    if calibration is not None:
        settings = replace(settings, micro_cost_tokens=calibration.micro_cost_tokens)
    how = "predicted" if calibration is None else "predicted after two probe steps"
    used, allowed = chosen.estimate.total / _GB, limit / _GB
    return Chosen(
        settings=settings,
        text=f"{_described(chosen, workload)}; {used:.1f} of {allowed:.1f} GB, {how}",
    )


def fitting_rank(
    base: LoadedBase,
    lora: LoraBlock,
    *,
    lowest: int,
    longest: int,
    private: bool = False,
    max_vram_bytes: int | None = None,
    meter: Meter | None = None,
) -> int:
    """The largest rank whose training fits on a GPU: halved until it does.

    Guarantees:
        1. From `lowest` to `lora.rank`; the latter on a CPU, and where nothing can be predicted.

    Args:
        base: On its device.
        lora: The adapter as it would be attached.
        lowest: The federation's smallest rank.
        longest: Tokens of the owner's longest example.
        private: Gradients are kept example by example.
        max_vram_bytes: The owner's `--max-vram`; None: whatever is free.
        meter: Of the device; None: torch's counters on CUDA.
    """
    try:
        workload = _workload(base, lora, longest=longest, private=private)
    except BaseModelError:
        return lora.rank
    if meter is None:
        meter = _meter_of(base, workload, max_vram_bytes)
    if meter is None:
        return lora.rank
    rank, limit = lora.rank, meter.limit_bytes()
    while rank > lowest:
        shape = replace(workload.lora, rank=rank)
        try:
            choose(replace(workload, lora=shape), limit_bytes=limit)
        except MemoryLimitError:
            rank = max(lowest, rank // 2)
        else:
            break
    return rank


def _meter_of(base: LoadedBase, workload: Workload, max_vram_bytes: int | None) -> Meter | None:
    if base.device.type != "cuda":
        return None
    context_bytes = workload.device.context_bytes
    return CudaMeter(device=base.device, max_bytes=max_vram_bytes, context_bytes=context_bytes)


def workload_of(adapted: AdaptedModel, *, longest: int, private: bool = False) -> Workload:
    """What is to be trained, as the prediction wants to know it.

    Args:
        adapted: The base on its device with its adapter.
        longest: Tokens of the longest example.
        private: Gradients are kept example by example.

    Raises:
        BaseModelError: A base, or an adapter, whose memory cannot be predicted.
    """
    return _workload(adapted.base, adapted.lora, longest=longest, private=private)


def _workload(base: LoadedBase, lora: LoraBlock, *, longest: int, private: bool) -> Workload:
    compute = FloatType(str(base.compute_dtype).removeprefix("torch."))
    on_cuda = base.device.type == "cuda"
    name = base.description.base.model
    workload = Workload(
        shape=read_shape(base.model.config.to_dict(), name=name),
        lora=LoraShape.of(lora),
        device=Device.cuda(compute) if on_cuda else Device.cpu(compute),
        max_length=max(1, longest),
        private=private,
    )
    workload.lora.n_parameters(workload.shape)  # refuses modules that are not of the class
    return workload


def measure(
    adapted: AdaptedModel, workload: Workload, choice: Choice, meter: Meter
) -> Calibration | None:
    """Correct the prediction by steps of 256 and of 1,024 tokens with the chosen settings.

    Args:
        adapted: The base on its device with its adapter.
        workload: What is trained.
        choice: What would be chosen without; its micro-batch is at least as large as the probes.
        meter: Of the device.

    Returns:
        None when the chosen micro-batch is too small to be probed.

    Raises:
        torch.OutOfMemoryError: A probe does not fit.
    """
    if choice.batch.n_tokens < max(PROBE_TOKENS):
        return None
    adapted.checkpoint_activations(choice.settings.n_checkpointed_layers)
    adapted.model.train()
    try:
        _probe(
            adapted, min(PROBE_TOKENS), choice.settings
        )  # libraries set up their workspaces once
        probes = [_measured(adapted, workload, choice, meter, n) for n in sorted(PROBE_TOKENS)]
        seconds = {n: _timed(adapted, choice, meter, n) for n in PROBE_TOKENS}
    finally:
        adapted.checkpoint_activations(0)
        adapted.clear_gradients()
    return replace(calibrate(probes), micro_cost_tokens=micro_cost(seconds))


def _measured(
    adapted: AdaptedModel, workload: Workload, choice: Choice, meter: Meter, n_tokens: int
) -> Probe:
    probed = replace(workload, max_length=n_tokens)
    settings = replace(choice.settings, micro_tokens=n_tokens)
    measured = meter.added_bytes(lambda: _probe(adapted, n_tokens, settings))
    return Probe(predicted=probed.predict(settings).estimate.step, measured=measured)


def _timed(adapted: AdaptedModel, choice: Choice, meter: Meter, n_tokens: int) -> float:
    """The shortest of a few, as others disturb only one way."""
    settings = replace(choice.settings, micro_tokens=n_tokens)
    return min(meter.seconds(lambda: _probe(adapted, n_tokens, settings)) for _ in range(_N_TIMED))


def _probe(adapted: AdaptedModel, n_tokens: int, settings: StepSettings) -> None:
    """A forward and a backward pass over any tokens; no weight moves."""
    device = adapted.base.device
    n_known = int(adapted.base.model.config.vocab_size)
    ids = torch.arange(n_tokens, device=device).remainder(n_known).unsqueeze(0)  # [1, T]
    adapted.seed_dropout([0])
    losses = example_losses(
        adapted.model,
        input_ids=ids,
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
        chunk=settings.loss_chunk,
    )
    torch.autograd.backward(losses.sum())
    adapted.clear_gradients()


def _choose_on_cpu(workload: Workload, free_bytes: int) -> Chosen:
    # The base is loaded, so it is not of what is free.
    weights = workload.shape.weight_bytes(workload.device.compute)
    limit = weights + int(_FREE_RAM_FRAC * free_bytes)
    try:
        chosen = choose(workload, limit_bytes=limit)
    except MemoryLimitError:
        chosen = least(workload)
        return Chosen(
            settings=chosen.settings,
            text=f"{free_bytes / _GB:.1f} GB are free, so the smallest: "
            f"{_described(chosen, workload)}",
        )
    return Chosen(settings=chosen.settings, text=_described(chosen, workload))


def _described(choice: Choice, workload: Workload) -> str:
    settings, n_layers = choice.settings, workload.shape.n_layers
    n_recomputed = min(settings.n_checkpointed_layers, n_layers)
    text = f"steps of up to {max(settings.micro_tokens, workload.max_length):,} tokens"
    if n_recomputed:
        text += f", {n_recomputed} of {n_layers} layers computed twice to save memory"
    return text
