"""What attackers know, and the one shape that all attacks on updates have.

Attackers are members of the cohort. They follow the protocol up to the moment of upload, so that
each has the update of an honest training in hand, and they share these with each other. What the
other members send they do not see, unless an attack is told to be *omniscient*: that is more than
an adversary has in a deployment, and serves as the worst case.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from privacy.updates import Float32Array
from protocol.layout import VectorLayout
from simulations.errors import AttackError


@dataclass(frozen=True, kw_only=True, eq=False)
class Knowledge:
    """What all attackers of one round know together; m of n agents are attackers.

    Attributes:
        own_updates: [m, n_values] float32, finite: what the attackers' own training gave. For an
            attack that carries a backdoor, train them on poisoned records.
        n_agents: n, attackers included; more than m.
        layout: The vector's order; its length is n_values.
        round_number: From 1.
        last_change: [n_values] float32, this round's release minus the one before, which every
            agent knows; None in the first round.
        honest_updates: [n - m, n_values] float32, finite: what the others will send; None where
            that is not known. Only an omniscient attack looks at it.

    Raises (at construction): `AttackError`, a shape, type or number that does not fit.
    """

    own_updates: Float32Array
    n_agents: int
    layout: VectorLayout
    round_number: int
    last_change: Float32Array | None = None
    honest_updates: Float32Array | None = None

    def __post_init__(self) -> None:
        """Check everything against everything."""
        n_values = self.layout.n_values
        if self.own_updates.ndim != 2 or not 1 <= len(self.own_updates) < self.n_agents:
            raise AttackError(
                f"own updates of shape {self.own_updates.shape} among {self.n_agents} agents; "
                "there must be at least one attacker and one honest agent"
            )
        if self.round_number < 1:
            raise AttackError(f"round number {self.round_number}; rounds count from 1")
        _check("own updates", self.own_updates, (self.n_attackers, n_values))
        if self.last_change is not None:
            _check("last change", self.last_change, (n_values,))
        if self.honest_updates is not None:
            _check("honest updates", self.honest_updates, (self.n_honest, n_values))

    @property
    def n_attackers(self) -> int:
        """The m of the papers."""
        return len(self.own_updates)

    @property
    def n_honest(self) -> int:
        """The n - m of the papers."""
        return self.n_agents - self.n_attackers

    @property
    def n_values(self) -> int:
        """Length of an update."""
        return self.layout.n_values

    def benign(self, *, omniscient: bool) -> Float32Array:
        """The updates from which attackers judge what honest ones look like.

        Args:
            omniscient: Take the honest agents' own, instead of the attackers' honest trainings.

        Returns:
            [m, n_values], or [n - m, n_values] for an omniscient attack.

        Raises:
            AttackError: An omniscient attack, and the honest updates are not known.
        """
        if not omniscient:
            return self.own_updates
        if self.honest_updates is None:
            raise AttackError(
                "an omniscient attack needs honest_updates, and they are not known; give them or "
                "set omniscient to False"
            )
        return self.honest_updates


class Attack(Protocol):
    """An attack on updates.

    Guarantees (of each attack here):
        1. The result is [m, n_values] float32, finite, and memory of its own.
        2. What is known is not changed.
        3. Equal knowledge and an equal state of `rng` give equal bits.
    """

    def craft(self, knowledge: Knowledge, *, rng: np.random.Generator) -> Float32Array:
        """Make what the attackers send instead of their updates.

        Args:
            knowledge: What they know.
            rng: All chance of the attack; attacks without chance leave it alone.

        Returns:
            [m, n_values] float32, one row for each attacker.

        Raises:
            AttackError: The attack cannot be made with what is known.
        """
        ...


def require_at_least(name: str, value: float, least: float, *, above: bool = False) -> None:
    """Check an attack's parameter.

    Args:
        name: What it is called.
        value: What it is.
        least: The least it may be.
        above: Refuse `least` itself.

    Raises:
        AttackError: It is smaller, or not finite.
    """
    if not np.isfinite(value) or value < least or (above and value == least):
        limit = f"more than {least}" if above else f"{least} or more"
        raise AttackError(f"{name} is {value}; it must be {limit}")


def _check(name: str, values: Float32Array, shape: tuple[int, ...]) -> None:
    if values.dtype != np.float32 or values.shape != shape:
        raise AttackError(
            f"{name} of shape {values.shape} and type {values.dtype}; expected {shape} float32"
        )
    # A row at a time: an update may have tens of millions of values.
    if not all(np.isfinite(row).all() for row in values.reshape(-1, shape[-1])):
        raise AttackError(f"{name} with a value that is not finite; only finite ones are uploaded")
