"""What `benchmarks.robustness` measures: recorded updates under attack, and federations in rounds.

The replay: attackers are some of the recorded agents. What they know is what they would know (their
own honest trainings, n and m, the last two releases, the filter); only an attacker who is alone,
and so has no spread to estimate, is let see the honest updates. Their rows replace their honest
ones, members become cells, one aggregation is made, and the model that results is scored.

The score is the mean over categories of exp(-loss) on held-out records: the geometric mean of the
probabilities that a right answer's tokens get. A federation in rounds is scored by exact match too.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aggregator_server.aggregation.robust.outcome import Aggregated, Rule
from aggregator_server.aggregation.robust.pipeline import Mode
from aggregator_server.aggregation.robust.rules import aggregate
from aggregator_server.aggregation.robust.units import ArrayUnits
from benchmarks import robustness_recording, tiny_federation
from benchmarks.robustness_recording import (
    Division,
    Federation,
    Population,
    Recording,
    load,
    record,
    save,
)
from benchmarks.tiny_federation import (
    Recipe,
    draw_records,
    generator,
    tokenized,
)
from edge_agent.data.records import Record
from edge_agent.data.tokens import Example
from privacy.updates import Float32Array
from protocol.layout import VectorLayout
from quant.tiny.instructions import Category
from quant.tiny.world import Split
from simulations.attacks.adaptive import Adaptive, Base, Survives
from simulations.attacks.catalogue import update_attacks
from simulations.attacks.knowledge import Attack, Knowledge
from simulations.attacks.names import RecordAttack, UpdateAttack

POISONS: Final = (RecordAttack.FLIP_FACTS, RecordAttack.BACKDOOR)
_HELD_OUT_STREAM, _CELL_STREAM, _CRAFT_STREAM, _FILTER_STREAM = range(20, 24)
_IMAGINED: Final = 1000
"""Added to the seed of the cells that adaptive attackers try: the true ones they do not know."""

PEERS: Final = (
    *(Rule.NORM_BOUNDING, Rule.CAPPED_DNC, Rule.GEOMETRIC_MEDIAN, Rule.CENTRED_CLIPPING),
    *(Rule.COORDINATE_MEDIAN, Rule.TRIMMED_MEAN, Rule.MULTI_KRUM, Rule.KRUM),
)
RULES: Final = (Rule.PIPELINE, Rule.MEAN, *PEERS)
BEST_PEERS: Final = (Rule.NORM_BOUNDING, Rule.GEOMETRIC_MEDIAN)
"""The best of them after one aggregation."""
FEW_RULES: Final = (Rule.PIPELINE, Rule.MEAN, Rule.CAPPED_DNC, Rule.GEOMETRIC_MEDIAN)


class Threat(StrEnum):
    """What attackers do."""

    NONE = "no attacker"
    SCALING = "scaling × 10"
    SIGN_FLIP = "sign flip"
    SIGN_FLIP_SCALED = "sign flip × 10"
    GAUSSIAN_NOISE = "Gaussian noise × 10"
    ALIE = "ALIE, z = 1.5"
    INNER_PRODUCT_SMALL = "inner product, ε = 0.5"
    INNER_PRODUCT_LARGE = "inner product, ε = 10"
    MIN_MAX = "min-max, deviation"
    MIN_MAX_UNIT = "min-max, mean"
    MIN_SUM_UNIT = "min-sum, mean"
    CLONES = "clones, jittered"
    IDLE = "free rider, noise"
    REPLAY = "free rider, replay"
    ADAPTIVE = "adaptive"
    FLIP_FACTS = "label flip"
    BACKDOOR = "backdoor"
    BACKDOOR_SCALED = "backdoor, n ÷ m times"

    @property
    def poison(self) -> RecordAttack | None:
        """What attackers train on."""
        match self:
            case Threat.FLIP_FACTS:
                return RecordAttack.FLIP_FACTS
            case Threat.BACKDOOR | Threat.BACKDOOR_SCALED:
                return RecordAttack.BACKDOOR
            case _:
                return None

    @property
    def may_fail(self) -> bool:
        """Whether the target leaves it out: by data that are wrong, within bounds."""
        return self.poison is not None


_CRAFTS: Final[Mapping[Threat, UpdateAttack]] = {
    Threat.SCALING: UpdateAttack.SCALING,
    Threat.SIGN_FLIP: UpdateAttack.SIGN_FLIP,
    Threat.SIGN_FLIP_SCALED: UpdateAttack.SIGN_FLIP_SCALED,
    Threat.GAUSSIAN_NOISE: UpdateAttack.GAUSSIAN_NOISE_SCALED,
    Threat.ALIE: UpdateAttack.ALIE_WIDE,
    Threat.INNER_PRODUCT_SMALL: UpdateAttack.INNER_PRODUCT_SMALL,
    Threat.INNER_PRODUCT_LARGE: UpdateAttack.INNER_PRODUCT_LARGE,
    Threat.MIN_MAX: UpdateAttack.MIN_MAX,
    Threat.MIN_MAX_UNIT: UpdateAttack.MIN_MAX_UNIT,
    Threat.MIN_SUM_UNIT: UpdateAttack.MIN_SUM_UNIT,
    Threat.CLONES: UpdateAttack.CLONES_JITTERED,
    Threat.IDLE: UpdateAttack.IDLE_NOISE,
    Threat.REPLAY: UpdateAttack.REPLAY,
    Threat.BACKDOOR_SCALED: UpdateAttack.MODEL_REPLACEMENT,
}


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How many agents, what a unit is, and what is tried.

    Attributes:
        key: A short name, for files.
        cell_size: Members of a cell; 1 is the open mode.
        shares: Of attackers, without 0.
        full_share: One of `shares`, at which all rules are tried; None: nowhere.
    """

    key: str
    name: str
    n_agents: int
    cell_size: int
    division: Division
    shares: tuple[float, ...]
    full_share: float | None

    @property
    def mode(self) -> Mode:
        """What a unit is to the filter."""
        return Mode.OPEN if self.cell_size == 1 else Mode.CELLS

    def n_attackers(self, share: float) -> int:
        """At least one, where the share is not 0."""
        return int(np.ceil(share * self.n_agents - 1e-9))

    def rules(self, share: float) -> tuple[Rule, ...]:
        """Which are tried at a share."""
        full = self.full_share is not None and share in {0.0, self.full_share}
        return RULES if full else FEW_RULES

    def cells(self, seed: int) -> NDArray[np.int64]:
        """Who is in which cell, [n_cells, cell_size]; agents are drawn into cells at random."""
        order = np.arange(self.n_agents)
        if self.cell_size > 1:
            order = generator(seed, _CELL_STREAM, self.cell_size).permutation(self.n_agents)
        return order.reshape(-1, self.cell_size)


OPEN: Final = Arrangement(
    key="open",
    name="open, 20 agents",
    n_agents=20,
    cell_size=1,
    division=Division.PAIRS,
    shares=(0.05, 0.1, 0.2),
    full_share=0.1,
)
DIRICHLET: Final = replace(
    OPEN,
    key="dirichlet",
    name="open, 20 agents, Dirichlet",
    division=Division.DIRICHLET,
    full_share=None,
)
CELLS_OF_5: Final = replace(
    OPEN,
    key="cells-5",
    name="cells of 5, 40 agents",
    n_agents=40,
    cell_size=5,
    shares=(0.02, 0.05, 0.1, 0.2),
)
CELLS_OF_10: Final = replace(
    CELLS_OF_5, key="cells-10", name="cells of 10, 80 agents", n_agents=80, cell_size=10
)
FEW: Final = replace(OPEN, key="few", name="open, 5 agents", n_agents=5, shares=())
"""The demo's number: under eight agents nothing is removed."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A federation in rounds.

    Attributes:
        n_answered: Records of each category that are answered after the last round.
    """

    arrangement: Arrangement
    threat: Threat
    rule: Rule
    n_answered: int = 8


_N_ANSWERED_CLEAN: Final = 24
"""Without an attacker the target is one per cent: more answers tell less of a difference."""


def _cases() -> tuple[Case, ...]:
    both = (Rule.PIPELINE, Rule.MEAN)
    wanted = {
        Threat.NONE: BEST_PEERS,
        Threat.SIGN_FLIP_SCALED: (*both, *BEST_PEERS),
        Threat.INNER_PRODUCT_LARGE: both,
        Threat.FLIP_FACTS: both,
        Threat.BACKDOOR: both,
    }
    clean = (
        Case(arrangement=arrangement, threat=Threat.NONE, rule=rule, n_answered=_N_ANSWERED_CLEAN)
        for arrangement, rules in ((OPEN, both), (FEW, (*both, Rule.NORM_BOUNDING)))
        for rule in rules
    )
    few = (
        Case(arrangement=FEW, threat=Threat.SIGN_FLIP_SCALED, rule=rule)
        for rule in (*both, Rule.NORM_BOUNDING)
    )
    many = (
        Case(arrangement=OPEN, threat=threat, rule=rule)
        for threat, rules in wanted.items()
        for rule in rules
    )
    return (*clean, *few, *many)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One benchmark run. Everything here is part of the result's name.

    Attributes:
        recipe: Of the recorded agents.
        n_held_out: Records of each category for the loss after one aggregation.
        rounds: Recipe of the federations in rounds.
        in_rounds: Which run in rounds.
        share_in_rounds: Of attackers there.
    """

    recipe: Recipe = field(
        default_factory=lambda: Recipe(
            n_records=160, n_rounds=5, local_steps=4, batch_size=16, learning_rate=1.2e-2
        )
    )
    arrangements: tuple[Arrangement, ...] = (OPEN, DIRICHLET, CELLS_OF_5, CELLS_OF_10)
    threats: tuple[Threat, ...] = tuple(Threat)
    seeds: tuple[int, ...] = (1, 2, 3)
    n_held_out: int = 6
    rounds: Recipe = field(
        default_factory=lambda: Recipe(
            n_records=160, n_rounds=4, local_steps=3, batch_size=8, learning_rate=1.2e-2
        )
    )
    in_rounds: tuple[Case, ...] = field(default_factory=_cases)
    share_in_rounds: float = 0.1

    def population(self, division: Division, seed: int) -> Population:
        """As many agents as the largest arrangement of this division wants."""
        n_agents = max(a.n_agents for a in self.arrangements if a.division is division)
        return Population(division=division, n_agents=n_agents, seed=seed, recipe=self.recipe)


QUICK: Final = Settings(
    recipe=Recipe(n_records=40, n_rounds=2, local_steps=1, batch_size=4, learning_rate=1.2e-2),
    arrangements=(OPEN,),
    threats=(Threat.NONE, Threat.SIGN_FLIP_SCALED),
    seeds=(1,),
    n_held_out=1,
    rounds=Recipe(n_records=40, n_rounds=1, local_steps=1, batch_size=4, learning_rate=1.2e-2),
    in_rounds=tuple(replace(case, n_answered=1) for case in _cases()[:3]),
)
"""For `--quick`: it shows that everything runs; its numbers mean nothing."""


def recorded(settings: Settings, division: Division, seed: int, folder: Path) -> Recording:
    """A recording, trained now if it is not kept."""
    population = settings.population(division, seed)
    digest = hashlib.sha256(json.dumps(asdict(population), sort_keys=True).encode())
    for file in (tiny_federation.__file__, robustness_recording.__file__):
        digest.update(Path(file).read_bytes())
    path = folder / f"robustness-{population.name}-{digest.hexdigest()[:12]}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        poisoners = {
            agent
            for one in settings.arrangements
            if one.division is division
            for agent in population.attackers(
                one.n_agents, max(one.n_attackers(share) for share in one.shares)
            )
        }
        save(record(Federation(population), sorted(poisoners), POISONS), path)
    return load(path)


def held_out(n_per_category: int, seed: int) -> list[Record]:
    """Records about subjects that no agent has records about."""
    return draw_records(
        tuple(Category),
        n_per_category,
        split=Split.TEST,
        rng=generator(seed, _HELD_OUT_STREAM),
        source="held-out",
    )


@functools.lru_cache(maxsize=8)
def held_out_examples(n_per_category: int, seed: int, recipe: Recipe) -> tuple[Example, ...]:
    """The same, as examples."""
    return tokenized(held_out(n_per_category, seed), recipe)


def score_of(loss: Mapping[str, float]) -> float:
    """The mean over categories of exp(-loss)."""
    return float(np.mean(np.exp(-np.array(list(loss.values())))))


def as_units(rows: Float32Array, cells: NDArray[np.int64]) -> ArrayUnits:
    """Members' updates as the filter sees them: all of a cell weigh alike."""
    n_cells, size = cells.shape
    means = rows if size == 1 else rows[cells].mean(axis=1, dtype=np.float64).astype(np.float32)
    counts = np.full(n_cells, size, np.int64)
    return ArrayUnits(means, counts, counts)


def _attack(threat: Threat, survives: Survives, *, alone: bool) -> Attack:
    if threat is Threat.ADAPTIVE:
        # From their own updates: copies of one would be found whatever they point to.
        return Adaptive(survives=survives, base=Base.OWN, omniscient=alone)
    return update_attacks(omniscient=alone)[_CRAFTS[threat]]


def sent_by_attackers(
    threat: Threat,
    own: Float32Array,
    honest: Float32Array,
    *,
    arrangement: Arrangement,
    layout: VectorLayout,
    number: int,
    last_change: Float32Array | None,
    seed: int,
) -> Float32Array:
    """What attackers send, [m, n_values].

    Args:
        threat: What they do.
        own: [m, n_values], what their training gave, on poisoned records where the threat says so.
        honest: [n - m, n_values], of which only an attacker who is alone makes use.
        arrangement: Of agents; the filter that adaptive attackers try is that of its mode.
        layout: Of the values.
        number: The round's, from 0.
        last_change: This round's release minus the one before; None in the first.
        seed: Of their chance.
    """
    if threat is not Threat.ADAPTIVE and threat not in _CRAFTS:
        return own
    imagined = arrangement.cells(seed + _IMAGINED)

    def survives(updates: Float32Array) -> NDArray[np.bool_]:
        found = aggregated(Rule.PIPELINE, as_units(updates, imagined), arrangement, layout, seed)
        kept = np.zeros(arrangement.n_agents, np.bool_)
        kept[imagined[found.outcome.kept]] = True
        return kept

    knowledge = Knowledge(
        own_updates=own,
        n_agents=arrangement.n_agents,
        layout=layout,
        round_number=number + 1,
        last_change=last_change,
        honest_updates=honest,
    )
    attack = _attack(threat, survives, alone=len(own) == 1)
    return attack.craft(knowledge, rng=generator(seed, _CRAFT_STREAM))


def aggregated(
    rule: Rule, units: ArrayUnits, arrangement: Arrangement, layout: VectorLayout, seed: int
) -> Aggregated:
    """One aggregation; the filter's secret is drawn by the seed, so that a run can be repeated."""
    secret = generator(seed, _FILTER_STREAM).bytes(32)
    return aggregate(units, rule, mode=arrangement.mode, layout=layout, seed=secret)
