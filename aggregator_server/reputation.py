"""Who is it, when cells go wrong again and again: evidence over rounds, for each member.

A round judges units: single updates in the open mode, cells under masks. What became of a unit is a
matter of who was in it, so one logistic model serves both modes:

    log-odds that a unit is removed = b + sum over its members of θ

θ is a member's own part; its prior is normal around 0, so what happened once says little. In the
open mode a unit has one member and θ is that member's record. Under masks members are told apart by
the cells that they shared with different others in different rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

PRIOR_STD: Final = 1.5
"""Of θ, in log-odds."""
_BASE_STD: Final = 3.0
"""Of b around the log-odds of the mean rate."""
MIN_REMOVED: Final = 3
"""Fewer removals of units with a member in them are chance."""
SUSPECT_STDS: Final = 3.0
"""A member is suspected when θ is so many standard errors above 0."""
_MAX_STEPS: Final = 100
_TOLERANCE: Final = 1e-9
_LONGEST_STEP: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What became of a unit of a round."""

    members: tuple[bytes, ...]
    removed: bool
    score: float | None = None
    """The filter's score of a unit of one member, where it gave one; 1 is ordinary."""


@dataclass(frozen=True, kw_only=True)
class Reputation:
    """The evidence on a member."""

    agent: bytes
    n_judged: int
    """Units with this member in them."""
    n_removed: int
    mean_score: float | None
    log_odds: float
    """θ: by how much a unit is likelier to be removed with this member in it."""
    std_error: float

    @property
    def is_suspected(self) -> bool:
        """Whether the evidence has repeated itself beyond chance."""
        return self.n_removed >= MIN_REMOVED and self.log_odds > SUSPECT_STDS * self.std_error


def reputations(observations: Sequence[Observation]) -> tuple[Reputation, ...]:
    """The evidence on every member that was judged, by identity.

    Guarantees:
        1. Equal observations in another order give equal evidence.
        2. A member of no removed unit has θ = 0, and is never suspected.
        3. Nobody is suspected on fewer than `MIN_REMOVED` removals.

    Args:
        observations: Of all rounds that count.

    Source: the maximum a posteriori of a logistic regression by Newton's method; standard errors by
    Laplace's approximation. Members who were in no removed unit keep θ at its prior mean: they
    cannot be to blame, and the model stays small.
    """
    known: dict[bytes, list[Observation]] = {}
    for one in observations:
        for agent in one.members:
            known.setdefault(agent, []).append(one)
    blamed = sorted(agent for agent, own in known.items() if any(one.removed for one in own))
    places = {agent: place for place, agent in enumerate(blamed)}
    design = np.zeros((len(observations), len(blamed) + 1))
    design[:, -1] = 1.0
    for row, one in enumerate(observations):
        for agent in one.members:
            if agent in places:
                design[row, places[agent]] = 1.0
    removed = np.array([one.removed for one in observations], np.float64)
    effects, errors = _fit(design, removed)
    found = []
    for agent, own in sorted(known.items()):
        scores = [one.score for one in own if one.score is not None and len(one.members) == 1]
        place = places.get(agent)
        found.append(
            Reputation(
                agent=agent,
                n_judged=len(own),
                n_removed=sum(one.removed for one in own),
                mean_score=float(np.mean(scores)) if scores else None,
                log_odds=0.0 if place is None else float(effects[place]),
                std_error=PRIOR_STD if place is None else float(errors[place]),
            )
        )
    return tuple(found)


def _fit(
    design: NDArray[np.float64], removed: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Posterior mode and standard errors; the last column is the intercept."""
    n, k = design.shape
    if n == 0:
        return np.zeros(k), np.full(k, PRIOR_STD)
    rate = (removed.sum() + 0.5) / (n + 1.0)
    centre = np.zeros(k)
    centre[-1] = np.log(rate / (1.0 - rate))
    precision = np.full(k, PRIOR_STD**-2)
    precision[-1] = _BASE_STD**-2
    weights = centre.copy()
    hessian = np.diag(precision)
    for _ in range(_MAX_STEPS):
        chance = 1.0 / (1.0 + np.exp(-design @ weights))
        gradient = design.T @ (removed - chance) - precision * (weights - centre)
        hessian = (design.T * (chance * (1.0 - chance))) @ design + np.diag(precision)
        step = np.linalg.solve(hessian, gradient)
        longest = np.abs(step).max()
        # The posterior is log-concave; the bound keeps a first step from overshooting.
        weights += step * min(1.0, _LONGEST_STEP / max(longest, _TOLERANCE))
        if longest < _TOLERANCE:
            break
    return weights, np.sqrt(np.diag(np.linalg.inv(hessian)))
