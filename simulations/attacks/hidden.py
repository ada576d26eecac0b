"""Attacks on updates that stay among honest ones: ALIE, inner products, min-max and min-sum.

All of them place every attacker at one point: the mean of the updates they take for honest ones,
plus γ along a direction that does harm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np

from privacy.updates import Float32Array
from simulations.attacks.knowledge import Knowledge, require_at_least
from simulations.attacks.vectors import (
    Float64Array,
    as_updates,
    inner_products,
    largest_kept,
    mean_of,
    std_of,
)
from simulations.errors import AttackError


class Direction(StrEnum):
    """Where attackers push the mean of benign updates."""

    UNIT = "inverse unit vector"
    """Against the mean itself."""
    STD = "inverse standard deviation"
    """Every value down, by its spread."""
    SIGN = "inverse sign"
    """Every value against its mean's sign, all by the same amount."""

    def of(self, benign: Float32Array) -> Float64Array:
        """The direction, of L2 norm one.

        Args:
            benign: [k, n_values].

        Returns:
            [n_values].

        Raises:
            AttackError: The mean (or for `STD` the spread) is zero.

        Source: Shejwalkar and Houmansadr, NDSS 2021, "perturbation vectors". Theirs are of
            different lengths, which changes γ and not γ times the vector.
        """
        direction = self._unscaled(benign)
        norm = float(np.linalg.norm(direction))
        if norm == 0.0:
            raise AttackError("the mean of the known updates is zero; there is nothing to invert")
        return direction / norm

    def _unscaled(self, benign: Float32Array) -> Float64Array:
        match self:
            case Direction.UNIT:
                return -mean_of(benign)
            case Direction.STD:
                return -std_of(benign)
            case Direction.SIGN:
                return -np.sign(mean_of(benign))


def alie_z_max(*, n_agents: int, n_attackers: int) -> float:
    """How many standard deviations off the mean attackers still have a majority beside them.

    s = floor(n / 2 + 1) - m honest agents are needed for a majority; z is where as many of the
    n - m honest ones are expected farther out. Negative where attackers are too few for any z.

    Args:
        n_agents: n.
        n_attackers: m, at least 1 and less than half of n.

    Raises:
        AttackError: The attackers are none, or a majority without anyone's help.

    Source: Baruch, Baruch and Goldberg, "A Little Is Enough", NeurIPS 2019 (arXiv 1902.06156),
        section 3 and algorithm 3.
    """
    n_needed = n_agents // 2 + 1 - n_attackers
    if n_attackers < 1 or n_needed < 1:
        raise AttackError(
            f"{n_attackers} attackers of {n_agents} agents; z is defined for at least 1 and less "
            "than half"
        )
    n_honest = n_agents - n_attackers
    return NormalDist().inv_cdf((n_honest - n_needed) / n_honest)


@dataclass(frozen=True, kw_only=True)
class Alie:
    """A little is enough: every value z standard deviations below its mean.

    Attackers know: their own honest updates, of which they take mean and deviation; n and m.
    Omniscient: the honest agents' updates.

    Attributes:
        z: Above 0; None: `alie_z_max`.
        omniscient: Whether the honest agents' updates are seen.

    Raises (from `craft`): `AttackError`, no two known updates differ, or no z is given and
    `alie_z_max` is not above 0: a lone attacker has no estimate, and too few have no cover.

    Source: Baruch et al., NeurIPS 2019 (arXiv 1902.06156), algorithm 3. The deviation is the
        sample's, over k - 1.
    """

    z: float | None = None
    omniscient: bool = False

    def __post_init__(self) -> None:
        """Check z."""
        if self.z is not None:
            require_at_least("z", self.z, 0.0, above=True)

    def craft(
        self,
        knowledge: Knowledge,
        *,
        rng: np.random.Generator,  # noqa: ARG002 - interface
    ) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        z = self.z
        if z is None:
            z = alie_z_max(n_agents=knowledge.n_agents, n_attackers=knowledge.n_attackers)
            if z <= 0.0:
                raise AttackError(
                    f"ALIE's z is {z:.3f} for {knowledge.n_attackers} attackers of "
                    f"{knowledge.n_agents} agents, so nothing can be hidden; give z"
                )
        benign = knowledge.benign(omniscient=self.omniscient)
        return as_updates(mean_of(benign) - z * std_of(benign), n_rows=knowledge.n_attackers)


@dataclass(frozen=True, kw_only=True)
class InnerProduct:
    """Inner-product manipulation: the mean of honest updates backwards, `scale` times as long.

    A small scale stays near the honest updates and only slows the average down; above
    (n - m) / m it turns the average round.

    Attackers know: their own honest updates, of which they take the mean. Omniscient: the honest
    agents' updates, as in the paper.

    Attributes:
        scale: The paper's ε, above 0.
        omniscient: Whether the honest agents' updates are seen.

    Source: Xie, Koyejo and Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner
        Product Manipulation", UAI 2019 (PMLR 115, 2020; arXiv 1903.03936), section 3.
    """

    scale: float
    omniscient: bool = False

    def __post_init__(self) -> None:
        """Check the scale."""
        require_at_least("scale", self.scale, 0.0, above=True)

    def craft(
        self,
        knowledge: Knowledge,
        *,
        rng: np.random.Generator,  # noqa: ARG002 - interface
    ) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        benign = knowledge.benign(omniscient=self.omniscient)
        return as_updates(-self.scale * mean_of(benign), n_rows=knowledge.n_attackers)


@dataclass(frozen=True, kw_only=True)
class MinMax:
    """As far off as no farther from any benign update than two benign ones are from each other.

    max_i |x - x_i| ≤ max_ij |x_i - x_j| for x = mean + γ·direction, with the largest such γ.

    Attackers know: their own honest updates, two different ones at least. Omniscient: the honest
    agents' updates.

    Attributes:
        direction: Where to.
        omniscient: Whether the honest agents' updates are seen.

    Source: Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021, section
        "AGR-agnostic attacks", min-max.
    """

    direction: Direction = Direction.STD
    omniscient: bool = False

    def craft(
        self,
        knowledge: Knowledge,
        *,
        rng: np.random.Generator,  # noqa: ARG002 - interface
    ) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        return _farthest(knowledge, self.direction, np.max, omniscient=self.omniscient)


@dataclass(frozen=True, kw_only=True)
class MinSum:
    """As far off as with squared distances that add up to no more than a benign update's.

    Σ_i |x - x_i|² ≤ max_i Σ_j |x_i - x_j|² for x = mean + γ·direction, with the largest such γ.
    It mostly lies nearer to the benign ones than min-max, and so is harder to see.

    Attackers know: their own honest updates, two different ones at least. Omniscient: the honest
    agents' updates.

    Attributes:
        direction: Where to.
        omniscient: Whether the honest agents' updates are seen.

    Source: Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021, section
        "AGR-agnostic attacks", min-sum.
    """

    direction: Direction = Direction.STD
    omniscient: bool = False

    def craft(
        self,
        knowledge: Knowledge,
        *,
        rng: np.random.Generator,  # noqa: ARG002 - interface
    ) -> Float32Array:
        """Make what is sent; see `Attack.craft`."""
        return _farthest(knowledge, self.direction, np.sum, omniscient=self.omniscient)


def _farthest(
    knowledge: Knowledge,
    direction: Direction,
    total: Callable[[Float64Array], np.float64],
    *,
    omniscient: bool,
) -> Float32Array:
    """Go as far as `total` of the squared distances is no more than a benign update's largest."""
    benign = knowledge.benign(omniscient=omniscient)
    std_of(benign)  # refuses updates without a spread
    mean, unit = mean_of(benign), direction.of(benign)
    among, along = inner_products(benign, centre=mean, direction=unit)
    squares = np.diag(among)
    distances = squares[:, None] + squares[None, :] - 2.0 * among  # squared, [k, k]
    allowed = max(float(total(row)) for row in distances)

    def is_kept(gamma: float) -> bool:
        return float(total(squares - 2.0 * gamma * along + gamma**2)) <= allowed

    # |x - x_i|² ≥ (γ - |mean - x_i|)², and both roots are at most the allowed distance.
    gamma = largest_kept(is_kept, reach=2.0 * float(np.sqrt(allowed)))
    return as_updates(mean + gamma * unit, n_rows=knowledge.n_attackers)
