"""Exact inner products of all pairs of units, in slices of their values.

A geometric median, a centred clipping and Krum move only within the span of the updates: all that
they need to know is inner products, and what they give is one factor for each unit.
"""

import numpy as np

from aggregator_server.aggregation.robust.units import (
    SLICE_BYTES,
    BoolArray,
    Float64Array,
    Units,
    slices,
)


def gram_matrix(units: Units, kept: BoolArray, *, slice_bytes: int = SLICE_BYTES) -> Float64Array:
    """Inner products of all pairs of kept units.

    Guarantees:
        1. Accumulated in float64; symmetric.
        2. Memory: three times `slice_bytes`, whatever n_values is.

    Args:
        units: The round's units.
        kept: [n] bool, which of them; these must be finite.
        slice_bytes: Most bytes of rows at a time.

    Returns:
        [k, k] float64 for the k kept units, in their order.
    """
    n_kept = int(kept.sum())
    gram = np.zeros((n_kept, n_kept))
    for start, stop in slices(units, slice_bytes=slice_bytes):
        part = units.rows(start, stop)[kept].astype(np.float64)
        gram += part @ part.T
        del part  # or it would stay in memory while the next slice is read
    return (gram + gram.T) / 2.0


def squared_distances(gram: Float64Array) -> Float64Array:
    """Squared Euclidean distances of all pairs.

    Guarantees:
        1. Never negative; zero on the diagonal.

    Args:
        gram: [k, k] float64 inner products.

    Returns:
        [k, k] float64.
    """
    squares = np.diag(gram)
    distances = np.maximum(squares + squares[:, None] - 2.0 * gram, 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def distances_to(gram: Float64Array, coefficients: Float64Array) -> Float64Array:
    """Distance of each unit to the point Σ c_j·x_j.

    Args:
        gram: [k, k] float64 inner products.
        coefficients: [k] float64, the point's.

    Returns:
        [k] float64, at least 0.
    """
    along = gram @ coefficients
    squares = np.diag(gram) - 2.0 * along + coefficients @ along
    return np.sqrt(np.maximum(squares, 0.0))
