"""What a step's gradient is made of: the mean over its examples, or a private release.

The engine cuts a logical batch into micro-batches and steps the optimiser; a rule says how a
micro-batch's gradients are taken and what becomes of their sum.
"""

import hashlib
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from edge_agent.data.batches import collate
from edge_agent.data.tokens import Example
from edge_agent.errors import TrainingError
from privacy.dp_sgd.mechanism import Mechanism, Noise, clip_and_add, release
from privacy.errors import ClippingError
from privacy.noise import SecureStream
from quant.lora import AdaptedModel
from quant.lora_vector import OneAdapter
from quant.loss import example_losses

Gradients = dict[str, torch.Tensor]

NOISE_PURPOSE: Final = "sheepfold/dp-sgd/noise"
_MOST_NOISE_THREADS: Final = 8
_PART_VALUES: Final = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a step asks of a model: the gradients of a micro-batch.

    Attributes:
        examples: At least one.
        dropout_seeds: One for each example.
        per_example: Each example's gradient by itself, not their sum.
        loss_scale: What the losses are multiplied by before backward, and gradients divided by.
        loss_chunk: Positions whose logits exist at once.
    """

    examples: tuple[Example, ...]
    dropout_seeds: tuple[int, ...]
    per_example: bool
    loss_scale: float
    loss_chunk: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """What a model answers.

    Attributes:
        loss_sum: Over the examples.
        gradient: Of the sum of the losses, [n_trained] in the order of the adapter's `weights`; the
            model's next answer takes its place. None where each example's was asked for.
        by_example: Of each, [B, *shape] by tensor name; empty where the sum's was asked for.
    """

    loss_sum: float
    gradient: torch.Tensor | None = None
    by_example: Gradients = field(default_factory=dict)

    def at_scale(self, loss_scale: float) -> Self:
        """Divide the gradients by what the losses were multiplied by.

        Args:
            loss_scale: Of what was wanted.
        """
        if loss_scale != 1.0:
            for gradient in self.by_example.values() if self.gradient is None else (self.gradient,):
                gradient.div_(loss_scale)
        return self


class StepGradient:
    """The gradient of a step, zero to begin with.

    Args:
        adapter: Whose.
    """

    def __init__(self, adapter: OneAdapter) -> None:
        """Nothing is made yet."""
        self._adapter = adapter
        self._vector: torch.Tensor | None = None
        self._is_lent = False

    @property
    def vector(self) -> torch.Tensor:
        """[n_trained], in the order of the adapter's `weights`: changed in place."""
        if self._vector is None:
            self._vector = torch.zeros_like(self._adapter.weights)
        return self._vector

    @cached_property
    def parts(self) -> Gradients:
        """By tensor name: views of the vector, which nothing may be added to as a whole by then."""
        return self._adapter.parts(self.vector)

    def add(self, gradient: torch.Tensor) -> None:
        """Add a gradient of the model's; the first is not copied until `keep`.

        Args:
            gradient: [n_trained].
        """
        if self._vector is None:
            self._vector, self._is_lent = gradient, True
        else:
            self._vector += gradient

    def keep(self) -> None:
        """Make the sum so far our own: the model is about to make another gradient."""
        if self._is_lent and self._vector is not None:
            self._vector, self._is_lent = self._vector.clone(), False


def extremes(vector: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest value; NaN where one is, and infinite where one is.

    Whether all values are finite, or all zero, is so told in a tenth of the time that torch's
    `isfinite` and `any` take.

    Args:
        vector: At least one value.
    """
    smallest, largest = torch.aminmax(vector)
    return float(smallest), float(largest)


def is_finite(vector: torch.Tensor) -> bool:
    """Whether all values are.

    Args:
        vector: At least one value.
    """
    return all(map(math.isfinite, extremes(vector)))


def gradients_of(adapted: AdaptedModel, wanted: Wanted) -> Given:
    """Go forward and backward through a micro-batch.

    Args:
        adapted: The model, with its adapter.
        wanted: The examples, and what is asked of them.

    Raises:
        TrainingError: Gradients of single examples are asked for, and something is trained that has
            none.
    """
    device = adapted.base.device
    batch = collate(wanted.examples, pad_id=adapted.base.pad_id)
    adapted.seed_dropout(wanted.dropout_seeds)
    gradient = None if wanted.per_example else adapted.fresh_gradient()
    if gradient is None:
        adapted.clear_gradients()
    losses = example_losses(
        adapted.model,
        input_ids=batch.input_ids.to(device),
        loss_mask=batch.loss_mask.to(device),
        chunk=wanted.loss_chunk,
    )
    total = losses.sum() * wanted.loss_scale
    by_example: Gradients = {}
    if gradient is None:
        with adapted.per_example_gradients() as by_example:
            total.backward()
        _require_examples(adapted)
    else:
        total.backward()
    loss_sum = float(losses.detach().sum())
    given = Given(loss_sum=loss_sum, gradient=gradient, by_example=by_example)
    return given.at_scale(wanted.loss_scale)


def _require_examples(adapted: AdaptedModel) -> None:
    """Whatever gets a gradient in the ordinary way goes past the clipping."""
    for name, parameter in adapted.model.named_parameters():
        if parameter.grad is not None:
            msg = (
                f"differential privacy is asked for, and {name} is trained as a whole: its "
                "gradient cannot be clipped example by example; nothing is trained"
            )
            raise TrainingError(msg)


class GradientRule(Protocol):
    """How the gradients of a logical batch become the one that the optimiser gets."""

    @property
    def per_example(self) -> bool:
        """Whether it takes the gradient of each example by itself."""
        ...

    def begin(self, total: StepGradient, *, step: int) -> None:
        """A step begins; its gradients will be summed in `total`, which is zero."""
        ...

    def add(self, found: Given, total: StepGradient, *, loss_scale: float) -> bool:
        """Add the gradients of a micro-batch.

        Returns:
            False where the gradients overflowed at this loss scale; nothing was added.
        """
        ...

    def finish(self, total: StepGradient, *, n_examples: int, step: int) -> None:
        """Make the step's gradient of the sum over `n_examples`, in place."""
        ...


@dataclass(frozen=True)
class MeanGradient:
    """The mean over the examples. Not private."""

    @property
    def per_example(self) -> bool:
        """No."""
        return False

    def begin(self, total: StepGradient, *, step: int) -> None:
        """Nothing is to be prepared."""

    def add(self, found: Given, total: StepGradient, *, loss_scale: float) -> bool:
        """Add the gradient of the losses' sum.

        Raises:
            TypeError: The gradients are of single examples.
        """
        if found.gradient is None:
            msg = "the gradient of a sum is needed, not those of single examples"
            raise TypeError(msg)
        if loss_scale > 1.0 and not is_finite(found.gradient):
            return False
        total.add(found.gradient)
        return True

    def finish(self, total: StepGradient, *, n_examples: int, step: int) -> None:  # noqa: ARG002 - interface
        """Divide by the number of examples."""
        # torch divides by a whole number three times as slowly
        total.vector.div_(float(max(1, n_examples)))


class StepNoise:
    """Standard normal numbers for the steps of one training.

    Guarantees:
        1. The same secret, step and place give the same number, whoever makes it when; any other
           gives an independent one.

    Args:
        secret: At least 32 bytes.
        n_threads: Threads that make a step's noise while the device is at work; 0: made when it
            is asked for. A 7B base's adapter takes seconds of one core for each step.
    """

    def __init__(self, secret: bytes, *, n_threads: int = 0) -> None:
        """Nothing is made yet."""
        self._secret = secret
        self._threads = ThreadPoolExecutor(n_threads) if n_threads else None
        self._begun: dict[tuple[int, int], Future[NDArray[np.float64]]] = {}

    def begin(self, step: int, n_values: int) -> None:
        """Let the threads, where there are any, make a step's numbers."""
        if self._threads is not None:
            for future in self._begun.values():  # of a step that was given up
                future.cancel()
            self._begun = {
                (step, part): self._threads.submit(self._make, step, part)
                for part in range(-(-n_values // _PART_VALUES))
            }

    def of_step(self, step: int) -> Noise:
        """Gives a step's numbers one after the other."""
        part, left = 0, np.empty(0)

        def take(n_values: int) -> NDArray[np.float64]:
            nonlocal part, left
            while len(left) < n_values:
                begun = self._begun.pop((step, part), None)
                made = self._make(step, part) if begun is None else begun.result()
                left, part = np.concatenate([left, made]), part + 1
            taken, left = left[:n_values], left[n_values:]
            return taken

        return take

    def _make(self, step: int, part: int) -> NDArray[np.float64]:
        values = np.empty(_PART_VALUES, np.float64)
        SecureStream.of(self._secret, f"{NOISE_PURPOSE}/{part}", step).fill_normal(values)
        return values


def noise_threads(device: torch.device, *, allowed: int | None) -> int:
    """How many threads should make noise beside a training.

    Args:
        device: Where it runs. A CPU's cores are at work already.
        allowed: How many threads the owner allows; None: any number.
    """
    if device.type == "cpu":
        return 0
    half = max(1, (os.cpu_count() or 1) // 2)
    return min(_MOST_NOISE_THREADS, half, allowed or _MOST_NOISE_THREADS)


@dataclass(frozen=True, kw_only=True)
class PrivateGradient:
    """DP-SGD (profile P1): each example's gradient clipped, noise on the sum, a fixed divisor.

    Guarantees:
        1. One example changes the sum of a step by at most the clip norm, whatever its gradient,
           also one that is not finite.
        2. The same secret and step give the same noise, so a step that is done again after a crash
           releases nothing new; another secret or step gives independent noise.
        3. Nothing that is trained goes without a gradient of single examples.

    Args:
        mechanism: Clip norm, noise multiplier, expected batch size.
        secret: At least 32 bytes of this attempt, of the system's generator; they stay here.
        n_noise_threads: See `StepNoise`.
    """

    mechanism: Mechanism
    secret: bytes = field(repr=False)
    n_noise_threads: int = 0
    _noise: StepNoise = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Get the threads ready."""
        noise = StepNoise(self.secret, n_threads=self.n_noise_threads)
        object.__setattr__(self, "_noise", noise)

    def __repr__(self) -> str:
        """For the digest of a run: another secret is another run, and nobody reads it from here."""
        known = hashlib.sha256(self.secret).hexdigest()
        return f"PrivateGradient({self.mechanism!r}, secret sha256:{known})"

    @property
    def per_example(self) -> bool:
        """Yes."""
        return True

    def begin(self, total: StepGradient, *, step: int) -> None:
        """Begin to make the step's noise, where there are threads for it."""
        self._noise.begin(step, total.vector.numel())

    def add(self, found: Given, total: StepGradient, *, loss_scale: float) -> bool:  # noqa: ARG002 - interface
        """Clip and add the gradients of single examples; never False.

        One that overflowed adds zero. Trying all again at another scale would let it show in how
        the others are rounded.

        Raises:
            TrainingError: Something is trained that cannot be clipped.
        """
        try:
            clip_and_add(found.by_example, total.parts, clip_norm=self.mechanism.clip_norm)
        except ClippingError as error:
            msg = f"differential privacy is asked for, and {error}; nothing is trained"
            raise TrainingError(msg) from error
        return True

    def finish(self, total: StepGradient, *, n_examples: int, step: int) -> None:  # noqa: ARG002 - interface
        """Add the noise and divide by the expected batch size, whatever was drawn."""
        release(total.parts, self.mechanism, self._noise.of_step(step))
