"""A federation in one process on the embedded base: what several benchmarks train and measure.

Training, averaging and measuring are the product's own: `LocalTrainer`, `held_out_loss`,
`score_answers`. All chance comes from seeds, so that a run can be repeated.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_agent.data.records import Record
from edge_agent.data.tokens import Example, tokenize
from edge_agent.evaluation import Scores, held_out_loss, score_answers
from edge_agent.training.gradients import GradientRule, MeanGradient
from edge_agent.training.sampling import BatchSampler, ShuffledBatches
from edge_agent.training.trainer import (
    GradientTransform,
    LocalTrainer,
    RoundRecipe,
    TrainerOptions,
)
from privacy.updates import PlainUpdate
from protocol.blocks import Factor, LoraBlock, LossOn, Schedule, Template, TrainingBlock
from protocol.clock import SystemClock
from protocol.layout import VectorLayout
from quant.adapter import AdapterArrays
from quant.base_model import load_base
from quant.lora import AdaptedModel
from quant.memory import StepSettings
from quant.tiny.instructions import Category, make_records
from quant.tiny.world import Split, make_world

BASE: Final = "embedded:tiny"
MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_NEW_TOKENS: Final = 28
_SETTINGS: Final = StepSettings(micro_tokens=2048)
"""The fastest on a processor's core; it changes no gradient."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How agents train; the defaults suit profile P1, found by trials at ε = 8, see docs/LOG.md.

    Attributes:
        n_agents: All take part in every round.
        n_records: Of each agent, half of them of each of its categories.
        batch_size: Expected, under differential privacy.
        clip_norm: Of an example's gradient; without differential privacy, of the batch's mean.
    """

    n_agents: int = 5
    n_records: int = 3000
    n_rounds: int = 5
    local_steps: int = 4
    batch_size: int = 96
    learning_rate: float = 4e-2
    schedule: Schedule = Schedule.LINEAR
    final_frac: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    rank: int = 16
    alpha: float = 32.0
    sent: tuple[Factor, ...] = (Factor.B,)
    modules: tuple[str, ...] = MODULES
    max_length: int = 192

    @property
    def n_steps(self) -> int:
        """Of an agent, in all rounds."""
        return self.n_rounds * self.local_steps

    @property
    def training(self) -> TrainingBlock:
        """What the manifest would say."""
        return TrainingBlock(
            template=Template.ALPACA,
            loss_on=LossOn.RESPONSE,
            max_length=self.max_length,
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            final_frac=self.final_frac,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.clip_norm,
        )

    def lora(self, seed: int) -> LoraBlock:
        """The adapter; dropout 0, as P1 demands."""
        return LoraBlock(
            rank=self.rank,
            alpha=self.alpha,
            dropout=0.0,
            target_modules=self.modules,
            sent=self.sent,
            init_seed=seed,
        )


def generator(*words: int) -> np.random.Generator:
    """All chance of a run; each use has words of its own."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def draw_records(
    categories: Sequence[Category],
    n_per_category: int,
    *,
    split: Split,
    rng: np.random.Generator,
    source: str,
) -> list[Record]:
    """Records about the invented world; those of the two splits are about different subjects."""
    rows = make_records(
        make_world(),
        n_per_category=n_per_category,
        split=split,
        rng=rng,
        categories=categories,
        courteous=True,
    )
    return [
        Record(**row, messages=None, source=f"{source}:{number}")
        for number, row in enumerate(rows, start=1)
    ]


@functools.cache
def adapted_base(lora: LoraBlock) -> AdaptedModel:
    """The embedded base with an adapter of this shape, once for each process."""
    return AdaptedModel(load_base(BASE), lora)


def tokenized(records: Sequence[Record], recipe: Recipe) -> tuple[Example, ...]:
    """The records as examples.

    Raises:
        ValueError: One of them has nothing to learn within the recipe's length.
    """
    block = recipe.training
    examples = tokenize(
        records,
        adapted_base(recipe.lora(0)).base.tokenizer,
        template=block.template,
        loss_on=block.loss_on,
        max_length=block.max_length,
    ).examples
    if len(examples) != len(records):
        msg = f"{len(examples)} of {len(records)} records can be used; raise the length"
        raise ValueError(msg)
    return tuple(examples)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One agent's part in one round.

    Attributes:
        number: Of the round, from 0.
        n_rounds: In all, over which the learning rate's schedule runs.
        seed: Of the order of batches.
        transforms: Of the gradient; None: the recipe's clipping.
    """

    number: int
    n_rounds: int
    seed: int
    transforms: tuple[GradientTransform, ...] | None = None


def train_update(
    adapted: AdaptedModel,
    examples: Sequence[Example],
    block: TrainingBlock,
    visit: Visit,
    release: AdapterArrays,
    layout: VectorLayout,
    *,
    sampler: BatchSampler | None = None,
    rule: GradientRule | None = None,
) -> PlainUpdate:
    """Train one round as an agent does, with a weight of 1.

    Args:
        adapted: The model; its adapter is replaced.
        examples: The agent's.
        block: The recipe of a round.
        visit: Which round, and the order of its batches.
        release: The adapter to start from, all tensors.
        layout: Of the update.
        sampler: None: batches in random order, by the visit's seed.
        rule: None: the mean gradient.
    """
    if sampler is None:
        sampler = ShuffledBatches(
            n_examples=len(examples), batch_size=block.batch_size, seed=visit.seed
        )
    trainer = LocalTrainer(
        adapted,
        examples,
        RoundRecipe(
            training=block,
            schedule_start=visit.number / visit.n_rounds,
            schedule_end=(visit.number + 1) / visit.n_rounds,
            seed=visit.seed,
        ),
        sampler=sampler,
        clock=SystemClock(),
        options=TrainerOptions(
            rule=MeanGradient() if rule is None else rule,
            settings=_SETTINGS,
            transforms=visit.transforms,
        ),
    )
    return trainer.run(release, layout, weight=1).update


def loss_by_category(adapted: AdaptedModel, examples: Sequence[Example]) -> dict[str, float]:
    """Held-out loss of the model as it stands, in nats a token."""
    tokenizer = adapted.base.tokenizer
    pad_id = int(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    return _by_category(held_out_loss(adapted.model, examples, pad_id=pad_id))


def exact_match_by_category(
    adapted: AdaptedModel, records: Sequence[Record], recipe: Recipe, *, max_new_tokens: int
) -> dict[str, float]:
    """The share of answers that are right, of the model as it stands."""
    block = recipe.training
    answered = score_answers(
        adapted.model,
        adapted.base.tokenizer,
        records,
        template=block.template,
        max_length=block.max_length,
        max_new_tokens=max_new_tokens,
    )
    return _by_category(answered.exact_match)


def _by_category(scores: Scores) -> dict[str, float]:
    return {name: one.score for name, one in scores.by_category.items()}
