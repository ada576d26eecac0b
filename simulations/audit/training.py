"""The training that is audited: the agent's own engine, watched step by step."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

from edge_agent.data.batches import collate
from edge_agent.data.tokens import Example
from edge_agent.training.gradients import GradientRule, MeanGradient, PrivateGradient, StepGradient
from edge_agent.training.sampling import BatchSampler, PoissonBatches, ShuffledBatches
from edge_agent.training.trainer import (
    ClipNorm,
    GradientTransform,
    LocalTrainer,
    RoundRecipe,
    TrainerOptions,
)
from privacy.noise import KEY_BYTES
from protocol.blocks import LoraBlock, TrainingBlock
from protocol.clock import SystemClock
from quant.adapter import (
    AdapterArrays,
    Float32Array,
    adapter_shapes,
    flatten,
    initial_adapter,
    sent_layout,
)
from quant.base_model import LoadedBase
from quant.lora import AdaptedModel
from quant.loss import example_losses
from simulations.audit.recipe import Claim

_MICRO_TOKENS: Final = 2048


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """What one step released: the gradient that the optimiser got, and where it was taken.

    Attributes:
        weights: The adapter before the step.
        gradient: The mean over the batch [n_values] in the layout's order: with noise as
            released, without noise before the mean is clipped.
        divisor: What the sum over the batch was divided by: known to all, with noise fixed.
    """

    weights: AdapterArrays
    gradient: Float32Array
    divisor: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A finished training, with all that was seen of it."""

    start: AdapterArrays
    final: AdapterArrays
    update: Float32Array
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class _StepRecorder:
    """A step of the trainer's list that changes nothing and notes everything."""

    subject: "Subject"
    sampler: BatchSampler
    expected_batch: float | None
    """None: each step divides by what it drew."""
    steps: list[Step] = field(default_factory=list)

    def __repr__(self) -> str:
        """For the digest of a run."""
        return "StepRecorder()"

    def __call__(self, gradient: StepGradient, *, step: int) -> None:
        """Note the gradient and the weights."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in gradient.parts.items()}
        drawn = float(len(self.sampler.indices(step)))
        self.steps.append(
            Step(
                weights=self.subject.adapted.arrays(),
                gradient=flatten(arrays, self.subject.layout),
                divisor=drawn if self.expected_batch is None else self.expected_batch,
            )
        )


class Subject:
    """A base with an adapter that is trained and looked into.

    Guarantees:
        1. `train` is the agent's `LocalTrainer` with the rule and the sampler that an agent has:
           `PrivateGradient` on `PoissonBatches`, or without noise `MeanGradient` on
           `ShuffledBatches` and the recipe's clipping of the mean.
        2. Watching changes no number of the update.

    Args:
        base: Without an adapter; use `close` to give it back.
        lora: The adapter's shape.
    """

    def __init__(self, base: LoadedBase, lora: LoraBlock) -> None:
        """Attach an adapter."""
        self.base = base
        self.adapted = AdaptedModel(base, lora)
        self.layout = sent_layout(adapter_shapes(base.description, lora), lora.sent)
        self.start = initial_adapter(base.description, lora)
        self._pad_id = base.pad_id

    def close(self) -> None:
        """Give the base back as it was."""
        self.adapted.detach()

    def train(
        self,
        examples: Sequence[Example],
        block: TrainingBlock,
        claim: Claim,
        *,
        seed: int,
        clip_norm: float,
        n_examples: float | None = None,
        start: AdapterArrays | None = None,
        secret: bytes | None = None,
    ) -> Trained:
        """Train one round and note every step.

        Args:
            examples: At least one.
            block: The recipe.
            claim: Says whether there is noise, how much, and the sampling probability.
            seed: Of the order of the records where there is no noise.
            clip_norm: Of an example's gradient, where there is noise.
            n_examples: By which the divisor is fixed; None: how many there are.
            start: The adapter to begin with; None: a fresh one.
            secret: Of noise and sampling, 32 bytes; None draws them from the operating system.

        Raises:
            TrainingError: It gave nothing, or diverged.
        """
        begin = self.start if start is None else start
        rule: GradientRule = MeanGradient()
        sampler: BatchSampler = ShuffledBatches(
            n_examples=len(examples), batch_size=min(block.batch_size, len(examples)), seed=seed
        )
        expected_batch: float | None = None
        after: tuple[GradientTransform, ...] = ()
        if claim.noise_multiplier is not None:
            hidden = os.urandom(KEY_BYTES) if secret is None else secret
            n_fixed = float(len(examples)) if n_examples is None else n_examples
            mechanism = claim.mechanism(clip_norm=clip_norm, n_examples=n_fixed)
            expected_batch = mechanism.expected_batch
            rule = PrivateGradient(mechanism=mechanism, secret=hidden)
            sampler = PoissonBatches(
                n_examples=len(examples), probability=claim.sampling_probability, secret=hidden
            )
        elif block.max_grad_norm is not None:
            after = (ClipNorm(block.max_grad_norm),)
        recorder = _StepRecorder(self, sampler, expected_batch)
        trainer = LocalTrainer(
            self.adapted,
            examples,
            RoundRecipe(training=block, schedule_start=0.0, schedule_end=1.0, seed=seed),
            sampler=sampler,
            clock=SystemClock(),
            options=TrainerOptions(rule=rule, transforms=(recorder, *after)),
        )
        result = trainer.run(begin, self.layout, weight=1)
        return Trained(
            start=begin,
            final=self.adapted.arrays(),
            update=result.update.vector,
            steps=tuple(recorder.steps),
        )

    def gradients(self, weights: AdapterArrays, examples: Sequence[Example]) -> Float32Array:
        """Each example's gradient [n, n_values], in the layout's order.

        Args:
            weights: The adapter at which they are taken.
            examples: At least one.
        """
        self.adapted.load(weights)
        found = np.empty((len(examples), self.layout.n_values), np.float32)
        for rows in _micro_batches(examples):
            batch = collate([examples[row] for row in rows], self._pad_id)
            with self.adapted.per_example_gradients() as parts:
                losses = example_losses(
                    self.adapted.model,
                    input_ids=batch.input_ids.to(self.base.device),
                    loss_mask=batch.loss_mask.to(self.base.device),
                )
                losses.sum().backward()
            for slot, where in self.layout.slices():
                found[rows, where] = parts[slot.name].flatten(1).cpu().numpy()
        return found

    def losses(self, weights: AdapterArrays, examples: Sequence[Example]) -> np.ndarray:
        """Each example's loss [n] float64 under an adapter.

        Args:
            weights: The adapter.
            examples: At least one.
        """
        self.adapted.load(weights)
        return losses_of(self.adapted, examples, pad_id=self._pad_id)


def losses_of(adapted: AdaptedModel, examples: Sequence[Example], *, pad_id: int) -> np.ndarray:
    """Each example's loss [n] float64 under the model as it stands.

    Args:
        adapted: The model.
        examples: At least one.
        pad_id: Any token.
    """
    found = np.empty(len(examples), np.float64)
    device = adapted.base.device
    with torch.inference_mode():
        for rows in _micro_batches(examples):
            batch = collate([examples[row] for row in rows], pad_id)
            losses = example_losses(
                adapted.model,
                input_ids=batch.input_ids.to(device),
                loss_mask=batch.loss_mask.to(device),
            )
            found[rows] = losses.double().cpu().numpy()
    return found


def _micro_batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Indices of like length, longest first, each batch within the budget once padded."""
    sizes = [example.input_ids.size for example in examples]
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batch and (len(batch) + 1) * sizes[batch[0]] > _MICRO_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    yield batch
