"""Norm caps: no unit's update counts as longer than a bound, which may be the round's median norm.

After the cap a hostile unit may point where it likes, but cannot be louder than half of the others.
"""

import numpy as np

from aggregator_server.aggregation.robust.units import Float64Array, Units, loaded
from aggregator_server.errors import AggregationError
from privacy.updates import l2_norm


def norms(units: Units) -> Float64Array:
    """The L2 norm of each unit's update, one unit in memory at a time.

    Args:
        units: The round's units.

    Returns:
        [n] float64; NaN for a unit that is not finite.

    Raises:
        AggregationError: A unit of another length.
    """
    return np.array([l2_norm(loaded(units, index)) for index in range(len(units.weights))])


def median_norm(lengths: Float64Array) -> float:
    """The median norm; of an even number the lower of the two in the middle.

    Guarantees:
        1. At most the largest honest norm while at least half of the units are honest, whatever
           the others send. (The mean of the two in the middle would not be: with two units, one of
           them hostile, it is half of whatever the hostile one sends.)

    Args:
        lengths: [n] float64, finite, at least one.

    Raises:
        AggregationError: None, or one that is not finite.
    """
    if lengths.size == 0 or not np.isfinite(lengths).all():
        msg = f"no median of {lengths.size} norms, of which all must be finite"
        raise AggregationError(msg)
    return float(np.sort(lengths)[(lengths.size - 1) // 2])


def cap_factors(lengths: Float64Array, bound: float) -> Float64Array:
    """What to scale each update by so that none is longer than `bound`.

    Guarantees:
        1. Every capped norm is at most `bound`, up to rounding; a unit within it is left as it is.
        2. Directions do not change: a factor lies in [0, 1].

    Args:
        lengths: [n] float64 norms, finite.
        bound: Largest norm, at least 0.

    Returns:
        [n] float64.

    Raises:
        AggregationError: A bound that is negative or no number, or a norm that is not finite.

    Source: norm bounding, Sun et al., "Can You Really Backdoor Federated Learning?",
    arXiv 1911.07963, section 4.
    """
    if not bound >= 0.0 or not np.isfinite(lengths).all():
        msg = f"a norm bound of {bound} over norms of which all must be finite; expected 0 or more"
        raise AggregationError(msg)
    over = lengths > bound
    factors = np.divide(bound, lengths, out=np.ones(len(lengths)), where=over)
    # A subnormal factor has too few digits to keep the bound; what it would leave is nothing.
    factors[factors < np.finfo(np.float64).tiny] = 0.0
    return factors
