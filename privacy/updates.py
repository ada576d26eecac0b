"""What code may see of an update: three types that do not mix.

An agent makes a `PlainUpdate`. In the masked mode it leaves the machine only as a `MaskedUpdate`,
of which nothing can be learnt by itself. Aggregation and filters take `CellSum`s only: code that
would look into masked updates one by one does not type-check. In the open mode an update is a
cell of one (`CellSum.of_plain`), so both modes share all code from there on.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class PlainUpdate:
    """Local minus global, in the clear: `vector` [n_values] float32 in the layout's order."""

    vector: Float32Array
    weight: int
    """FedAvg weight, at least 1."""


@dataclass(frozen=True, kw_only=True)
class MaskedUpdate:
    """Words of Z_2^k that look random without the other members': `words` [n_words]."""

    words: NDArray[np.uint16] | NDArray[np.uint32]
    word_bits: Literal[16, 32]


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

    @classmethod
    def of_plain(cls, update: PlainUpdate) -> "CellSum":
        """A cell of one.

        Args:
            update: Its only member.
        """
        weighted_sum = update.vector * np.float32(update.weight)
        return cls(weighted_sum=weighted_sum, weight_sum=update.weight, n_members=1)
