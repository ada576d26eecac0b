"""Divide and conquer: units that stand out along the direction in which units differ most.

Colluders who move the mean must lean the same way, and what many share shows as the strongest
direction of the differences. A unit's score is how far it lies along that direction. Random subsets
of the coordinates make that direction hard to aim beside, and what stands out by chance in one
subset does not in the next.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from aggregator_server.aggregation.robust.units import BoolArray, Float64Array
from aggregator_server.errors import AggregationError
from privacy.noise import KEY_BYTES, SecureStream

N_REPEATS: Final = 5
_SUBSET_DIVISOR: Final = 2
_NO_SPREAD: Final = 1e-12
"""Differences below this part of the energy are rounding: equal units are not outliers."""


@dataclass(frozen=True, kw_only=True)
class SpectralVerdict:
    """What the spectral scores say."""

    removed: BoolArray
    """[n], at most as many as were allowed."""
    scores: Float64Array
    """[n], the squared distance along the strongest direction ÷ its mean over the units, averaged
    over the repeats; 1 is ordinary."""


def spectral_filter(
    sketches: Float64Array, *, max_removed: int, seed: bytes, n_repeats: int = N_REPEATS
) -> SpectralVerdict:
    """Find the units that stand out.

    Each repeat takes a random half of the sketch's coordinates, finds the strongest direction, and
    names the `max_removed` units of the highest scores along it. A unit goes if most repeats name
    it.

    Guarantees:
        1. At most `max_removed` units are removed.
        2. Equal inputs give equal verdicts; the order of the units does not matter, but for units
           of equal scores.
        3. FedAvg weights play no part, as in the paper: a weight is its agent's own claim.
        4. Units that are all equal are all kept.

    Args:
        sketches: [n, n_dims] float64, finite: `Sketcher.sketch` of each unit, after the cap.
        max_removed: Most units to remove, from 0 to n - 1.
        seed: 32 bytes; it may be the sketches' own, whose streams have other names.
        n_repeats: How many subsets, at least 1.

    Raises:
        AggregationError: Sketches that are not finite rows, or a number out of its range.

    Source: Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021, algorithm 2. We
    deviate: coordinates are those of a random projection, not of the update; and the paper keeps
    the intersection over the repeats, so that what is removed may grow with their number, where we
    remove what most of them agree on. Removing in several steps, each along the strongest direction
    of those that are left, was tried against two groups of colluders, and was no better.
    """
    if sketches.ndim != 2 or sketches.size == 0 or not np.isfinite(sketches).all():
        msg = f"sketches of shape {sketches.shape}; expected finite rows, at least one"
        raise AggregationError(msg)
    n = len(sketches)
    if not 0 <= max_removed < n or n_repeats < 1 or len(seed) != KEY_BYTES:
        msg = (
            f"{max_removed} of {n} units to remove in {n_repeats} repeats by a seed of {len(seed)} "
            f"bytes; expected 0 to {n - 1}, at least 1, and {KEY_BYTES}"
        )
        raise AggregationError(msg)
    votes = np.zeros(n, np.int64)
    scores = np.zeros(n)
    for repeat in range(n_repeats):
        subset = _subset(seed, repeat, sketches.shape[1])
        points = sketches[:, subset]
        found = _scores(points @ points.T)
        if found.any():
            # By score, never by index, but for equal scores.
            votes[np.argsort(-found, kind="stable")[:max_removed]] += 1
        scores += found / n_repeats
    removed: BoolArray = 2 * votes > n_repeats
    # Each repeat names max_removed, so nearly twice as many units may have most of the votes.
    order = np.lexsort((-scores, -votes))
    removed[order[max_removed:]] = False
    return SpectralVerdict(removed=removed, scores=scores)


def _subset(seed: bytes, repeat: int, n_dims: int) -> NDArray[np.int64]:
    words = SecureStream.of(seed, "dnc subset", repeat).take_bytes(8 * n_dims)
    ranks = np.argsort(np.frombuffer(words, "<u8"), kind="stable")
    return np.sort(ranks[: max(1, n_dims // _SUBSET_DIVISOR)])


def _scores(gram: Float64Array) -> Float64Array:
    """Squared positions along the top principal direction ÷ their mean; zeros without a spread.

    For centred rows X with X·Xᵀ = U·Λ·Uᵀ, the positions along the top right singular vector are
    √λ·u, so the direction itself is never formed.
    """
    n = len(gram)
    means = gram.mean(axis=0)
    centred = gram - means - means[:, None] + means.mean()
    values, vectors = np.linalg.eigh(centred)
    if values[-1] <= _NO_SPREAD * np.trace(gram):
        return np.zeros(n)
    top: Float64Array = vectors[:, -1]
    return n * top * top
