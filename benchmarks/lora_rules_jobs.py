"""What `benchmarks.lora_rules` compares, each made and measured by one job.

A job is a function of its variant and its seed: a rule, a server optimiser, learning rates, a rank.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from aggregator_server.aggregation.optimizers import Optimizer as ServerOptimizer
from aggregator_server.aggregation.optimizers import optimizer_of
from aggregator_server.recipes import OPTIMIZERS, Optimizer
from benchmarks.dp_utility_jobs import categories_of, held_out_records
from benchmarks.lora_federation import Federation, Made, Method, federate
from benchmarks.tiny_federation import (
    BASE,
    MAX_NEW_TOKENS,
    Recipe,
    exact_match_by_category,
    loss_by_category,
    tokenized,
)
from edge_agent.data.records import Record
from quant.base_model import LoadedBase, load_base


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
_RATED: Final = (Method.FEDIT, Method.FFA_LORA, Method.ROLORA, Method.FLEXLORA, Method.FED_SB)
"""Rules that are also run at another rate: those of one adapter, and no other."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A federation to run and measure."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """A file's name."""
        variant = self.variant.name.replace(", ", "-").replace(" ", "-")
        return f"{variant}-seed-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One benchmark run. Everything here is part of the result's name.

    Attributes:
        recipe: The demo's, with 6 steps a round instead of 10: scores are then further from 1.
        rates: Rules of one adapter are also run at these.
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

    def main_jobs(self) -> list[Job]:
        """Every rule under every seed, all rules of a seed first; optimisers under the first."""
        return [
            Job(variant=variant, seed=seed)
            for seed in self.seeds
            for variant in self.variants
            if variant.optimizer is Optimizer.FEDAVG or seed == self.seeds[0]
        ]

    def rate_jobs(self) -> list[Job]:
        """The rules of one adapter at the other rates."""
        return [
            Job(variant=Variant(method=one.method, rank=one.rank, rate=rate), seed=seed)
            for seed in self.seeds
            for one in self.variants
            if one.optimizer is Optimizer.FEDAVG and one.method in _RATED
            for rate in self.rates
        ]


QUICK: Final = Settings(
    recipe=Recipe(n_records=20, n_rounds=2, local_steps=2, batch_size=4, rank=4, alpha=8.0),
    seeds=(1,),
    variants=(*RULES, SERVER_OPTIMIZERS[0]),
    rates=(2.7e-3,),
    n_held_out=1,
)
"""For `--quick`: it shows that everything runs; its numbers mean nothing."""


def run_job(job: Job, settings: Settings) -> dict[str, Any]:
    """Run a federation and measure what it ended with, in a worker process.

    Args:
        job: Which.
        settings: Of the run.

    Returns:
        What came out, as JSON.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    plain, variant = settings.recipe, job.variant
    rank = variant.rank or plain.rank
    recipe = replace(
        plain,
        rank=rank,
        alpha=plain.alpha * rank / plain.rank,  # the scale stays
        learning_rate=variant.rate or plain.learning_rate,
    )
    federation = Federation(
        base=_base(), recipe=recipe, seed=job.seed, optimizer=_optimizer(variant)
    )
    made = federate(variant.method, federation)
    found = _measure(made, recipe, held_out_records(settings.n_held_out, job.seed))
    made.adapted.detach()
    return found | {
        "variant": variant.name,
        "seed": job.seed,
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - began_cpu, 1),
    }


@functools.cache
def _base() -> LoadedBase:
    return load_base(BASE)


def _optimizer(variant: Variant) -> ServerOptimizer:
    block = OPTIMIZERS[variant.optimizer]
    return optimizer_of(block.model_copy(update={"learning_rate": variant.server_rate}))


def _measure(made: Made, recipe: Recipe, records: Sequence[Record]) -> dict[str, Any]:
    """Scores of the model, or means over the agents' own; bytes of float32, as in the open."""
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
    return {
        "bytes_up": 4 * made.n_up,
        "bytes_down": 4 * made.n_down,
        "loss": _average(losses),
        "exact_match": _average(matches),
        "own_exact_match": float(np.mean(own)) if own else None,
    }


def _average(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}
