"""Profile P3: the server clips what it is given and adds Gaussian noise to the mean.

The unit is one agent; neighbours differ in whether one agent's update is in the sum. The number of
agents n is public, so the divisor is no secret. For cells with mean x_j of m_j agents, clip norm C
and noise multiplier z,

    mean = (Σ_j m_j · x_j · min(1, C / ‖x_j‖) + N(0, (z S)² I)) / n

Without masks a cell is one agent, and the sum moves by S = C at most, whatever anybody sends. Under
masks each agent clips itself, so m_j · x_j moves by S = C and what rounding adds; projecting onto a
ball moves no two points apart, so clipping the cell's mean as well keeps that. There, all members
must be honest: one that sends values near the end of the ring makes those of others wrap, and then
the sum moves farther than is counted.

With an adaptive clip norm, a second sum is released with noise of deviation σ_b: that of b − ½ over
the agents, b = 1 where ‖x‖ ≤ C. One agent moves it by ½. Both together are one Gaussian mechanism
of multiplier z where the first has multiplier (z⁻² − (2σ_b)⁻²)^−½.

Source: McMahan et al., arXiv 1710.06963 (DP-FedAvg, fixed divisor); Andrew et al., arXiv
1905.03871, algorithm 1 and section 3 (adaptive clip norm, joint mechanism).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.errors import NoiseError
from privacy.noise import SecureStream
from privacy.updates import CellSum, l2_norm
from protocol.privacy import CentralPrivacy

_SLACK = 1.0 - 1e-6
"""Keeps a clipped mean within C in spite of float32."""


def sum_multiplier(privacy: CentralPrivacy) -> float:
    """The noise multiplier of the updates' sum: more than the round's where norms are counted too.

    Args:
        privacy: The manifest's block.
    """
    z = privacy.noise_multiplier
    if privacy.adaptive is None:
        return z
    return 1.0 / math.sqrt(z**-2 - (2.0 * privacy.adaptive.count_std) ** -2)


@dataclass(frozen=True, kw_only=True)
class NoisyMean:
    """A mean that may be shown to anyone, and what it was made with."""

    mean: NDArray[np.float64]
    """[n_values] float64."""
    n_cells: int
    n_agents: int
    clip_norm: float
    noise_std: float
    """Of each value of the mean."""
    next_clip_norm: float

    @property
    def norm(self) -> float:
        """L2 norm of the noisy mean."""
        return float(np.linalg.norm(self.mean))


def noisy_mean(
    cells: Iterable[CellSum],
    *,
    n_values: int,
    privacy: CentralPrivacy,
    clip_norm: float,
    rounding_norm: float,
    stream: SecureStream,
) -> NoisyMean:
    """Clip, add up, add noise, divide.

    Guarantees:
        1. One agent moves the sum before noise by at most `clip_norm` + `rounding_norm`, and the
           count of short updates by at most ½, whatever it sends (under masks: if all members of
           its cell are honest).
        2. Memory does not depend on the number of cells.
        3. A cell that is not finite counts as zero; it stays in the divisor.

    Args:
        cells: Lazily loaded sums of uniformly weighted updates, in an order that the caller fixes.
        n_values: Length of every sum.
        privacy: The manifest's block.
        clip_norm: C of this round.
        rounding_norm: What rounding may add to an update under masks; 0 without.
        stream: Fresh.

    Raises:
        NoiseError: No cell, a sum of another length, or weights that are not all 1.
    """
    total = np.zeros(n_values, np.float64)
    n_cells = n_agents = n_short = 0
    for cell in cells:
        if cell.weighted_sum.shape != (n_values,) or not 1 <= cell.n_members == cell.weight_sum:
            msg = (
                f"a cell of {cell.weighted_sum.shape} values, {cell.n_members} agents and weight "
                f"{cell.weight_sum}; expected ({n_values},) and a weight of 1 for each agent"
            )
            raise NoiseError(msg)
        n_cells += 1
        n_agents += cell.n_members
        norm = l2_norm(cell.weighted_sum) / cell.n_members
        if math.isfinite(norm):
            n_short += cell.n_members * (norm <= clip_norm)
            scale = min(1.0, clip_norm * _SLACK / norm) if norm > 0.0 else 1.0
            total += cell.weighted_sum * np.float64(scale)
        del cell  # or it would stay in memory while the next one is loaded
    if n_cells == 0:
        msg = "there is no cell to average"
        raise NoiseError(msg)
    std = sum_multiplier(privacy) * (clip_norm + rounding_norm)
    noise = np.empty(n_values, np.float64)
    stream.fill_normal(noise)
    noise *= std
    total += noise
    total /= n_agents
    return NoisyMean(
        mean=total,
        n_cells=n_cells,
        n_agents=n_agents,
        clip_norm=clip_norm,
        noise_std=std / n_agents,
        next_clip_norm=_next_clip_norm(privacy, clip_norm, n_short, n_agents, stream),
    )


def _next_clip_norm(
    privacy: CentralPrivacy, clip_norm: float, n_short: int, n_agents: int, stream: SecureStream
) -> float:
    rule = privacy.adaptive
    if rule is None:
        return clip_norm
    noise = np.empty(1)
    stream.fill_normal(noise)
    counted = (n_short - n_agents / 2.0) + rule.count_std * float(noise[0])
    short_frac = counted / n_agents + 0.5
    # The step is bounded, so that noise on the count of few agents cannot blow the norm up.
    return clip_norm * math.exp(
        -rule.learning_rate * min(1.0, max(-1.0, short_frac - rule.quantile))
    )
