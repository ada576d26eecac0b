"""What an honest update is never like: one that undoes the others' work, and one that is a copy.

Honest updates differ, and those of agents with like data differ in like ways: that a group lies
apart is no evidence against it. Two things are:

*Opposition.* What agents with unlike data have in common may be small, but they share it: an honest
update has a positive inner product with the others' sum. One that pulls against it takes away what
they bring. Many of a kind do not pass for what all have in common: k that are alike count as one in
that sum, and none is vouched for by its kind.

*Copies.* Two trainings, even on the same records in another order, end apart. Updates far nearer to
each other than updates are to their nearest neighbours are one update under several names.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from aggregator_server.aggregation.robust.gram import squared_distances
from aggregator_server.aggregation.robust.units import BoolArray, Float64Array

MIN_COMMON: Final = 0.03
"""Least cosine, of the median unit with units of other kinds, that makes a common direction. Once a
federation has learnt what all can agree on, its agents pull apart, and none of them is hostile."""
MIN_PULL: Final = -0.25
"""Of the median unit's pull: one that pulls back no harder than this does little harm."""
COPY_FRAC: Final = 0.4
"""Of the median distance to the nearest neighbour: what is nearer is a copy."""
_N_STDS: Final = 4.0


@dataclass(frozen=True, kw_only=True)
class Opposition:
    """Which units pull against what the others have in common."""

    removed: BoolArray
    """[n], at most as many as were allowed."""
    pulls: Float64Array
    """[n], each unit's inner product with the others' sum ÷ the median of these: 1 is ordinary,
    below 0 is against. Of a removed unit as it was when it went; zeros where there is nothing
    in common."""


def opposed(gram: Float64Array, *, max_removed: int, cosine_std: float) -> Opposition:
    """Find the units that pull against the others.

    The one that pulls back most goes, then all others are judged anew without it.

    Guarantees:
        1. At most `max_removed` are removed; none whose pull is above `MIN_PULL`, and none whose
           mean cosine with the others is within four standard deviations of 0.
        2. None is removed while the median unit's mean cosine with the others is below `MIN_COMMON`
           or within its four standard deviations: then there is no common direction to be against.
        3. The order of the units does not matter, but for units of equal pulls.

    Args:
        gram: [n, n] float64 inner products of capped units or of their sketches, n at least 1.
        max_removed: Most units to remove, 0 to n - 1.
        cosine_std: Standard deviation of a cosine between two sketches; 0 for exact products.

    Source: ours; docs/adr/0018-evidence-before-removal.md. Counting the like of one another less is
    the idea of FoolsGold (Fung et al., RAID 2020, arXiv 1808.04866), here for the direction that is
    compared with, never for the mean.
    """
    kept = np.ones(len(gram), np.bool_)
    pulls = np.zeros(len(gram))
    while True:
        places = np.flatnonzero(kept)
        found = _with_the_others(gram[np.ix_(places, places)])
        noise = _N_STDS * cosine_std * found.noise
        ordinary = _lower_median(found.products)
        common = _lower_median(found.cosines)
        if ordinary <= 0.0 or common < MIN_COMMON or common <= _lower_median(noise):
            pulls[places] = 0.0
            break
        pulls[places] = found.products / ordinary
        against = (pulls[places] <= MIN_PULL) & (found.cosines < -noise)
        if not against.any() or len(gram) - len(places) == max_removed:
            break
        kept[places[np.argmin(np.where(against, pulls[places], np.inf))]] = False
    return Opposition(removed=~kept, pulls=pulls)


def copies(gram: Float64Array, *, max_removed: int) -> BoolArray:
    """Find units that are one update under several names; the shortest of each set stays.

    Guarantees:
        1. At most `max_removed` are removed, and of a set of copies never all.
        2. Units that are all equal are all kept: no distance says what is near.
        3. The order of the units does not matter, but for units of equal norms.

    Args:
        gram: [n, n] float64 inner products of capped units or of their sketches, n at least 1.
        max_removed: Most units to remove, at least 0.
    """
    distances = np.sqrt(squared_distances(gram))
    np.fill_diagonal(distances, np.inf)
    nearest = distances.min(axis=1)
    near = distances < COPY_FRAC * _lower_median(nearest)
    removed = np.zeros(len(gram), np.bool_)
    for place in np.argsort(-np.diag(gram), kind="stable"):
        if removed.sum() < max_removed and (near[place] & ~removed).any():
            removed[place] = True
    return removed


@dataclass(frozen=True, kw_only=True)
class _WithOthers:
    """What each unit has in common with the others, each [n]."""

    products: Float64Array
    """Weighted sum of its inner products with them."""
    cosines: Float64Array
    """Weighted mean of its cosines with them."""
    noise: Float64Array
    """Standard deviation of that mean, where that of one cosine is 1."""


def _with_the_others(gram: Float64Array) -> _WithOthers:
    """Compare each unit with the others, those of its own kind left out.

    Two units are of a kind by how far their cosine, or its negative, lies above the median cosine
    of all pairs, as a part of what is left to 1, squared. For unit i, unit j weighs
    (1 - alike_ij) ÷ Σ_k alike_jk: itself nothing, its kind little, and k that are alike as one.
    """
    lengths = np.sqrt(np.diag(gram))
    cosines = _ratio(gram, np.outer(lengths, lengths))
    pairs = cosines[~np.eye(len(gram), dtype=np.bool_)]
    usual = max(_lower_median(pairs), 0.0) if pairs.size else 0.0
    above = np.maximum(np.abs(cosines) - usual, 0.0)
    alike = np.square(_ratio(above, np.full_like(above, 1.0 - usual)))
    np.fill_diagonal(alike, 1.0)
    weights = (1.0 - alike) / alike.sum(axis=1)
    total = weights.sum(axis=1)
    return _WithOthers(
        products=(weights * gram).sum(axis=1),
        cosines=_ratio((weights * cosines).sum(axis=1), total),
        noise=_ratio(np.sqrt(np.square(weights).sum(axis=1)), total),
    )


def _ratio(of: Float64Array, to: Float64Array) -> Float64Array:
    """`of` ÷ `to`, 0 where that is 0."""
    found: Float64Array = np.divide(of, to, out=np.zeros_like(of), where=to > 0.0)
    return found


def _lower_median(values: Float64Array) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])
