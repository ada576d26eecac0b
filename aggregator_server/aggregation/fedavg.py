"""Weighted federated averaging, one cell in memory at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator_server.errors import AggregationError
from privacy.updates import CellSum, Float32Array


@dataclass(frozen=True, kw_only=True)
class Average:
    """A mean update, and what it was made of."""

    mean: NDArray[np.float64]
    """Σ w·x / Σ w over all members of all cells, [n_values] float64."""
    n_cells: int
    n_agents: int
    weight_sum: int

    @property
    def norm(self) -> float:
        """L2 norm of the mean update."""
        return float(np.linalg.norm(self.mean))


def average(cells: Iterable[CellSum], *, n_values: int) -> Average:
    """The weighted mean of updates (FedAvg).

    Guarantees:
        1. Memory does not depend on the number of cells: one float64 accumulator, and one cell at
           a time as the iterable yields it.
        2. Equal cells in equal order give equal bits.

    Args:
        cells: Lazily loaded sums, in an order that the caller fixes.
        n_values: Length of every sum.

    Returns:
        The mean with its counts.

    Raises:
        AggregationError: No cell, a sum of another length, a weight below 1, or a mean that is not
            finite.

    Source: McMahan et al., arXiv 1602.05629, algorithm 1; over updates instead of weights.
    """
    total = np.zeros(n_values, np.float64)
    n_cells = n_agents = weight_sum = 0
    with np.errstate(over="ignore", invalid="ignore"):  # the mean is checked as a whole below
        for cell in cells:
            if cell.weighted_sum.shape != (n_values,) or cell.weight_sum < 1:
                msg = (
                    f"a cell of {cell.weighted_sum.shape} values and weight {cell.weight_sum}; "
                    f"expected ({n_values},) and at least 1"
                )
                raise AggregationError(msg)
            np.add(total, cell.weighted_sum, out=total)
            n_cells += 1
            n_agents += cell.n_members
            weight_sum += cell.weight_sum
            del cell  # or it would stay in memory while the next one is loaded
    if n_cells == 0:
        msg = "there is no cell to average"
        raise AggregationError(msg)
    total /= weight_sum
    if not np.isfinite(total).all():
        msg = f"the mean update of {n_agents} agents has values that are not finite"
        raise AggregationError(msg)
    return Average(mean=total, n_cells=n_cells, n_agents=n_agents, weight_sum=weight_sum)


def apply_mean(vector: Float32Array, mean: NDArray[np.float64]) -> Float32Array:
    """The next global vector: the release's own plus the mean update.

    Args:
        vector: [n_values] float32, what the round started from.
        mean: [n_values] float64.

    Returns:
        [n_values] float32.

    Raises:
        AggregationError: A value that float32 cannot hold.
    """
    with np.errstate(over="ignore"):
        moved = (vector + mean).astype(np.float32)
    if not np.isfinite(moved).all():
        msg = "the new adapter has values that are not finite"
        raise AggregationError(msg)
    return moved
