"""Krum and Multi-Krum: the units whose nearest neighbours are nearest."""

import numpy as np

from aggregator_server.aggregation.robust.units import BoolArray, Float64Array
from aggregator_server.errors import AggregationError

MIN_UNITS = 3


def most_hostile(n_units: int) -> int:
    """The largest number of hostile units for which Krum's proof holds: 2f + 2 < n."""
    return max(0, (n_units - 3) // 2)


def krum_scores(distances: Float64Array, *, n_hostile: int) -> Float64Array:
    """The sum of squared distances to the n - f - 2 nearest other units.

    Args:
        distances: [n, n] squared distances, zero on the diagonal.
        n_hostile: f, at least 0, with 2f + 2 < n.

    Returns:
        [n] float64.

    Raises:
        AggregationError: Too few units for so many hostile ones.

    Source: Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017, section 4.
    """
    n = len(distances)
    if n_hostile < 0 or 2 * n_hostile + 2 >= n:
        msg = (
            f"Krum of {n} units with {n_hostile} hostile ones; "
            f"it needs at least {2 * max(n_hostile, 0) + 3} units"
        )
        raise AggregationError(msg)
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    others.sort(axis=1)
    scores: Float64Array = others[:, : n - n_hostile - 2].sum(axis=1)
    return scores


def krum(distances: Float64Array, *, n_hostile: int, n_selected: int) -> BoolArray:
    """Select the units of the lowest scores: Krum with one, Multi-Krum with several.

    Guarantees:
        1. Exactly `n_selected` are selected; the order of the units does not matter, but for
           units of equal scores.

    Args:
        distances: [n, n] squared distances.
        n_hostile: f, with 2f + 2 < n.
        n_selected: m, from 1 to n; the paper's experiments take n - f.

    Returns:
        [n] bool.

    Raises:
        AggregationError: Too few units, or more to select than there are.

    Source: Blanchard et al., NeurIPS 2017, sections 4 (Krum) and 6 (m-Krum).
    """
    scores = krum_scores(distances, n_hostile=n_hostile)
    if not 1 <= n_selected <= len(scores):
        msg = f"{n_selected} of {len(scores)} units to select; expected 1 to {len(scores)}"
        raise AggregationError(msg)
    selected = np.zeros(len(scores), np.bool_)
    selected[np.argsort(scores, kind="stable")[:n_selected]] = True
    return selected
