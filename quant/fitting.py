"""Fits a training step into memory: corrects the prediction by two probe steps, and chooses.

The prediction is `quant.memory`'s. What it cannot know (the libraries' workspaces, the allocator)
grows with the micro-batch or not at all, so two measured steps give a line that holds for all.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from quant.errors import MemoryLimitError
from quant.memory import (
    MICRO_COST_TOKENS,
    Device,
    MemoryEstimate,
    MicroBatch,
    StepSettings,
    estimate,
    with_fragmentation,
)
from quant.model_shape import LoraShape, ModelShape

USABLE_FRAC: Final = 0.92
"""Of the memory that is allowed; beyond it, settings are refused."""
PROBE_TOKENS: Final = (256, 1024)
"""Tokens of the two steps that calibrate the prediction."""

MOST_MICRO_COST_TOKENS: Final = 1 << 16
"""Beyond it, whatever fits is one micro-batch."""

_FILL_TOKENS: Final = 2048
_MOST_TOKENS_GPU: Final = 8192
_MOST_TOKENS_CPU: Final = 4096
_CHUNKS: Final = (1024, 512, 256)
_MIN_DP_EXAMPLES: Final = 4
_MOST_DP_EXAMPLES: Final = 64
_LENGTH_STEP: Final = 64
_LONGEST_SOUGHT: Final = 2**17


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One probe step: what a micro-batch was predicted to add, and what it added."""

    predicted: int
    """`MemoryEstimate.step` of the probe's micro-batch."""
    measured: int
    """Peak of the step minus what stood before it."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Corrects a prediction: a micro-batch adds `offset + slope · predicted`."""

    offset: float = 0.0
    slope: float = 1.0
    micro_cost_tokens: int = MICRO_COST_TOKENS
    """What a micro-batch costs besides its tokens, in the time of so many."""

    def applied(self, found: MemoryEstimate, device: Device) -> MemoryEstimate:
        """The estimate with the terms of a micro-batch corrected.

        Args:
            found: Uncalibrated.
            device: Where.
        """
        scaled = replace(
            found,
            activations=round(self.slope * found.activations),
            output_layer=round(self.slope * found.output_layer),
            recomputed=round(self.slope * found.recomputed),
            backward=round(self.slope * found.backward),
            dequantized=max(0, round(self.slope * found.dequantized + self.offset)),
        )
        return with_fragmentation(scaled, device)


def calibrate(probes: Sequence[Probe]) -> Calibration:
    """Fit offset and slope to two probe steps.

    Guarantees:
        1. With two probes that agree with a line of positive slope, the corrected prediction
           equals both measurements.
        2. It is never below a measurement, whatever the probes say.

    Args:
        probes: Two, the smaller first.

    Raises:
        ValueError: Not two, or nothing was predicted or measured.
    """
    if len(probes) != 2 or any(min(probe.predicted, probe.measured) <= 0 for probe in probes):
        msg = f"calibration takes two probes with sizes above 0, not {list(probes)}"
        raise ValueError(msg)
    small, large = probes
    rise = large.predicted - small.predicted
    slope = (large.measured - small.measured) / rise if rise > 0 else 0.0
    offset = small.measured - slope * small.predicted
    if slope <= 0.0:  # not what memory does: something else moved it meanwhile
        return Calibration(slope=max(probe.measured / probe.predicted for probe in probes))
    return Calibration(offset=offset, slope=slope)


def micro_cost(seconds: Mapping[int, float]) -> int:
    """What a micro-batch costs besides its tokens, from the times of two probe steps.

    On a consumer GPU with a 7B base that is a dequantisation of the weights, some 150 tokens. A
    small base on a fast GPU takes as long as it takes to start its kernels, whatever is in a
    micro-batch: then it is thousands, and padding is cheaper than one micro-batch more.

    Guarantees:
        1. Times of a + b · tokens give a / b.
        2. It is at least the usual cost, and at most `MOST_MICRO_COST_TOKENS`, whatever the times.

    Args:
        seconds: Of two steps, by their tokens.

    Raises:
        ValueError: Not two.
    """
    if len(seconds) != 2:
        msg = f"the cost of a micro-batch takes the times of two steps, not {len(seconds)}"
        raise ValueError(msg)
    (small, small_s), (large, large_s) = sorted(seconds.items())
    slope = (large_s - small_s) / (large - small)
    if slope <= 0.0:
        return MOST_MICRO_COST_TOKENS
    cost = (small_s - slope * small) / slope
    return round(min(MOST_MICRO_COST_TOKENS, max(MICRO_COST_TOKENS, cost)))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to be trained, and where.

    Attributes:
        shape: The base.
        lora: The adapter.
        device: The device.
        max_length: Tokens of the longest example.
        private: Gradients are kept example by example (DP).
    """

    shape: ModelShape
    lora: LoraShape
    device: Device
    max_length: int
    private: bool = False

    def batch(self, micro_tokens: int) -> MicroBatch:
        """The largest micro-batch that a token budget can make.

        Args:
            micro_tokens: The budget; one example always goes, whatever its length.
        """
        n_sequences = max(1, micro_tokens // self.max_length)
        length = max(self.max_length, math.ceil(micro_tokens / n_sequences))
        return MicroBatch(n_sequences=n_sequences, length=length)

    def most_examples(self, micro_tokens: int) -> int | None:
        """Examples that a micro-batch may hold at the least, each with a gradient of its own.

        Without a limit, many short examples would take more memory than few long ones. None: not
        DP.

        Args:
            micro_tokens: The budget.
        """
        if not self.private:
            return None
        return max(_MIN_DP_EXAMPLES, self.batch(micro_tokens).n_sequences)

    def predict(self, settings: StepSettings, calibration: "Calibration | None" = None) -> "Choice":
        """The settings with what they are predicted to need.

        Args:
            settings: Of a step.
            calibration: From probe steps; None: none were run.

        Raises:
            BaseModelError: The adapter names a module that the model does not have.
        """
        batch = self.batch(settings.micro_tokens)
        found = estimate(
            self.shape,
            self.lora,
            device=self.device,
            batch=batch,
            settings=settings,
            n_dp_examples=settings.max_examples or self.most_examples(settings.micro_tokens) or 0,
        )
        if calibration is not None:
            found = calibration.applied(found, self.device)
        return Choice(settings=settings, batch=batch, estimate=found)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings of a step, and what they are predicted to need."""

    settings: StepSettings
    batch: MicroBatch
    estimate: MemoryEstimate


def choose(
    workload: Workload, *, limit_bytes: int, calibration: Calibration | None = None
) -> Choice:
    """The fastest settings that fit.

    On a GPU a micro-batch pays a dequantisation of the whole base, so at least 2,048 tokens are
    filled before a layer is spared its checkpoint; then as few layers as fit are checkpointed.

    Guarantees:
        1. The predicted total is at most 92 % of the limit.
        2. With one checkpointed layer fewer, the same micro-batch and chunk would not fit.
        3. On a GPU a micro-batch below 2,048 tokens is chosen only where none of 2,048 fits.

    Args:
        workload: What is trained, and where.
        limit_bytes: Memory that may be used, the base included.
        calibration: From probe steps; None: none were run.

    Raises:
        MemoryLimitError: Not even one example fits; says what is needed, and what to do.
        BaseModelError: The adapter names a module that the model does not have.
    """
    usable = USABLE_FRAC * limit_bytes
    for settings in _candidates(workload):
        choice = workload.predict(settings, calibration)
        if choice.estimate.total <= usable:
            return _with_more_examples(choice, workload, usable, calibration)
    needed = least(workload, calibration=calibration).estimate.total
    msg = (
        f"training with examples of {workload.max_length:,} tokens needs {needed / 1e9:.1f} GB at "
        f"the least, and {usable / 1e9:.1f} GB ({USABLE_FRAC:.0%} of {limit_bytes / 1e9:.1f} GB) "
        f"may be used: allow {limit_for(needed) / 1e9:.1f} GB, or take shorter examples or a "
        "smaller base"
    )
    raise MemoryLimitError(msg)


def _with_more_examples(
    choice: Choice, workload: Workload, usable: float, calibration: Calibration | None
) -> Choice:
    """Room for the gradients of more examples, so that short ones fill a micro-batch too."""
    while choice.settings.max_examples is not None:
        n_examples = 2 * choice.settings.max_examples
        wider = workload.predict(replace(choice.settings, max_examples=n_examples), calibration)
        if n_examples > _MOST_DP_EXAMPLES or wider.estimate.total > usable:
            break
        choice = wider
    return choice


def least(workload: Workload, *, calibration: Calibration | None = None) -> Choice:
    """The settings that need the least memory, whether they fit or not.

    Args:
        workload: What is trained, and where.
        calibration: From probe steps; None: none were run.

    Raises:
        BaseModelError: The adapter names a module that the model does not have.
    """
    found = [workload.predict(settings, calibration) for settings in _candidates(workload)]
    return min(found, key=lambda choice: choice.estimate.total)


def limit_for(needed_bytes: int) -> int:
    """The smallest limit, in steps of 0.1 GB, under which so much memory may be used.

    Args:
        needed_bytes: A predicted total.
    """
    return math.ceil(needed_bytes / USABLE_FRAC / 1e8) * 100_000_000


def longest_that_fits(workload: Workload, *, limit_bytes: int) -> int | None:
    """The longest example, in steps of 64 tokens, with which the workload fits.

    Args:
        workload: What is trained, and where; its own length is not looked at.
        limit_bytes: Memory that may be used, the base included.

    Returns:
        Tokens, at most what the model knows; None when not even 64 fit.

    Raises:
        BaseModelError: The adapter names a module that the model does not have.
    """
    low, high = 0, min(workload.shape.max_positions, _LONGEST_SOUGHT) // _LENGTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        needed = least(replace(workload, max_length=middle * _LENGTH_STEP)).estimate.total
        low, high = (middle, high) if needed <= USABLE_FRAC * limit_bytes else (low, middle - 1)
    return low * _LENGTH_STEP or None


def _candidates(workload: Workload) -> Iterator[StepSettings]:
    """Settings from the fastest to the smallest."""
    for settings in _cuts(workload):
        yield replace(settings, max_examples=workload.most_examples(settings.micro_tokens))


def _cuts(workload: Workload) -> Iterator[StepSettings]:
    n_layers, longest = workload.shape.n_layers, workload.max_length
    fills = workload.device.fills
    fill = max(longest, _FILL_TOKENS) if fills else longest
    budgets = [*_halved(_MOST_TOKENS_GPU if fills else _MOST_TOKENS_CPU, fill)] or [fill]
    for micro_tokens in budgets:
        yield StepSettings(micro_tokens=micro_tokens)
    for n_checkpointed in range(n_layers + 1):
        for chunk in _CHUNKS:
            yield StepSettings(
                micro_tokens=budgets[-1], loss_chunk=chunk, n_checkpointed_layers=n_checkpointed
            )
    for micro_tokens in (*_halved(budgets[-1] // 2, longest), longest):
        for n_checkpointed in range(n_layers + 1):
            yield StepSettings(
                micro_tokens=micro_tokens,
                loss_chunk=_CHUNKS[-1],
                n_checkpointed_layers=n_checkpointed,
            )


def _halved(value: int, least_value: int) -> Iterator[int]:
    while value >= least_value:
        yield value
        value //= 2
