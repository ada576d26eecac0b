"""What code may see of an update: two types that do not mix.

An agent makes a `PlainUpdate`. Under masks it leaves the machine as words of which nothing can be
learnt by themselves, and the server adds them up unread. Aggregation and filters take `CellSum`s
only, so there is nothing in which code could look at masked updates one by one. In the open mode
an update is a cell of one (`CellSum.of_plain`), so all modes share the code from there on.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protocol.layout import CONTROL, PARTICIPATION, VectorLayout

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

_CHUNK_VALUES: Final = 1 << 13
"""Few enough to stay in the innermost caches, and for BLAS not to spread over threads."""


@dataclass(frozen=True, kw_only=True)
class PlainUpdate:
    """Local minus global, in the clear: `vector` [n_values] float32 in the layout's order.

    Companions stand apart from it, so that norms, clips and filters cannot mistake them for it.
    """

    vector: Float32Array
    weight: int
    """FedAvg weight, at least 1."""
    participation: Float32Array | None = None
    """[n_rows] float32, 1 for each rank row that was trained, else 0; None: all train all rows."""
    control: Float32Array | None = None
    """Δc of the agent, [n_values] float32 as `vector`; None: no SCAFFOLD."""

    @classmethod
    def of_body(cls, values: Float32Array, layout: VectorLayout, *, weight: int) -> "PlainUpdate":
        """An update as it travelled in the open mode.

        Args:
            values: [layout.n_values] float32.
            layout: Of what agents send.
            weight: Of the header.
        """
        rows, control = layout.companion(PARTICIPATION), layout.companion(CONTROL)
        return cls(
            vector=values[: layout.tensors.n_values],
            weight=weight,
            participation=None if rows is None else values[rows],
            control=None if control is None else values[control],
        )

    def body(self) -> Float32Array:
        """All values in the order of the layout, as they travel in the open mode."""
        companions = (self.control, self.participation)
        there = [values for values in companions if values is not None]
        return np.concatenate([self.vector, *there]) if there else self.vector


@dataclass(frozen=True, kw_only=True)
class CellSum:
    """What the server knows of a cell: the weighted sum of its members' updates.

    The cell's mean update is `weighted_sum / weight_sum`.
    """

    weighted_sum: Float32Array
    """Σ w·x over the members, [n_values] float32."""
    weight_sum: int
    """Σ w over the members, at least 1."""
    n_members: int
    row_weights: Float64Array | None = None
    """Σ w over the members that trained the rank row, [n_rows]; None: all train all rows."""
    control: Float32Array | None = None
    """Δc of the only member, [n_values]; None: no SCAFFOLD."""

    @classmethod
    def of_plain(cls, update: PlainUpdate) -> "CellSum":
        """A cell of one.

        Args:
            update: Its only member.
        """
        rows = update.participation
        return cls(
            weighted_sum=update.vector * np.float32(update.weight),
            weight_sum=update.weight,
            n_members=1,
            row_weights=None if rows is None else rows.astype(np.float64) * update.weight,
            control=update.control,
        )


def l2_norm(vector: Float32Array) -> float:
    """The L2 norm of a vector, in float64 and without a copy of it; NaN where it is not finite."""
    total = 0.0
    buffer = np.empty(_CHUNK_VALUES)
    for start in range(0, len(vector), _CHUNK_VALUES):
        run = vector[start : start + _CHUNK_VALUES]
        part = buffer[: len(run)]
        np.copyto(part, run)
        total += float(part @ part)
    return float(np.sqrt(total)) if np.isfinite(total) else float("nan")
