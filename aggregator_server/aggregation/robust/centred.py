"""Centred clipping: each unit moves the centre by no more than a radius."""

from typing import Final

import numpy as np

from aggregator_server.aggregation.robust.gram import distances_to
from aggregator_server.aggregation.robust.units import Float64Array
from aggregator_server.errors import AggregationError

N_ITERATIONS: Final = 3


def centred_clipping(
    gram: Float64Array,
    weights: Float64Array,
    *,
    radius: float,
    n_iterations: int = N_ITERATIONS,
) -> Float64Array:
    """The clipped centre as coefficients over the units.

    The centre begins at zero: the release itself, as an update is the difference from it.

    Guarantees:
        1. In each iteration a unit moves the centre by at most its share of the weight times
           `radius`.
        2. With a radius that no unit exceeds, the result is the weighted mean.

    Args:
        gram: [k, k] float64 inner products of the units, k at least 1.
        weights: [k], above 0; need not sum to 1. The paper's units count equally.
        radius: τ, above 0.
        n_iterations: L, at least 1.

    Returns:
        [k] float64, at least 0, with a sum of at most 1: the centre is Σ result_i·x_i.

    Raises:
        AggregationError: Shapes that do not match, or a number out of its range.

    Source: Karimireddy, He and Jaggi, "Learning from History for Byzantine Robust Optimization",
    ICML 2021, arXiv 2012.10333, algorithm 2. We deviate: no momentum on the units, whose cohort
    changes from round to round.
    """
    if gram.shape != (len(weights), len(weights)) or len(weights) == 0:
        msg = f"inner products of shape {gram.shape} for {len(weights)} weights; expected k × k"
        raise AggregationError(msg)
    if not radius > 0.0 or n_iterations < 1 or not weights.min() > 0.0:
        msg = (
            f"centred clipping by {radius} in {n_iterations} iterations with a least weight of "
            f"{weights.min()}; expected above 0, at least 1, and above 0"
        )
        raise AggregationError(msg)
    shares = weights / weights.sum()
    centre = np.zeros(len(weights))
    for _ in range(n_iterations):
        distances = distances_to(gram, centre)
        pulls = shares * np.divide(
            radius, distances, out=np.ones(len(shares)), where=distances > radius
        )
        centre = (1.0 - pulls.sum()) * centre + pulls
    return centre
