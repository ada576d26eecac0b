"""The step engine: local training of one round on a 4-bit base.

It knows no HTTP, no journal and no globals: the adapter's numbers, the examples, the recipe, the
sampler, the clock and the owner's wishes all come in, an update comes out. The agent, the demo and
the laboratory run this same code.

One step: draw a logical batch, cut it into micro-batches of like length, add up their gradients
in buffers of our own, transform the mean gradient (clip, …), correct it (SCAFFOLD), pull it back to
the round's start (FedProx), step AdamW at the learning rate that the federation's schedule has at
this point. Weights change only at the end of a step, so a pause, a stop or a crash anywhere in it
loses at most that step's work and never changes the result.
"""

import hashlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol, TypeAlias, cast

import numpy as np
import torch

from edge_agent.data.tokens import Example
from edge_agent.errors import OutOfMemoryError, TrainingError, TrainingStoppedError
from edge_agent.training.checkpoint import Progress, Tally, load_state, save_state
from edge_agent.training.control import Control, Unattended, Wish
from edge_agent.training.control_variates import ControlVariates
from edge_agent.training.gradients import (
    Given,
    GradientRule,
    MeanGradient,
    StepGradient,
    Wanted,
    extremes,
    gradients_of,
    is_finite,
)
from edge_agent.training.micro_batches import cut
from edge_agent.training.sampling import BatchSampler
from privacy.updates import PlainUpdate
from protocol.blocks import Schedule, TrainingBlock
from protocol.clock import Clock
from protocol.layout import VectorLayout
from protocol.wire import canonical_json
from quant.adapter import AdapterArrays
from quant.lora import AdaptedModel
from quant.lora_stack import StackSlot
from quant.memory import StepSettings

SAVE_EVERY_STEPS: Final = 10
_PAUSE_POLL_S: Final = 0.5
_NORM_EPS: Final = 1e-6
_FIRST_FP16_LOSS_SCALE: Final = 2.0**12


class GradientTransform(Protocol):
    """A step of the list that a logical batch's gradient goes through after its rule."""

    def __call__(self, gradient: StepGradient, *, step: int) -> None:
        """Change the gradient in place."""
        ...


@dataclass(frozen=True)
class ClipNorm:
    """Scales the mean gradient down to an L2 norm of at most `max_norm` over all tensors."""

    max_norm: float

    def __call__(self, gradient: StepGradient, *, step: int) -> None:  # noqa: ARG002 - interface
        """Clip in place."""
        norm = torch.linalg.vector_norm(gradient.vector)
        gradient.vector.mul_((self.max_norm / (norm + _NORM_EPS)).clamp(max=1.0))


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """An event of a running training. The loss stays on this machine: agents never send it."""

    step: int
    n_steps: int
    loss: float
    learning_rate: float
    n_tokens: int
    """Useful tokens of this step."""


@dataclass(frozen=True, kw_only=True)
class RoundRecipe:
    """What one round of local training needs to know.

    `schedule_start` and `schedule_end` are the fractions of the whole federation between which
    this round lies, so that the learning rate continues across rounds.
    """

    training: TrainingBlock
    schedule_start: float
    schedule_end: float
    seed: int
    """Of dropout; the sampler has its own."""

    def learning_rate(self, step: int, n_steps: int) -> float:
        """The learning rate of step `step` (from 0) of `n_steps`.

        Source: TRAINING, "The stack", 6 and trap 11; the published code of arXiv 2305.05644
        restarts the schedule at every visit.
        """
        span = self.schedule_end - self.schedule_start
        done = self.schedule_start + span * step / n_steps
        peak, final = self.training.learning_rate, self.training.final_frac
        match self.training.schedule:
            case Schedule.CONSTANT:
                return peak
            case Schedule.LINEAR:
                return peak * (1.0 - (1.0 - final) * done)
            case Schedule.COSINE:
                return peak * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done)))


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished round: the update to send and what the owner may see of it."""

    update: PlainUpdate
    n_steps: int
    n_examples: int
    n_tokens: int
    """Useful tokens of all steps, those of earlier starts too."""
    first_loss: float
    last_loss: float
    """NaN where no batch was of anybody."""


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """How a run is watched and kept; only `rule`, `transforms` and `variates` change the update.

    Attributes:
        control: The owner's wishes.
        rule: What a step's gradient is made of.
        transforms: Applied to each step's gradient in order; None: the recipe's clipping of the
            mean, and nothing after a private release.
        variates: SCAFFOLD's, that correct each step's gradient after the transforms; None: none.
        on_progress: Told after every step.
        state_path: Where to keep the state; None: nothing is kept.
        save_every_steps: How often.
        settings: How a step is cut so that it fits, to begin with.
    """

    control: Control = field(default_factory=Unattended)
    rule: GradientRule = field(default_factory=MeanGradient)
    transforms: tuple[GradientTransform, ...] | None = None
    variates: ControlVariates | None = None
    on_progress: Callable[[TrainingProgress], None] | None = None
    state_path: Path | None = None
    save_every_steps: int = SAVE_EVERY_STEPS
    settings: StepSettings = field(default_factory=StepSettings)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """An example of a step's batch, and the seed of its dropout."""

    example: Example
    seed: int

    @property
    def n_tokens(self) -> int:
        return len(self.example.input_ids)


Session: TypeAlias = Generator[Wanted, Given | None, TrainingResult]
"""A training that asks for gradients and is given them."""


class LocalTrainer:
    """Trains one adapter on one owner's examples for one round.

    Guarantees:
        1. With a state file, a run that is killed at any moment and started again gives the same
           weights, bit for bit, as an uninterrupted one on the same CPU with the same thread count.
           (On a GPU, attention's backward adds in no fixed order.)
        2. The gradient does not depend on how a batch is cut into micro-batches, up to float32
           rounding: each example's loss is its own mean, the batch's loss is their mean, and
           dropout is drawn for each example by itself.
        3. The update is finite and not zero, or `TrainingError` is raised (PROTOCOL, check 18).

    Args:
        adapted: The model, or one adapter of several on it; its numbers are replaced by `start`.
        examples: The owner's examples; at least one with loss tokens.
        recipe: The round's recipe.
        sampler: Which examples make up a batch.
        clock: For pauses.
        options: How the run is watched and kept.

    Raises:
        TrainingError: No example has a token to learn.
    """

    def __init__(
        self,
        adapted: AdaptedModel | StackSlot,
        examples: Sequence[Example],
        recipe: RoundRecipe,
        *,
        sampler: BatchSampler,
        clock: Clock,
        options: TrainerOptions | None = None,
    ) -> None:
        """Take the parts; nothing is trained yet."""
        if not any(example.loss_mask[1:].any() for example in examples):
            msg = f"none of the {len(examples)} examples has a token to learn; check the data"
            raise TrainingError(msg)
        self._adapted = adapted
        self._examples = examples
        self._recipe = recipe
        self._sampler = sampler
        self._clock = clock
        self._options = options or TrainerOptions()
        self._rule = self._options.rule
        max_norm = recipe.training.max_grad_norm if isinstance(self._rule, MeanGradient) else None
        default = () if max_norm is None else (ClipNorm(max_norm),)
        transforms = self._options.transforms
        self._transforms = default if transforms is None else transforms
        self._settings, self._variates = self._options.settings, self._options.variates
        self._weights = torch.nn.Parameter(torch.empty(0))
        self._start = torch.empty(0)
        self._anchor: torch.Tensor | None = None
        self._tally = Tally()
        fp16 = adapted.base.compute_dtype is torch.float16
        self._loss_scale = _FIRST_FP16_LOSS_SCALE if fp16 else 1.0

    def run(
        self, start: AdapterArrays | None, layout: VectorLayout, *, weight: int
    ) -> TrainingResult:
        """Train one round from the global adapter; `session` with this trainer's model.

        Args:
            start: The global adapter, all tensors; None: the numbers that the adapter has.
            layout: Of the update: what is trained, by name.
            weight: The update's FedAvg weight.

        Raises:
            Exception: See `session`.
            TypeError: The adapter is one of several: drive the sessions of all.
        """
        session = self.session(start, layout, weight=weight)
        try:
            wanted = next(session)
            while True:
                wanted = session.send(self._answer(wanted))  # held nowhere: it may be large
        except StopIteration as ended:
            return cast("TrainingResult", ended.value)

    def _answer(self, wanted: Wanted) -> Given | None:
        if isinstance(self._adapted, StackSlot):
            msg = "an adapter of a stack is trained by its session"
            raise TypeError(msg)
        try:
            return gradients_of(self._adapted, wanted)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def session(self, start: AdapterArrays | None, layout: VectorLayout, *, weight: int) -> Session:
        """Train one round, leaving forward and backward to whoever drives the session.

        It yields what it wants of the model and is sent the answer, or None where that did not fit
        into memory. Several sessions can so share one pass through a base.

        Args:
            start: The global adapter, all tensors; None: the numbers that the adapter has.
            layout: Of the update: what is trained, by name.
            weight: The update's FedAvg weight.

        Raises:
            TrainingStoppedError: The owner stopped it; the state file holds the progress.
            OutOfMemoryError: Not even one example fits, with activations recomputed.
            TrainingError: A gradient or the update is not finite, the update is zero, or the layout
                is not of what is trained.
            CheckpointError: The state cannot be written.
        """
        block = self._recipe.training
        n_steps = self._sampler.n_steps(
            local_steps=block.local_steps, local_epochs=block.local_epochs
        )
        if not self._adapted.trains(layout):
            msg = "the update's layout is not of the tensors that are trained; nothing is trained"
            raise TrainingError(msg)
        if start is not None:
            self._adapted.load(start)
        self._weights = torch.nn.Parameter(self._adapted.weights)  # the adapter's own numbers
        self._start = self._adapted.weights.to("cpu", copy=True)
        if block.proximal_mu > 0.0:
            self._anchor = self._adapted.weights.clone()
        optimizer = torch.optim.AdamW(
            [self._weights],
            lr=block.learning_rate,
            betas=(block.beta1, block.beta2),
            eps=block.eps,
            weight_decay=block.weight_decay,
        )
        if self._variates is not None:
            self._variates.begin(self._adapted.parts(self._adapted.weights))
        run = "" if self._options.state_path is None else self._run_digest()
        done = self._resume(run, optimizer)
        if done == 0:
            self._save(run, optimizer, 0)  # the settings too: another choice rounds differently
        if not self._adapted.model.training:  # it goes through every module
            self._adapted.model.train()
        for step in range(done, n_steps):
            yield from self._step(optimizer, step, n_steps, run)
            if (step + 1) % self._options.save_every_steps == 0:
                self._save(run, optimizer, step + 1)
        update = self._update(weight)
        return TrainingResult(
            update=update,
            n_steps=n_steps,
            n_examples=len(self._examples),
            n_tokens=self._tally.n_tokens,
            first_loss=math.nan if self._tally.first_loss is None else self._tally.first_loss,
            last_loss=math.nan if self._tally.last_loss is None else self._tally.last_loss,
        )

    def _step(
        self, optimizer: torch.optim.AdamW, step: int, n_steps: int, run: str
    ) -> Generator[Wanted, Given | None, None]:
        batch = [
            _Drawn(
                example=self._examples[int(index)], seed=_mix(self._recipe.seed, step, int(index))
            )
            for index in self._sampler.indices(step)
        ]
        gradient = StepGradient(self._adapted)
        self._rule.begin(gradient, step=step)
        loss_sum = 0.0
        pending = self._cut(batch)
        while pending:
            self._obey(optimizer, step, run)
            micro = pending.pop(0)
            total = yield from self._accumulate(micro, gradient)
            if total is None:
                pending = self._shrink(micro) + pending
            else:
                loss_sum += total
        self._rule.finish(gradient, n_examples=len(batch), step=step)
        if not is_finite(gradient.vector):
            msg = (
                f"training diverged: the gradient of step {step + 1} is not finite; nothing is sent"
            )
            raise TrainingError(msg)
        for transform in self._transforms:
            transform(gradient, step=step)
        if self._variates is not None:
            self._variates.correct(gradient.parts)
        self._pull_back(gradient.vector)
        learning_rate = self._recipe.learning_rate(step, n_steps)
        self._apply(optimizer, gradient.vector, learning_rate)
        loss = loss_sum / len(batch) if batch else math.nan
        n_tokens = sum(drawn.n_tokens for drawn in batch)
        self._tally = self._tally.after(loss if batch else None, n_tokens=n_tokens)
        if self._options.on_progress is not None:
            event = TrainingProgress(
                step=step + 1,
                n_steps=n_steps,
                loss=loss,
                learning_rate=learning_rate,
                n_tokens=n_tokens,
            )
            self._options.on_progress(event)

    def _pull_back(self, gradient: torch.Tensor) -> None:
        """Add the gradient of μ/2 · ‖w − w₀‖², after clipping and noise: it tells nothing new."""
        if self._anchor is not None:
            mu = self._recipe.training.proximal_mu
            gradient.add_(self._adapted.weights - self._anchor, alpha=mu)

    def _cut(self, batch: list[_Drawn]) -> list[list[_Drawn]]:
        micros = cut([drawn.n_tokens for drawn in batch], self._settings)
        return [[batch[position] for position in micro] for micro in micros]

    def _accumulate(
        self, micro: list[_Drawn], total: StepGradient
    ) -> Generator[Wanted, Given | None, float | None]:
        """Add a micro-batch's gradient; its loss sum, or None where it does not fit into memory.

        In that case, and on failure, `total` is as it was.
        """
        while True:
            total.keep()
            given = yield Wanted(
                examples=tuple(drawn.example for drawn in micro),
                dropout_seeds=tuple(drawn.seed for drawn in micro),
                per_example=self._rule.per_example,
                loss_scale=self._loss_scale,
                loss_chunk=self._settings.loss_chunk,
            )
            if given is None:
                return None
            try:
                added = self._rule.add(given, total, loss_scale=self._loss_scale)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                return None
            if added:
                return given.loss_sum
            # float16 overflowed: the same examples again at half the scale, so none is skipped.
            self._loss_scale /= 2.0

    def _shrink(self, micro: list[_Drawn]) -> list[list[_Drawn]]:
        """Halve the micro-batch that did not fit; the last resort is to recompute activations."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest = micro[0].n_tokens
        if len(micro) > 1:
            smaller = max(longest, longest * len(micro) // 2)
            self._settings = replace(self._settings, micro_tokens=smaller)
            return self._cut(micro)
        if self._settings.n_checkpointed_layers < self._adapted.n_layers:
            self._use(replace(self._settings, n_checkpointed_layers=self._adapted.n_layers))
            return [micro]
        msg = (
            f"one example of {longest} tokens does not fit into the memory that is allowed, even "
            "with activations recomputed; raise --max-vram or join with a smaller max_length"
        )
        raise OutOfMemoryError(msg)

    def _use(self, settings: StepSettings) -> None:
        self._settings = settings
        self._adapted.checkpoint_activations(settings.n_checkpointed_layers)

    def _apply(
        self, optimizer: torch.optim.AdamW, gradient: torch.Tensor, learning_rate: float
    ) -> None:
        self._weights.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        self._weights.grad = None

    def _obey(self, optimizer: torch.optim.AdamW, step: int, run: str) -> None:
        """Wait out a pause; leave on a stop. Both keep the weights of the last whole step."""
        wish = self._options.control.wish()
        if wish is Wish.GO:
            return
        self._save(run, optimizer, step)
        while wish is Wish.PAUSE:
            self._clock.sleep(_PAUSE_POLL_S)
            wish = self._options.control.wish()
        if wish is Wish.STOP:
            msg = f"stopped by the owner after {step} steps; it continues from there"
            raise TrainingStoppedError(msg)

    def _run_digest(self) -> str:
        digest = hashlib.sha256()
        recipe = self._recipe
        digest.update(
            canonical_json(
                [
                    recipe.training.as_json(),
                    recipe.schedule_start,
                    recipe.schedule_end,
                    str(recipe.seed),
                    repr(self._sampler),
                    repr(self._rule),
                    repr(self._transforms),
                    *([] if self._variates is None else [repr(self._variates)]),
                ]
            )
        )
        start = self._adapted.arrays()
        for name in sorted(start):
            digest.update(name.encode())
            digest.update(start[name].tobytes())
        for example in self._examples:
            digest.update(example.input_ids.tobytes())
            digest.update(example.loss_mask.tobytes())
        return digest.hexdigest()

    def _resume(self, run: str, optimizer: torch.optim.AdamW) -> int:
        self._use(self._options.settings)
        self._tally = Tally()
        found = (
            None
            if self._options.state_path is None
            else load_state(self._options.state_path, run=run)
        )
        if found is None:
            return 0
        progress, tensors = found
        self._use(progress.settings)
        self._loss_scale, self._tally = progress.loss_scale, progress.tally
        if progress.step == 0:
            return 0
        moments = {
            key: torch.zeros_like(self._adapted.weights) for key in ("exp_avg", "exp_avg_sq")
        }
        for key, vector in {"factor": self._adapted.weights, **moments}.items():
            for name, part in self._adapted.parts(vector).items():
                part.copy_(tensors[f"{key}/{name}"])
        optimizer.state[self._weights] = {"step": tensors["step"].clone(), **moments}
        if self._variates is not None:
            self._variates.restore(tensors)
        return progress.step

    def _save(self, run: str, optimizer: torch.optim.AdamW, step: int) -> None:
        if self._options.state_path is None:
            return
        tensors = {"step": torch.tensor(float(step))}
        if self._variates is not None:
            tensors |= self._variates.tensors()
        state = cast("Mapping[str, torch.Tensor]", optimizer.state.get(self._weights, {}))
        vectors = {key: state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        for key, vector in {"factor": self._adapted.weights, **vectors}.items():
            parts = self._adapted.parts(vector)
            tensors |= {f"{key}/{name}": part for name, part in parts.items()}
        progress = Progress(
            run=run,
            step=step,
            settings=self._settings,
            loss_scale=self._loss_scale,
            tally=self._tally,
        )
        save_state(self._options.state_path, progress, tensors)

    def _update(self, weight: int) -> PlainUpdate:
        # From the model itself: what trains something else must not look as if it had moved it.
        change = torch.sub(self._adapted.weights.cpu(), self._start, out=self._start)
        ends = extremes(change)
        if not all(map(math.isfinite, ends)):
            msg = "training diverged: the update has values that are not finite; nothing is sent"
            raise TrainingError(msg)
        if ends == (0.0, 0.0):
            msg = "training moved no weight: the update is exactly zero; nothing is sent"
            raise TrainingError(msg)
        return PlainUpdate(vector=change.numpy(), weight=weight)


def _mix(seed: int, step: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0])


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: on the CPU, and inside libraries, torch has no class for that.

    Args:
        error: As it was raised.
    """
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in said for sign in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
