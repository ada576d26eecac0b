"""The honest updates that `benchmarks.robustness` replays, trained once and kept.

A population of agents with unlike data on the embedded base: a short federation gives the release
of a round in mid-training, and from it every agent trains its update for that round. Some agents
train theirs once more on poisoned records. Nothing here is drawn from a distribution of vectors.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aggregator_server.aggregation.fedavg import apply_mean, average
from benchmarks.tiny_federation import (
    Recipe,
    Visit,
    adapted_base,
    draw_records,
    generator,
    tokenized,
    train_update,
)
from edge_agent.data.records import Record
from edge_agent.data.tokens import Example
from privacy.updates import CellSum, Float32Array
from protocol.layout import VectorLayout
from quant.adapter import (
    AdapterArrays,
    adapter_shapes,
    flatten,
    initial_adapter,
    sent_layout,
    unflatten,
)
from quant.tiny.instructions import Category
from quant.tiny.world import Split
from simulations.attacks.catalogue import RECORD_ATTACKS
from simulations.attacks.names import RecordAttack
from simulations.partition.schemes import PartitionRecipe, Scheme, make_partition

_RECORDS_STREAM, _ORDER_STREAM, _ADAPTER_STREAM, _ATTACKER_STREAM, _POISON_STREAM = range(10, 15)

COMMON_PAIRS: Final = (
    (Category.BRAINSTORMING, Category.CLOSED_QA),
    (Category.INFORMATION_EXTRACTION, Category.OPEN_QA),
    (Category.CLASSIFICATION, Category.SUMMARIZATION),
    (Category.GENERAL_QA, Category.OPEN_QA),
    (Category.CLOSED_QA, Category.INFORMATION_EXTRACTION),
)
"""The demo's pairs, but that nobody of the many has records to write creatively."""
RARE: Final[Mapping[int, tuple[Category, ...]]] = MappingProxyType(
    {
        18: (Category.BRAINSTORMING, Category.SUMMARIZATION),
        19: (Category.CREATIVE_WRITING, Category.CREATIVE_WRITING),
    }
)
"""Agents with data that nobody else has: a pair of its own, and a category of its own."""


class Division(StrEnum):
    """Who has which records."""

    PAIRS = "pairs"
    """Each agent two categories; agents in groups of like data, and the rare ones."""
    DIRICHLET = "dirichlet"
    """Each category by proportions from a symmetric Dirichlet(0.5)."""


@dataclass(frozen=True, kw_only=True)
class Population:
    """Agents and their records under one seed.

    Attributes:
        n_warm_agents: Those who trained the rounds before; the first of all.
        n_warm_rounds: How many rounds these were.
    """

    division: Division
    n_agents: int
    seed: int
    recipe: Recipe
    n_warm_agents: int = 20
    n_warm_rounds: int = 1

    @property
    def name(self) -> str:
        """A file's name."""
        return f"{self.division.value}-{self.n_agents}-seed-{self.seed}"

    @property
    def rare(self) -> tuple[int, ...]:
        """The agents whose data nobody else has."""
        return tuple(RARE) if self.division is Division.PAIRS else ()

    @property
    def init_seed(self) -> int:
        """Of the factor that stays as it is."""
        return int(generator(self.seed, _ADAPTER_STREAM).integers(2**31))

    def order_of(self, agent: int, number: int) -> int:
        """Seed of an agent's batches in a round."""
        return int(generator(self.seed, _ORDER_STREAM, number, agent).integers(2**31))

    def attackers(self, n_agents: int, n_attackers: int) -> tuple[int, ...]:
        """The first of a fixed order of the first `n_agents`; never a rare one."""
        order = generator(self.seed, _ATTACKER_STREAM, n_agents).permutation(n_agents)
        return tuple([int(agent) for agent in order if agent not in self.rare][:n_attackers])


@functools.lru_cache(maxsize=2)
def records_of(population: Population) -> tuple[tuple[Record, ...], ...]:
    """The records of each agent."""
    recipe, seed = population.recipe, population.seed
    if population.division is Division.DIRICHLET:
        return _divided(population)
    found = []
    for agent in range(population.n_agents):
        pair = RARE.get(agent, COMMON_PAIRS[agent % len(COMMON_PAIRS)])
        drawn = draw_records(
            tuple(dict.fromkeys(pair)),
            recipe.n_records // len(set(pair)),
            split=Split.TRAIN,
            rng=generator(seed, _RECORDS_STREAM, agent),
            source=f"agent-{agent}",
        )
        found.append(tuple(drawn))
    return tuple(found)


def _divided(population: Population) -> tuple[tuple[Record, ...], ...]:
    n_categories = len(Category)
    records = draw_records(
        tuple(Category),
        population.n_agents * population.recipe.n_records // n_categories,
        split=Split.TRAIN,
        rng=generator(population.seed, _RECORDS_STREAM),
        source="all",
    )
    recipe = PartitionRecipe(
        scheme=Scheme.DIRICHLET,
        n_clients=population.n_agents,
        seed=population.seed,
        n_held_out=0,
        min_records=population.recipe.batch_size,
    )
    partition = make_partition([str(record.category) for record in records], recipe)
    return tuple(tuple(records[int(i)] for i in client) for client in partition.clients)


class Federation:
    """One population on the base: what its agents send from any release.

    Args:
        population: Who.
    """

    def __init__(self, population: Population) -> None:
        """Load the base, and make release 0."""
        recipe = population.recipe
        self.population = population
        self.adapted = adapted_base(recipe.lora(0))
        description = self.adapted.base.description
        self._start: AdapterArrays = initial_adapter(description, recipe.lora(population.init_seed))
        self.layout: VectorLayout = sent_layout(
            adapter_shapes(description, self.adapted.lora), self.adapted.lora.sent
        )
        self._examples: dict[tuple[int, RecordAttack | None], tuple[Example, ...]] = {}

    @property
    def first_vector(self) -> Float32Array:
        """Release 0, what is sent of it."""
        return flatten(self._start, self.layout)

    def release(self, vector: Float32Array) -> AdapterArrays:
        """The whole adapter of a release."""
        return self._start | unflatten(vector, self.layout)

    def updates(
        self,
        vector: Float32Array,
        agents: Sequence[int],
        *,
        number: int,
        poison: RecordAttack | None = None,
    ) -> Float32Array:
        """What agents send in a round.

        Args:
            vector: The release they start from.
            agents: Who.
            number: The round's, from 0.
            poison: Which attack by data they train on.

        Returns:
            [len(agents), n_values] float32.
        """
        recipe = self.population.recipe
        release = self.release(vector)
        rows = np.empty((len(agents), self.layout.n_values), np.float32)
        for row, agent in zip(rows, agents, strict=True):
            visit = Visit(
                number=number,
                n_rounds=recipe.n_rounds,
                seed=self.population.order_of(agent, number),
            )
            examples = self._examples_of(agent, poison)
            update = train_update(
                self.adapted, examples, recipe.training, visit, release, self.layout
            )
            row[:] = update.vector
        return rows

    def _examples_of(self, agent: int, poison: RecordAttack | None) -> tuple[Example, ...]:
        key = (agent, poison)
        if key not in self._examples:
            records: Sequence[Record] = records_of(self.population)[agent]
            if poison is not None:
                rng = generator(self.population.seed, _POISON_STREAM, agent)
                records = RECORD_ATTACKS[poison].poison(records, rng=rng)
            self._examples[key] = tokenized(records, self.population.recipe)
        return self._examples[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """A round's honest updates, and what some agents send when their records are poisoned.

    Attributes:
        release: [n_values], what the round starts from.
        last_change: [n_values], this release minus the one before.
        updates: [n_agents, n_values] float32.
        poisoned: For each attack by data [k, n_values] float32, of the agents in `poisoners`.
        poisoners: [k] int64.
    """

    release: Float32Array
    last_change: Float32Array
    updates: Float32Array
    poisoned: Mapping[RecordAttack, Float32Array]
    poisoners: NDArray[np.int64]

    def poisoned_by(self, attack: RecordAttack, agents: Sequence[int]) -> Float32Array:
        """What these agents send, [len(agents), n_values]."""
        places = [int(np.flatnonzero(self.poisoners == agent)[0]) for agent in agents]
        return self.poisoned[attack][places]


def record(
    federation: Federation, poisoners: Sequence[int], poisons: Sequence[RecordAttack]
) -> Recording:
    """Train the rounds before, and every update of the round.

    Args:
        federation: Who, and from where.
        poisoners: Who also trains on poisoned records.
        poisons: On which.
    """
    population, layout = federation.population, federation.layout
    vector = before = federation.first_vector
    for number in range(population.n_warm_rounds):
        rows = federation.updates(vector, range(population.n_warm_agents), number=number)
        before, vector = vector, apply_mean(vector, plain_mean(rows, layout))
    number = population.n_warm_rounds
    return Recording(
        release=vector,
        last_change=vector - before,
        updates=federation.updates(vector, range(population.n_agents), number=number),
        poisoned={
            poison: federation.updates(vector, poisoners, number=number, poison=poison)
            for poison in poisons
        },
        poisoners=np.array(poisoners, np.int64),
    )


def plain_mean(rows: Float32Array, layout: VectorLayout) -> NDArray[np.float64]:
    """FedAvg of updates of equal weights, [n_values]."""
    cells = (CellSum(weighted_sum=row, weight_sum=1, n_members=1) for row in rows)
    return average(cells, n_values=layout.n_values).mean


def save(recording: Recording, path: Path) -> None:
    """Write a recording; the file is whole or not there."""
    half = path.with_suffix(".part.npz")
    np.savez(
        half,
        release=recording.release,
        last_change=recording.last_change,
        updates=recording.updates,
        poisoners=recording.poisoners,
        **{attack.name: rows for attack, rows in recording.poisoned.items()},
    )
    half.replace(path)


def load(path: Path) -> Recording:
    """Read a recording."""
    with np.load(path, allow_pickle=False) as data:
        return Recording(
            release=data["release"],
            last_change=data["last_change"],
            updates=data["updates"],
            poisoned={attack: data[attack.name] for attack in RecordAttack if attack.name in data},
            poisoners=data["poisoners"],
        )
