"""Arithmetic on a few long vectors, in float64 and with little memory beside them."""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from privacy.updates import Float32Array
from simulations.errors import AttackError

Float64Array = NDArray[np.float64]

_CHUNK_VALUES: Final = 1 << 16


def mean_of(rows: Float32Array) -> Float64Array:
    """The mean of rows [k, n_values]: [n_values] float64."""
    mean: Float64Array = rows.mean(axis=0, dtype=np.float64)
    return mean


def std_of(rows: Float32Array) -> Float64Array:
    """The sample standard deviation (k - 1) of each value over rows [k, n_values].

    Raises:
        AttackError: One row, or rows that are all equal: no spread can be estimated from them.
    """
    mean = mean_of(rows)
    squares = np.zeros_like(mean)
    for row in rows:
        squares += np.square(row - mean)
    if len(rows) < 2 or not squares.any():
        raise AttackError(
            f"{len(rows)} updates known, and no two differ; the attack estimates a spread from "
            "two different ones at least, so it needs more attackers or an omniscient one"
        )
    spread: Float64Array = np.sqrt(squares / (len(rows) - 1))
    return spread


def inner_products(
    rows: Float32Array, *, centre: Float64Array, direction: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Products of rows about a centre, which tell all distances between rows and points on a line.

    Args:
        rows: [k, n_values].
        centre: [n_values], subtracted from each row.
        direction: [n_values].

    Returns:
        [k, k] of the centred rows with each other, and [k] of them with the direction.
    """
    among = np.zeros((len(rows), len(rows)))
    along = np.zeros(len(rows))
    for start in range(0, rows.shape[1], _CHUNK_VALUES):
        part = slice(start, start + _CHUNK_VALUES)
        centred = rows[:, part] - centre[part]
        among += centred @ centred.T
        along += centred @ direction[part]
    return among, along


def as_updates(rows: NDArray[np.floating], *, n_rows: int) -> Float32Array:
    """What is uploaded: float32, and finite.

    Args:
        rows: [n_rows, n_values], or [n_values] for as many equal rows.
        n_rows: Attackers.

    Raises:
        AttackError: A value is too large for float32; a server refuses such an update unread.
    """
    with np.errstate(over="ignore"):  # checked on the next line
        updates = np.array(np.broadcast_to(rows, (n_rows, rows.shape[-1])), np.float32)
    if not all(np.isfinite(row).all() for row in updates):
        raise AttackError(
            "the attack's updates are too large for float32, and a server refuses what is not "
            "finite; use a smaller factor"
        )
    return updates


def largest_kept(
    is_kept: Callable[[float], bool],
    *,
    reach: float,
    precision: float = 1e-4,
    n_halvings: int = 40,
) -> float:
    """The largest γ that is kept: halve γ from `reach` down to the first that is, then bisect up.

    Guarantees:
        1. The result is kept, or 0.
        2. Where all γ below a bound in (0, reach) are kept and none above it, the result lies
           below the bound by at most `precision` times it.

    A filter need not be so simple: where γ is kept in several intervals, one between two tried
    values may be missed.

    Args:
        is_kept: Whether γ is; the same γ may be asked for again.
        reach: Largest γ tried, above 0.
        precision: Relative.
        n_halvings: How often γ is halved before 0 is returned.

    Source: Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021, algorithm 1. The
        paper starts from a guess and adds ever smaller steps, so it cannot leave a factor of three
        around the guess; ours finds the magnitude first.
    """
    if is_kept(reach):
        return reach
    above, below = reach, reach / 2
    for _ in range(n_halvings):
        if is_kept(below):
            break
        above, below = below, below / 2
    else:
        return 0.0
    while above - below > precision * above:
        middle = (above + below) / 2
        above, below = (above, middle) if is_kept(middle) else (middle, below)
    return below
