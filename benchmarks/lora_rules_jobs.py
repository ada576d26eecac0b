"""What `benchmarks.lora_rules` compares, each made and measured by one job.

A job is a function of its variant and its seed: a rule, a server optimiser, learning rates, a rank;
on the demo's federation, or on Dolly's ten clients.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np

from aggregator_server.aggregation.optimizers import Optimizer as ServerOptimizer
from aggregator_server.aggregation.optimizers import optimizer_of
from aggregator_server.recipes import OPTIMIZERS, Optimizer
from benchmarks import dolly_jobs
from benchmarks.dolly_jobs import Clients, make_split, training_block
from benchmarks.dp_utility_jobs import agent_examples, categories_of, held_out_records
from benchmarks.lora_federation import Federation, Made, Method, federate
from benchmarks.tiny_federation import (
    BASE,
    MAX_NEW_TOKENS,
    Recipe,
    Visit,
    exact_match_by_category,
    generator,
    loss_by_category,
    tokenized,
    train_update,
)
from edge_agent.training.trainer import GradientTransform
from privacy.updates import PlainUpdate
from protocol.layout import VectorLayout
from quant.adapter import AdapterArrays
from quant.base_model import LoadedBase, load_base
from quant.lora import AdaptedModel
from simulations.partition.manifest import read_source

_ORDER_STREAM, _ADAPTER_STREAM = 2, 3


class Where(StrEnum):
    """A federation."""

    DEMO = "demo"
    DOLLY = "dolly"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is compared.

    Attributes:
        method: The rule.
        optimizer: Of the server, for FedIT.
        server_rate: Its learning rate.
        rate: Of the agents; None: the recipe's.
        rank: None: the recipe's.
    """

    method: Method
    optimizer: Optimizer = Optimizer.FEDAVG
    server_rate: float = 1.0
    rate: float | None = None
    rank: int | None = None

    @property
    def name(self) -> str:
        """For tables and files."""
        parts = [
            self.method.value,
            *([] if self.optimizer is Optimizer.FEDAVG else [self._server]),
            *([] if self.rank is None else [f"rank {self.rank}"]),
            *([] if self.rate is None else [f"rate {self.rate:g}"]),
        ]
        return ", ".join(parts)

    @property
    def _server(self) -> str:
        return f"{self.optimizer.value} {self.server_rate:g}"


RULES: Final = (
    Variant(method=Method.FEDIT),
    Variant(method=Method.FFA_LORA),
    Variant(method=Method.ROLORA),
    Variant(method=Method.FLEXLORA),
    Variant(method=Method.FEDEX),
    Variant(method=Method.FLORA),
    Variant(method=Method.FEDSA_LORA),
    Variant(method=Method.FED_SB, rank=32),
)
SERVER_OPTIMIZERS: Final = tuple(
    Variant(method=Method.FEDIT, optimizer=optimizer, server_rate=rate)
    for optimizer, rates in {
        Optimizer.FEDAVGM: (1.0, 0.3),
        Optimizer.FEDADAGRAD: (3e-2,),
        Optimizer.FEDADAM: (3e-2, 5e-3),
        Optimizer.FEDYOGI: (3e-2, 5e-3),
    }.items()
    for rate in rates
)
"""Under the first seed alone. The default of the last three, 1e-3, is for many more rounds."""
WIRED: Final = (Method.FEDIT, Method.FFA_LORA, Method.ROLORA, Method.FLEXLORA)
"""The rules that a manifest can name."""
_RATED: Final = (*WIRED, Method.FED_SB)
"""Rules that are also run at another rate: those of one adapter, and no other."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A federation to run and measure."""

    where: Where
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """A file's name."""
        variant = self.variant.name.replace(", ", "-").replace(" ", "-")
        return f"{self.where}-{variant}-seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One benchmark run. Everything here is part of the result's name.

    Attributes:
        recipe: The demo's, with 6 steps a round instead of 10: scores are then further from 1.
        rates: Rules of one adapter are also run at these on the demo.
        dolly: Ten clients, five a round, as `benchmarks.dolly`.
        dolly_rate: That benchmark's choice for this base.
    """

    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            n_records=300,
            n_rounds=8,
            local_steps=6,
            batch_size=8,
            learning_rate=8e-3,
            rank=8,
            alpha=16.0,
        )
    )
    seeds: tuple[int, ...] = (1, 2, 3)
    variants: tuple[Variant, ...] = (*RULES, *SERVER_OPTIMIZERS)
    rates: tuple[float, ...] = (2.4e-2,)
    n_held_out: int = 25
    dolly: dolly_jobs.Settings = field(
        default_factory=lambda: dolly_jobs.Settings(n_train=600, n_held_out=25, n_rouge=2)
    )
    dolly_rate: float = 1.5e-2

    def demo_jobs(self) -> list[Job]:
        """Every rule under every seed, all rules of a seed first; optimisers under the first."""
        return [
            Job(where=Where.DEMO, variant=variant, seed=seed)
            for seed in self.seeds
            for variant in self.variants
            if variant.optimizer is Optimizer.FEDAVG or seed == self.seeds[0]
        ]

    def rate_jobs(self) -> list[Job]:
        """The rules of one adapter at the other rates."""
        return [
            Job(
                where=Where.DEMO,
                variant=Variant(method=one.method, rank=one.rank, rate=rate),
                seed=seed,
            )
            for seed in self.seeds
            for one in self.variants
            if one.optimizer is Optimizer.FEDAVG and one.method in _RATED
            for rate in self.rates
        ]

    def dolly_jobs(self) -> list[Job]:
        """The rules that a manifest can name, under every seed."""
        return [
            Job(where=Where.DOLLY, variant=Variant(method=method), seed=seed)
            for seed in self.seeds
            for method in WIRED
        ]


QUICK: Final = Settings(
    recipe=Recipe(n_records=20, n_rounds=2, local_steps=2, batch_size=4, rank=4, alpha=8.0),
    seeds=(1,),
    variants=(*RULES, SERVER_OPTIMIZERS[0]),
    rates=(2.7e-3,),
    n_held_out=1,
    dolly=dolly_jobs.QUICK,
)
"""For `--quick`: it shows that everything runs; its numbers mean nothing."""


def run_job(job: Job, settings: Settings, *, base: Path, data: Path) -> dict[str, Any]:
    """Run a federation and measure what it ended with, in a worker process.

    Args:
        job: Which.
        settings: Of the run.
        base: Folder of Dolly's base.
        data: The Dolly file.

    Returns:
        What came out, as JSON.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    is_demo = job.where is Where.DEMO
    found = _demo(job, settings) if is_demo else _dolly(job, settings, base, data)
    return found | {
        "where": job.where.value,
        "variant": job.variant.name,
        "seed": job.seed,
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - began_cpu, 1),
    }


@dataclass(frozen=True, kw_only=True)
class Agents:
    """The demo's agents under one seed."""

    recipe: Recipe
    seed: int

    def train(
        self,
        adapted: AdaptedModel,
        start: AdapterArrays,
        layout: VectorLayout,
        *,
        number: int,
        agent: int,
        transforms: tuple[GradientTransform, ...] | None = None,
    ) -> PlainUpdate:
        """What an agent sends in a round.

        Args:
            adapted: The model; its adapter is replaced.
            start: What the round starts from.
            layout: Of the update.
            number: The round's, from 0.
            agent: Its number, from 0.
            transforms: Of the gradient; None: the recipe's clipping.
        """
        order = int(generator(self.seed, _ORDER_STREAM, number, agent).integers(2**31))
        return train_update(
            adapted,
            agent_examples(self.recipe, self.seed, agent),
            self.recipe.training,
            Visit(number=number, n_rounds=self.recipe.n_rounds, seed=order, transforms=transforms),
            start,
            layout,
        )


@functools.cache
def _base(name: str | Path) -> LoadedBase:
    return load_base(name)


def _optimizer(variant: Variant) -> ServerOptimizer:
    block = OPTIMIZERS[variant.optimizer]
    return optimizer_of(block.model_copy(update={"learning_rate": variant.server_rate}))


def _demo(job: Job, settings: Settings) -> dict[str, Any]:
    plain, variant = settings.recipe, job.variant
    rank = variant.rank or plain.rank
    recipe = replace(
        plain,
        rank=rank,
        alpha=plain.alpha * rank / plain.rank,  # the scale stays
        learning_rate=variant.rate or plain.learning_rate,
    )
    agents = Agents(recipe=recipe, seed=job.seed)
    numbers = range(recipe.n_agents)
    made = federate(
        variant.method,
        Federation(
            base=_base(BASE),
            lora=recipe.lora(int(generator(job.seed, _ADAPTER_STREAM).integers(2**31))),
            cohorts=[numbers] * recipe.n_rounds,
            train=agents.train,
            max_grad_norm=recipe.clip_norm,
            optimizer=_optimizer(variant),
        ),
    )
    records = held_out_records(settings.n_held_out, job.seed)
    examples = tokenized(records, recipe)
    losses, matches, own = [], [], []
    for agent, arrays in made.adapters.items():
        made.adapted.load(arrays)
        losses.append(loss_by_category(made.adapted, examples))
        matches.append(
            exact_match_by_category(made.adapted, records, recipe, max_new_tokens=MAX_NEW_TOKENS)
        )
        if agent.isdecimal():
            mine = [matches[-1][name] for name in categories_of(int(agent))]
            own.append(float(np.mean(mine)))
    made.adapted.detach()
    return {
        **_sizes(made),
        "loss": _average(losses),
        "exact_match": _average(matches),
        "own_exact_match": float(np.mean(own)) if own else None,
    }


def _dolly(job: Job, settings: Settings, base: Path, data: Path) -> dict[str, Any]:
    block = training_block(settings.dolly, settings.dolly_rate)
    split = make_split(read_source(data).records, settings.dolly, job.seed)
    clients = Clients(block=block, settings=settings.dolly, split=split, seed=job.seed)
    made = federate(
        job.variant.method,
        Federation(
            base=_base(base),
            lora=dolly_jobs.lora_block(job.seed),
            cohorts=clients.cohorts(),
            train=clients.train,
            max_grad_norm=float(block.max_grad_norm or 0.0),
            optimizer=_optimizer(job.variant),
        ),
    )
    made.adapted.load(made.adapters["all"])
    found = dolly_jobs.measure(made.adapted, settings.dolly, split)
    made.adapted.detach()
    return {**_sizes(made), "loss": found["loss"], "rouge_l": found["rouge_l"]}


def _sizes(made: Made) -> dict[str, int]:
    """In bytes, as the open mode sends float32."""
    return {"bytes_up": 4 * made.n_up, "bytes_down": 4 * made.n_down}


def _average(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}
