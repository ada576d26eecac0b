"""What `benchmarks.dp_utility` compares, each made and measured by one job.

Records, base and division of categories are the demo's; training, noise, accounting, averaging and
measuring are the product's own: the agent's terms, `LocalTrainer`, `PoissonBatches` and
`PrivateGradient`, the server's FedAvg. A job is a function of its settings, its ε and its seed: the
coins and the noise, which agents take from the system's generator, come from the seed here, so that
a run can be repeated.
"""

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

import numpy as np

from aggregator_server.aggregation.fedavg import apply_mean, average
from edge_agent.data.records import Record
from edge_agent.data.tokens import Example, tokenize
from edge_agent.evaluation import Scores, held_out_loss, score_answers
from edge_agent.private import PrivacyTerms
from edge_agent.training.gradients import MeanGradient, PrivateGradient
from edge_agent.training.sampling import BatchSampler, PoissonBatches, ShuffledBatches
from edge_agent.training.trainer import LocalTrainer, RoundRecipe, TrainerOptions
from privacy.accounting import calibrate, spent, usual_delta
from privacy.updates import CellSum
from protocol.clock import SystemClock
from protocol.manifest import Factor, LoraBlock, LossOn, Schedule, Template, TrainingBlock
from quant.adapter import (
    AdapterArrays,
    adapter_shapes,
    flatten,
    initial_adapter,
    sent_layout,
    unflatten,
)
from quant.base_model import load_base
from quant.lora import AdaptedModel
from quant.memory import StepSettings
from quant.tiny.instructions import Category, InstructionRecord, make_records
from quant.tiny.world import Split, make_world
from simulations.demo import DemoRecipe

BASE: Final = "embedded:tiny"
MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_RECORDS_STREAM, _HELD_OUT_STREAM, _ORDER_STREAM, _ADAPTER_STREAM = range(4)
_SETTINGS: Final = StepSettings(micro_tokens=2048)
"""The fastest on a processor's core; it changes no gradient."""


class Model(StrEnum):
    """What is compared."""

    BASE = "base"
    ALONE = "one agent alone"
    FEDERATED = "federated"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A federation with profile P1; found by trials at ε = 8, see docs/LOG.md.

    Attributes:
        n_agents: All take part in every round; agent k owns the demo's k-th pair of categories,
            from the sixth agent on the pairs come again.
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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One benchmark run. Everything here is part of the result's name.

    Attributes:
        epsilons: None is no differential privacy.
        plain_rate: Learning rate of another federation without differential privacy: what suits
            noise is too large where there is none.
        sweep_epsilon: One of `epsilons`; there the records of an agent are varied.
        record_counts: Records of each agent, besides the recipe's, at `sweep_epsilon`.
        n_held_out: Records of each category that are answered.
    """

    recipe: Recipe = field(default_factory=Recipe)
    epsilons: tuple[float | None, ...] = (None, 8.0, 3.0, 1.0, 0.3)
    seeds: tuple[int, ...] = (1, 2, 3)
    plain_rate: float = 1.2e-2
    sweep_epsilon: float = 1.0
    record_counts: tuple[int, ...] = (300, 1000)
    n_held_out: int = 40
    max_new_tokens: int = 28

    def jobs(self) -> tuple["Job", ...]:
        """All, under every seed; none twice."""
        wanted = (*self.curve(), *self.record_sweep())
        return tuple(dict.fromkeys(job.under(seed) for job in wanted for seed in self.seeds))

    def curve(self) -> tuple["Job", ...]:
        """Over ε; the seed of these is no matter."""
        return (
            Job(model=Model.FEDERATED, epsilon=None, learning_rate=self.plain_rate),
            *(Job(model=Model.FEDERATED, epsilon=epsilon) for epsilon in self.epsilons),
            *(Job(model=Model.ALONE, epsilon=epsilon) for epsilon in self.epsilons),
            Job(model=Model.BASE, epsilon=None),
        )

    def record_sweep(self) -> tuple["Job", ...]:
        """Over the records of an agent, fewest first."""
        counts = sorted({*self.record_counts, self.recipe.n_records})
        return tuple(
            Job(
                model=Model.FEDERATED,
                epsilon=self.sweep_epsilon,
                n_records=None if n == self.recipe.n_records else n,
            )
            for n in counts
        )


QUICK: Final = Settings(
    recipe=Recipe(n_records=200, n_rounds=2, local_steps=2, batch_size=16),
    epsilons=(None, 1.0),
    seeds=(1,),
    record_counts=(100,),
    n_held_out=4,
)
"""For `--quick`: it shows that everything runs; its numbers mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to make and measure.

    Attributes:
        epsilon: None is no differential privacy.
        n_records: Of each agent; None: the recipe's.
        learning_rate: None: the recipe's.
    """

    model: Model
    epsilon: float | None
    n_records: int | None = None
    learning_rate: float | None = None
    seed: int = 0

    def under(self, seed: int) -> "Job":
        """The same under a seed."""
        return replace(self, seed=seed)

    @property
    def name(self) -> str:
        """A file's name."""
        parts = [
            self.model.value.replace(" ", "-"),
            "inf" if self.epsilon is None else f"{self.epsilon:g}",
            *([] if self.n_records is None else [f"records-{self.n_records}"]),
            *([] if self.learning_rate is None else [f"rate-{self.learning_rate:g}"]),
            f"seed-{self.seed}",
        ]
        return "-".join(parts)

    def recipe(self, of: Recipe) -> Recipe:
        """The recipe, with this job's own numbers."""
        return replace(
            of,
            n_records=self.n_records or of.n_records,
            learning_rate=self.learning_rate or of.learning_rate,
        )


def make_terms(recipe: Recipe, epsilon: float) -> PrivacyTerms:
    """What an agent would agree to, calibrated over all rounds; δ is n^−1.1.

    Args:
        recipe: The federation's.
        epsilon: For each example of an agent in all rounds.
    """
    delta = usual_delta(recipe.n_records)
    return PrivacyTerms(
        epsilon=epsilon,
        delta=delta,
        clip_norm=recipe.clip_norm,
        noise_multiplier=_calibrated(
            epsilon, delta, min(1.0, recipe.batch_size / recipe.n_records), recipe.n_steps
        ),
        n_examples=recipe.n_records,
        batch_size=recipe.batch_size,
        n_steps=recipe.local_steps,
        n_rounds=recipe.n_rounds,
    )


@functools.cache
def _calibrated(epsilon: float, delta: float, sampling_probability: float, n_steps: int) -> float:
    return calibrate(
        epsilon=epsilon, delta=delta, sampling_probability=sampling_probability, n_steps=n_steps
    )


def describe_privacy(terms: PrivacyTerms) -> dict[str, Any]:
    """All that an ε means, and what the accountants say of all rounds together."""
    total = spent([terms.event] * terms.n_rounds, delta=terms.delta)
    return {
        "profile": "P1",
        "unit": "example",
        "neighbours": "add or remove one",
        "epsilon": terms.epsilon,
        "delta": terms.delta,
        "noise_multiplier": terms.noise_multiplier,
        "sampling_probability": terms.sampling_probability,
        "n_steps": terms.n_rounds * terms.n_steps,
        "epsilon_pld": total.pld,
        "epsilon_rdp": total.rdp,
    }


def categories_of(agent: int) -> tuple[Category, ...]:
    """What agent `agent` (from 0) owns records of."""
    pairs = DemoRecipe().categories
    return pairs[agent % len(pairs)]


def agent_records(recipe: Recipe, seed: int, agent: int) -> list[Record]:
    """The records of an agent; each draws its own."""
    categories = categories_of(agent)
    rows = make_records(
        make_world(),
        n_per_category=recipe.n_records // len(categories),
        split=Split.TRAIN,
        rng=_generator(seed, _RECORDS_STREAM, agent),
        categories=categories,
        courteous=True,
    )
    return _as_records(rows, f"agent-{agent + 1}")


def held_out_records(n_per_category: int, seed: int) -> list[Record]:
    """Records about subjects that no agent has records about."""
    rows = make_records(
        make_world(),
        n_per_category=n_per_category,
        split=Split.TEST,
        rng=_generator(seed, _HELD_OUT_STREAM),
        courteous=True,
    )
    return _as_records(rows, "held-out")


def _as_records(rows: Sequence[InstructionRecord], source: str) -> list[Record]:
    return [
        Record(**row, messages=None, source=f"{source}:{number}")
        for number, row in enumerate(rows, start=1)
    ]


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def _secret(*words: int) -> bytes:
    """Stands for what an agent takes from the system's generator for one training."""
    return hashlib.sha256(repr(("benchmarks.dp_utility", words)).encode()).digest()


@functools.cache
def _adapted(lora: LoraBlock) -> AdaptedModel:
    return AdaptedModel(load_base(BASE), lora)


@functools.lru_cache(maxsize=64)
def _examples(recipe: Recipe, seed: int, agent: int) -> tuple[Example, ...]:
    block = recipe.training
    examples = tokenize(
        agent_records(recipe, seed, agent),
        _adapted(recipe.lora(0)).base.tokenizer,
        template=block.template,
        loss_on=block.loss_on,
        max_length=block.max_length,
    ).examples
    if len(examples) != recipe.n_records:
        msg = f"{len(examples)} of {recipe.n_records} records can be used; choose an even number"
        raise ValueError(msg)
    return tuple(examples)


def run_job(job: Job, settings: Settings) -> dict[str, Any]:
    """Make a model and measure it, in a worker process.

    Args:
        job: Which.
        settings: Of the run.

    Returns:
        What came out, as JSON.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    recipe = job.recipe(settings.recipe)
    adapted = _adapted(recipe.lora(0))
    terms = None if job.epsilon is None else make_terms(recipe, job.epsilon)
    init_seed = int(_generator(job.seed, _ADAPTER_STREAM).integers(2**31))
    start = initial_adapter(adapted.base.description, recipe.lora(init_seed))
    agents: list[int] = []
    norms: list[float] = []
    if job.model is Model.BASE:
        arrays = start
    elif job.model is Model.ALONE:
        agents = [(job.seed - 1) % recipe.n_agents]
        # All its steps in one go: it has nobody to average with.
        arrays, norms = federate(adapted, start, recipe, terms, agents, job.seed, whole=True)
    else:
        agents = list(range(recipe.n_agents))
        arrays, norms = federate(adapted, start, recipe, terms, agents, job.seed)
    trained = time.perf_counter()
    adapted.load(arrays)
    return measure(adapted, settings, job.seed) | {
        "model": job.model.value,
        "seed": job.seed,
        "epsilon": job.epsilon,
        "n_agents": len(agents),
        "categories": sorted({name for agent in agents for name in categories_of(agent)}),
        "n_records": recipe.n_records if agents else 0,
        "n_steps": recipe.n_steps if agents else 0,
        "learning_rate": recipe.learning_rate if agents else None,
        "privacy": None if terms is None or not agents else describe_privacy(terms),
        "update_norms": norms,
        "train_s": round(trained - began, 1),
        "measure_s": round(time.perf_counter() - trained, 1),
        "cpu_s": round(time.process_time() - began_cpu, 1),
    }


def federate(
    adapted: AdaptedModel,
    start: AdapterArrays,
    recipe: Recipe,
    terms: PrivacyTerms | None,
    agents: Sequence[int],
    seed: int,
    *,
    whole: bool = False,
) -> tuple[AdapterArrays, list[float]]:
    """Rounds of local training and averaging, as agents and server do them.

    Args:
        adapted: The model; its adapter is replaced.
        start: Release 0.
        recipe: The federation's.
        terms: Of P1; None: no differential privacy.
        agents: Who takes part in every round.
        seed: Of order, coins and noise.
        whole: All steps in one round.

    Returns:
        The last release, and the norm of each round's mean update.
    """
    layout = sent_layout(adapter_shapes(adapted.base.description, adapted.lora), adapted.lora.sent)
    n_rounds = 1 if whole else recipe.n_rounds
    block = recipe.training
    if whole:
        block = block.model_copy(update={"local_steps": recipe.n_steps})
    vector = flatten(start, layout)
    norms = []
    for number in range(n_rounds):
        release = start | unflatten(vector, layout)
        cells = []
        for agent in agents:
            order = int(_generator(seed, _ORDER_STREAM, number, agent).integers(2**31))
            secret = _secret(seed, number, agent)
            sampler: BatchSampler
            if terms is None:
                sampler = ShuffledBatches(
                    n_examples=recipe.n_records, batch_size=recipe.batch_size, seed=order
                )
                rule: MeanGradient | PrivateGradient = MeanGradient()
            else:
                sampler = PoissonBatches(
                    n_examples=recipe.n_records,
                    probability=terms.sampling_probability,
                    secret=secret,
                )
                rule = PrivateGradient(mechanism=terms.mechanism, secret=secret)
            trainer = LocalTrainer(
                adapted,
                _examples(recipe, seed, agent),
                RoundRecipe(
                    training=block,
                    schedule_start=number / n_rounds,
                    schedule_end=(number + 1) / n_rounds,
                    seed=order,
                ),
                sampler=sampler,
                clock=SystemClock(),
                options=TrainerOptions(rule=rule, settings=_SETTINGS),
            )
            # Uniform weights, as P1 demands: a weight would tell the number of examples.
            cells.append(CellSum.of_plain(trainer.run(release, layout, weight=1).update))
        mean = average(cells, n_values=layout.n_values)
        vector = apply_mean(vector, mean.mean)
        norms.append(mean.norm)
    return start | unflatten(vector, layout), norms


def measure(adapted: AdaptedModel, settings: Settings, seed: int) -> dict[str, Any]:
    """Held-out loss and exact match by category, of the model as it stands."""
    block, tokenizer = settings.recipe.training, adapted.base.tokenizer
    records = held_out_records(settings.n_held_out, seed)
    examples = tokenize(
        records,
        tokenizer,
        template=block.template,
        loss_on=block.loss_on,
        max_length=block.max_length,
    ).examples
    pad_id = int(tokenizer.pad_token_id or tokenizer.eos_token_id or 0)
    answered = score_answers(
        adapted.model,
        tokenizer,
        records,
        template=block.template,
        max_length=block.max_length,
        max_new_tokens=settings.max_new_tokens,
    )
    loss = held_out_loss(adapted.model, examples, pad_id=pad_id)
    return {"loss": _by_category(loss), "exact_match": _by_category(answered.exact_match)}


def _by_category(scores: Scores) -> Mapping[str, float]:
    return {name: one.score for name, one in scores.by_category.items()}
