"""The attack of one who knows the filter: as far as it can be pushed and still be kept."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from privacy.updates import Float32Array, l2_norm
from simulations.attacks.hidden import Direction
from simulations.attacks.knowledge import Knowledge, require_at_least
from simulations.attacks.vectors import as_updates, largest_kept, mean_of, std_of
from simulations.errors import AttackError

Survives = Callable[[Float32Array], NDArray[np.bool_]]
"""A filter: of updates [n, n_values] it says which are kept, [n]."""


class Base(StrEnum):
    """What the malicious direction is added to."""

    OWN = "each attacker's own update"
    """Attackers differ as honest agents do."""
    MEAN = "the mean of benign updates"
    """All attackers send the same."""


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Base + γ·direction with the largest γ at which the filter keeps the attackers.

    The attackers run the filter themselves, on a cohort that they make up: their malicious updates
    first, then a stand-in for each honest agent. Stand-ins are Gaussian, with the deviation of the
    attackers' own honest updates, value by value, about a centre as far from these updates' mean as
    a mean of m may be off the true one. γ has to be kept in several such cohorts, since neither the
    honest agents nor a filter's own chance can be foreseen. Where no γ is kept, they send the base,
    and wait.

    Attackers know: their own honest updates, two different ones at least; n and m; the filter with
    all its settings. Omniscient: the honest agents' updates, which then are the cohort.

    Guarantees:
        1. For an omniscient attack on a filter without chance: unless γ is 0, the filter keeps at
           least `kept_frac` of the attackers; and if it keeps no γ beyond some bound within reach,
           γ is within 0.01 % of one that is not kept.

    Attributes:
        survives: The filter.
        direction: Where to.
        base: From where.
        kept_frac: Part of the attackers that has to be kept, above 0 and at most 1. A filter that
            always removes a share removes some of them by chance, whatever they send.
        n_trials: Cohorts, and runs of the filter, in which γ has to be kept.
        reach: Largest γ tried, as a multiple of the benign updates' median norm. A filter that
            caps norms may keep any γ, and nothing is gained far beyond the cap.
        omniscient: Whether the honest agents' updates are seen.

    Source: Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021, the "AGR-tailored"
        attacks, equation 1 with their algorithm 1; they take the attackers' updates themselves for
        the honest ones', ours makes as many stand-ins as there are honest agents.
    """

    survives: Survives
    direction: Direction = Direction.UNIT
    base: Base = Base.MEAN
    kept_frac: float = 0.5
    n_trials: int = 3
    reach: float = 16.0
    omniscient: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        require_at_least("kept_frac", self.kept_frac, 0.0, above=True)
        require_at_least("n_trials", self.n_trials, 1)
        require_at_least("reach", self.reach, 0.0, above=True)
        if self.kept_frac > 1.0:
            raise AttackError(f"kept_frac is {self.kept_frac}; it must be 1 or less")

    def craft(self, knowledge: Knowledge, *, rng: np.random.Generator) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        benign = knowledge.benign(omniscient=self.omniscient)
        unit = self.direction.of(benign)
        base = knowledge.own_updates if self.base is Base.OWN else mean_of(benign)
        cohorts = self._cohorts(knowledge, rng)

        def pushed(gamma: float) -> Float32Array:
            return as_updates(base + gamma * unit, n_rows=knowledge.n_attackers)

        def is_kept(gamma: float) -> bool:
            malicious = pushed(gamma)
            return all(self._is_kept(malicious, cohort) for cohort in cohorts)

        norm = float(np.median([l2_norm(row) for row in benign]))
        return pushed(largest_kept(is_kept, reach=self.reach * norm, n_halvings=20))

    def _cohorts(self, knowledge: Knowledge, rng: np.random.Generator) -> list[Float32Array]:
        """The other n - m updates, as the attackers see or imagine them, once for each trial."""
        if self.omniscient:
            return [knowledge.benign(omniscient=True)] * self.n_trials
        mean, spread = mean_of(knowledge.own_updates), std_of(knowledge.own_updates)
        n_values, n_honest = knowledge.n_values, knowledge.n_honest
        cohorts = []
        for _ in range(self.n_trials):
            error = rng.standard_normal(n_values) / np.sqrt(knowledge.n_attackers)
            others = np.empty((n_honest, n_values), np.float32)
            for number in range(n_honest):
                others[number] = mean + spread * (error + rng.standard_normal(n_values))
            cohorts.append(others)
        return cohorts

    def _is_kept(self, malicious: Float32Array, others: Float32Array) -> bool:
        kept = self.survives(np.concatenate([malicious, others]))
        n_agents = len(malicious) + len(others)
        if kept.shape != (n_agents,) or kept.dtype != np.bool_:
            raise AttackError(
                f"the filter gave {kept.shape} {kept.dtype} for {n_agents} updates; it must give "
                "one boolean for each"
            )
        return float(np.mean(kept[: len(malicious)])) >= self.kept_frac
