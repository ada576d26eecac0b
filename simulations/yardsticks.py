"""What a federation is measured against: the base, each agent alone, all data in one place.

They train with the agent's own engine, recipe and base, so the only thing that differs is who sees
which records.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from edge_agent.data.records import Record
from edge_agent.data.tokens import tokenize
from edge_agent.evaluation import held_out_loss, score_answers
from edge_agent.training.sampling import ShuffledBatches
from edge_agent.training.trainer import LocalTrainer, RoundRecipe, TrainerOptions, TrainingProgress
from protocol.blocks import TrainingBlock
from protocol.clock import SystemClock
from quant.adapter import AdapterArrays, adapter_shapes, sent_layout, unflatten
from quant.lora import AdaptedModel


def train_in_one_place(
    adapted: AdaptedModel,
    records: Sequence[Record],
    block: TrainingBlock,
    start: AdapterArrays,
    *,
    n_steps: int,
    seed: int,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> AdapterArrays:
    """Train on records without a federation, over the whole learning-rate schedule.

    Args:
        adapted: The model; holds the trained adapter afterwards.
        records: At least one usable.
        block: The federation's recipe; its `local_steps` or `local_epochs` are replaced.
        start: The adapter to begin with: the federation's release 0.
        n_steps: Optimiser steps in all.
        seed: Of the order of the records.
        on_progress: Told after every step.

    Returns:
        The trained adapter, all tensors.
    """
    data = tokenize(
        records,
        adapted.base.tokenizer,
        template=block.template,
        loss_on=block.loss_on,
        max_length=block.max_length,
    )
    whole = block.model_copy(update={"local_steps": n_steps, "local_epochs": None})
    trainer = LocalTrainer(
        adapted,
        data.examples,
        RoundRecipe(training=whole, schedule_start=0.0, schedule_end=1.0, seed=seed),
        sampler=ShuffledBatches(
            n_examples=len(data.examples), batch_size=block.batch_size, seed=seed
        ),
        clock=SystemClock(),
        options=TrainerOptions(on_progress=on_progress),
    )
    shapes = adapter_shapes(adapted.base.description, adapted.lora)
    layout = sent_layout(shapes, adapted.lora.sent)
    update = unflatten(trainer.run(start, layout, weight=1).update.vector, layout)
    return {
        name: array + update[name] if name in update else array for name, array in start.items()
    }


@dataclass(frozen=True, kw_only=True)
class SeedScore:
    """One model on one draw of held-out records; each mapping is by category."""

    exact_match: Mapping[str, float]
    loss: Mapping[str, float]
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelScore:
    """One model on all draws.

    "Average" is the mean over categories, which count alike; the spread is the standard deviation
    of that average over the draws.
    """

    seeds: tuple[SeedScore, ...]

    def average(self, measure: str) -> float:
        """Mean over draws of the average over categories; `measure` is a field of `SeedScore`."""
        return float(np.mean(self._averages(measure)))

    def spread(self, measure: str) -> float:
        """Sample standard deviation over the draws; 0 for one draw."""
        averages = self._averages(measure)
        return float(np.std(averages, ddof=1)) if len(averages) > 1 else 0.0

    def by_category(self, measure: str) -> Mapping[str, float]:
        """Mean over draws, by category."""
        draws: list[Mapping[str, float]] = [getattr(seed, measure) for seed in self.seeds]
        return MappingProxyType(
            {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
        )

    def _averages(self, measure: str) -> list[float]:
        return [float(np.mean(list(getattr(seed, measure).values()))) for seed in self.seeds]


def score(
    adapted: AdaptedModel,
    draws: Sequence[Sequence[Record]],
    block: TrainingBlock,
    *,
    max_new_tokens: int,
) -> ModelScore:
    """Measure the model as it stands, with its adapter, on each draw of held-out records.

    Args:
        adapted: The model.
        draws: Held-out records, one sequence for each evaluation seed.
        block: The federation's recipe: template and lengths.
        max_new_tokens: Longest answer.
    """
    tokenizer = adapted.base.tokenizer
    pad_id = tokenizer.pad_token_id
    seeds = []
    for records in draws:
        data = tokenize(
            records,
            tokenizer,
            template=block.template,
            loss_on=block.loss_on,
            max_length=block.max_length,
        )
        answered = score_answers(
            adapted.model,
            tokenizer,
            records,
            template=block.template,
            max_length=block.max_length,
            max_new_tokens=max_new_tokens,
        )
        losses = held_out_loss(
            adapted.model,
            data.examples,
            pad_id=int(tokenizer.eos_token_id if pad_id is None else pad_id),
        )
        seeds.append(
            SeedScore(
                exact_match={k: v.score for k, v in answered.exact_match.by_category.items()},
                loss={k: v.score for k, v in losses.by_category.items()},
                answers=tuple(answer.text for answer in answered.answers),
            )
        )
    return ModelScore(seeds=tuple(seeds))
