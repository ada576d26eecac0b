"""What a round's accepted units are to a filter: mean updates, read one at a time or in slices.

A unit is what the server may look at by itself: one agent's update in the open mode, one cell's
mean under masks. A filter never holds all of them: at 17.9 million values a hundred units are 7 GB.
It reads each unit as a whole (`load`), or all units for a part of the values (`rows`).
"""

from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from aggregator_server.errors import AggregationError
from privacy.updates import Float32Array

SLICE_BYTES: Final = 1 << 25
"""Most bytes that the float32 rows of one slice take, whatever the number of units."""

BoolArray = NDArray[np.bool_]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


class Units(Protocol):
    """The accepted units of a round, in an order that the round fixes."""

    @property
    def n_values(self) -> int:
        """Length of every update."""
        ...

    @property
    def weights(self) -> Int64Array:
        """Sum of the FedAvg weights of each unit's members, [n] int64, at least 1."""
        ...

    @property
    def n_members(self) -> Int64Array:
        """Number of agents in each unit, [n] int64, at least 1."""
        ...

    def load(self, index: int) -> Float32Array:
        """The mean update of one unit, [n_values] float32; the caller lets go of it soon.

        Args:
            index: Which unit, from 0.
        """
        ...

    def rows(self, start: int, stop: int) -> Float32Array:
        """Values `start` to `stop` of all units' mean updates, [n, stop - start] float32.

        Args:
            start: First value.
            stop: One past the last value.
        """
        ...


class ArrayUnits:
    """Units in memory, for simulations and tests.

    Guarantees:
        1. `load` and `rows` give the same numbers, those that were passed.

    Args:
        means: [n, n_values] float32; not copied. Values need not be finite.
        weights: [n] int64, at least 1.
        n_members: [n] int64, at least 1; None: one agent for each unit.

    Raises:
        AggregationError: No unit, no value, another type, shapes that do not match, or a weight or
            count below 1.
    """

    def __init__(
        self, means: Float32Array, weights: Int64Array, n_members: Int64Array | None = None
    ) -> None:
        """Check the shapes once, here."""
        members = np.ones(len(means), np.int64) if n_members is None else n_members
        if means.ndim != 2 or means.dtype != np.float32 or means.size == 0:
            msg = f"units of shape {means.shape} and type {means.dtype}; expected float32 rows"
            raise AggregationError(msg)
        for what, counts in (("weights", weights), ("members", members)):
            if counts.shape != (len(means),) or counts.dtype != np.int64 or counts.min() < 1:
                msg = (
                    f"{what} of {len(means)} units: shape {counts.shape}, type {counts.dtype}; "
                    f"expected one int64 of at least 1 for each"
                )
                raise AggregationError(msg)
        self._means = means
        self._weights = weights
        self._n_members = members

    @property
    def n_values(self) -> int:
        """Length of every update."""
        return int(self._means.shape[1])

    @property
    def weights(self) -> Int64Array:
        """FedAvg weights, [n] int64."""
        return self._weights

    @property
    def n_members(self) -> Int64Array:
        """Number of agents in each unit, [n] int64."""
        return self._n_members

    def load(self, index: int) -> Float32Array:
        """The mean update of one unit, [n_values] float32; a view."""
        vector: Float32Array = self._means[index]
        return vector

    def rows(self, start: int, stop: int) -> Float32Array:
        """Values `start` to `stop` of all units, [n, stop - start] float32; a view."""
        return self._means[:, start:stop]


def loaded(units: Units, index: int) -> Float32Array:
    """A unit's mean update, checked for its shape.

    Args:
        units: The round's units.
        index: Which one.

    Returns:
        [n_values] float32, contiguous.

    Raises:
        AggregationError: It has another length or type than the units declare.
    """
    vector = units.load(index)
    if vector.shape != (units.n_values,) or vector.dtype != np.float32:
        msg = (
            f"unit {index} has shape {vector.shape} and type {vector.dtype}; "
            f"expected ({units.n_values},) float32"
        )
        raise AggregationError(msg)
    return np.ascontiguousarray(vector)


def slices(units: Units, *, slice_bytes: int = SLICE_BYTES) -> Iterator[tuple[int, int]]:
    """Cut the values so that the rows of one slice take no more than `slice_bytes`.

    Args:
        units: The round's units.
        slice_bytes: Most bytes of float32 rows; a slice has at least one value, however.

    Yields:
        Start and stop of each slice, in order, without gap or overlap.
    """
    width = max(1, slice_bytes // (4 * len(units.weights)))
    for start in range(0, units.n_values, width):
        yield start, min(start + width, units.n_values)
