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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from aggregator_server.aggregation.fedavg import apply_mean, average
from benchmarks.tiny_federation import (
    MAX_NEW_TOKENS,
    Recipe,
    Visit,
    adapted_base,
    draw_records,
    exact_match_by_category,
    generator,
    loss_by_category,
    tokenized,
    train_update,
)
from edge_agent.data.records import Record
from edge_agent.data.tokens import Example
from edge_agent.private import PrivacyTerms
from edge_agent.training.gradients import GradientRule, PrivateGradient
from edge_agent.training.sampling import BatchSampler, PoissonBatches
from privacy.accounting import calibrate, spent, usual_delta
from privacy.updates import CellSum
from quant.adapter import (
    AdapterArrays,
    adapter_shapes,
    flatten,
    initial_adapter,
    sent_layout,
    unflatten,
)
from quant.lora import AdaptedModel
from quant.tiny.instructions import Category
from quant.tiny.world import Split
from simulations.demo import DemoRecipe

_RECORDS_STREAM, _HELD_OUT_STREAM, _ORDER_STREAM, _ADAPTER_STREAM = range(4)


class Model(StrEnum):
    """What is compared."""

    BASE = "base"
    ALONE = "one agent alone"
    FEDERATED = "federated"


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
    max_new_tokens: int = MAX_NEW_TOKENS

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
    return draw_records(
        categories,
        recipe.n_records // len(categories),
        split=Split.TRAIN,
        rng=generator(seed, _RECORDS_STREAM, agent),
        source=f"agent-{agent + 1}",
    )


def held_out_records(n_per_category: int, seed: int) -> list[Record]:
    """Records about subjects that no agent has records about."""
    return draw_records(
        tuple(Category),
        n_per_category,
        split=Split.TEST,
        rng=generator(seed, _HELD_OUT_STREAM),
        source="held-out",
    )


def _secret(*words: int) -> bytes:
    """Stands for what an agent takes from the system's generator for one training."""
    return hashlib.sha256(repr(("benchmarks.dp_utility", words)).encode()).digest()


@functools.lru_cache(maxsize=64)
def agent_examples(recipe: Recipe, seed: int, agent: int) -> tuple[Example, ...]:
    """The same, tokenised."""
    return tokenized(agent_records(recipe, seed, agent), recipe)


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
    adapted = adapted_base(recipe.lora(0))
    terms = None if job.epsilon is None else make_terms(recipe, job.epsilon)
    init_seed = int(generator(job.seed, _ADAPTER_STREAM).integers(2**31))
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
            order = int(generator(seed, _ORDER_STREAM, number, agent).integers(2**31))
            secret = _secret(seed, number, agent)
            sampler: BatchSampler | None = None
            rule: GradientRule | None = None
            if terms is not None:
                sampler = PoissonBatches(
                    n_examples=recipe.n_records,
                    probability=terms.sampling_probability,
                    secret=secret,
                )
                rule = PrivateGradient(mechanism=terms.mechanism, secret=secret)
            update = train_update(
                adapted,
                agent_examples(recipe, seed, agent),
                block,
                Visit(number=number, n_rounds=n_rounds, seed=order),
                release,
                layout,
                sampler=sampler,
                rule=rule,
            )
            # Uniform weights, as P1 demands: a weight would tell the number of examples.
            cells.append(CellSum.of_plain(update))
        mean = average(cells, n_values=layout.n_values)
        vector = apply_mean(vector, mean.mean)
        norms.append(mean.norm)
    return start | unflatten(vector, layout), norms


def measure(adapted: AdaptedModel, settings: Settings, seed: int) -> dict[str, Any]:
    """Held-out loss and exact match by category, of the model as it stands."""
    recipe = settings.recipe
    records = held_out_records(settings.n_held_out, seed)
    return {
        "loss": loss_by_category(adapted, tokenized(records, recipe)),
        "exact_match": exact_match_by_category(
            adapted, records, recipe, max_new_tokens=settings.max_new_tokens
        ),
    }
