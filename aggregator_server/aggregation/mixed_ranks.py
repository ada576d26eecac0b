"""Agents of different ranks in one sum: each rank row is averaged over those who trained it.

Row i of A and column i of B are rank row i. What an agent did not train is zero in its padded
update and in its participation; both are sums over agents, so both may travel under masks:

    mean of row i = Σ_k w_k x_k,i / Σ_{k trained i} w_k

Dividing every row by the total weight instead gives the zero-padding mean, in which rows that few
agents train move little.

A filter compares units, and a unit says nothing of a row that it did not train.

*Where it looks for evidence* (`stretched`), such a row is zero, so that a unit answers for what it
trained alone, and the rest is stretched to the length that the whole would have: else agents of low
rank would look like copies of one another, and those of high rank too long.

*Where it takes means or medians* (`filled`), a zero would hold the row back. There it is the mean
of the units that trained it, each of them capped first (`fill`). The mean of filled units is again
the mean of each row over those who trained it, so whatever a filter caps or weighs, its result
stands.

Source: padding, HetLoRA (Cho et al.), arXiv 2401.06432, whose weights by the norm of each agent's
product a server of masked updates cannot know; rows over those who have them, RBLA, arXiv
2408.08699. Here over updates instead of adapters, as two sums. What a filter sees is ours.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator_server.aggregation.fedavg import Average, average
from aggregator_server.aggregation.robust.caps import cap_factors, median_norm
from aggregator_server.errors import AggregationError
from privacy.updates import CellSum, Float32Array, Float64Array, l2_norm
from protocol.blocks import LoraBlock
from protocol.layout import VectorLayout
from quant.adapter import module_of
from quant.mixed_ranks import by_row, modules_of


@dataclass(frozen=True, kw_only=True)
class RankRows:
    """The rank rows of a federation's adapter, and which of them every agent trains."""

    tensors: VectorLayout
    """Of the adapter's values, without companions."""
    rank: int
    min_rank: int
    required: NDArray[np.bool_]
    """[n_modules], modules by ascending name: no agent may leave these out."""

    @classmethod
    def of(cls, tensors: VectorLayout, lora: LoraBlock) -> "RankRows":
        """The rows of a manifest.

        Args:
            tensors: Layout of the adapter's values.
            lora: The manifest's block.

        Raises:
            quant.errors.AdapterError: A name that is not of a LoRA factor.
        """
        optional = tuple(lora.optional_modules)
        return cls(
            tensors=tensors,
            rank=lora.rank,
            min_rank=lora.rank if lora.min_rank is None else lora.min_rank,
            required=np.array(
                [not _ends_with(name, optional) for name in modules_of(tensors)], np.bool_
            ),
        )

    @property
    def n_rows(self) -> int:
        """How many there are in all modules."""
        return len(self.required) * self.rank

    def fault_of(self, cell: CellSum) -> str | None:
        """Why a unit's participation cannot be what honest agents say; None if it can.

        Guarantees:
            1. A unit without fault has row weights from 0 to its weight; those of rows that every
               agent trains are its weight, and who trained a row trained all before it.
            2. A unit of one agent says 0 or its weight of each row, and nothing between.

        Args:
            cell: One unit's sum.
        """
        found = cell.row_weights
        if found is None or found.shape != (self.n_rows,):
            return f"its participation has not the {self.n_rows} values of the layout"
        weights = found.reshape(-1, self.rank)
        in_range = bool(((weights >= 0.0) & (weights <= cell.weight_sum)).all())  # NaN is not
        first = weights[:, 0]
        wrong = {
            f"its participation is not from 0 to its weight, {cell.weight_sum}": not in_range,
            "its participation is between none and all of its one agent's weight": (
                cell.n_members == 1
                and not bool(np.isin(weights, (0.0, float(cell.weight_sum))).all())
            ),
            "it leaves out a module that every agent trains": bool(
                (first[self.required] != cell.weight_sum).any()
            ),
            f"it trained fewer than {self.min_rank} rows of a module": bool(
                (weights[:, : self.min_rank] != first[:, None]).any()
            ),
            "it trained a row without the one before it": bool((np.diff(weights) > 0.0).any()),
        }
        return next((fault for fault, is_so in wrong.items() if is_so), None)

    def average(self, cells: Iterable[CellSum]) -> Average:
        """The mean update, each rank row over the agents that trained it.

        Guarantees:
            1. Depends on the sums alone, so it works on masked ones, however agents were grouped.
            2. Where all agents train all rows it is the weighted mean (FedAvg).
            3. A row that no agent trained is zero: the global adapter keeps it as it was.
            4. Memory does not depend on the number of cells.

        Args:
            cells: Lazily loaded sums without fault, in an order that the caller fixes.

        Raises:
            AggregationError: As `fedavg.average`; or a cell without participation.
        """
        weights = np.zeros(self.n_rows)
        found = average(_noting(cells, weights), n_values=self.tensors.n_values)
        mean = found.mean.copy()
        for rows, trained in self._rows(mean, weights):
            held = trained > 0.0
            rows[held] *= (found.weight_sum / trained[held])[:, None]
            rows[~held] = 0.0
        return dataclasses.replace(found, mean=mean)

    def untrained(self, cells: Iterable[CellSum]) -> NDArray[np.bool_]:
        """Which values belong to rows that nobody trained, [n_values] bool.

        Args:
            cells: Of the round.

        Raises:
            AggregationError: A cell without participation.
        """
        weights = np.zeros(self.n_rows)
        for _ in _noting(cells, weights):
            pass
        where = np.zeros(self.tensors.n_values)
        for rows, trained in self._rows(where, weights):
            rows[trained == 0.0] = 1.0
        return where > 0.0

    def stretched(self, cell: CellSum) -> CellSum:
        """A unit by what it trained alone, at the length that it would have over all rows.

        Guarantees:
            1. A row that some members trained has their mean × √(all values / those of its rows);
               any other is zero.

        Args:
            cell: Without fault.

        Raises:
            AggregationError: A cell without participation.
        """
        found = self.filled(cell, np.zeros_like(cell.weighted_sum))
        rows = self._rows(found.weighted_sum, _weights_of(cell))
        n_held = sum(values[trained > 0.0].size for values, trained in rows)
        return _scaled(found, float(np.sqrt(self.tensors.n_values / max(1, n_held))))

    def fill(self, cells: Sequence[Callable[[], CellSum]]) -> Float32Array:
        """What stands, for a filter, in rows that a unit did not train.

        Guarantees:
            1. In each row the weighted mean of the units that trained it, each capped to the
               median length of the units as `stretched`.

        Args:
            cells: Each loads one unit without fault; read twice.

        Returns:
            [n_values] float32.

        Raises:
            AggregationError: No cell, or one that is not finite.
        """
        lengths = np.array([_length(self.stretched(load())) for load in cells])
        caps = cap_factors(lengths, median_norm(lengths))
        capped = (_scaled(load(), cap) for load, cap in zip(cells, caps, strict=True))
        return self.average(capped).mean.astype(np.float32)

    def filled(self, cell: CellSum, fill: Float32Array) -> CellSum:
        """A unit as if all its members had trained all rows.

        Guarantees:
            1. A row that some members trained has their mean; any other is that of `fill`.

        Args:
            cell: Without fault.
            fill: [n_values] float32.

        Raises:
            AggregationError: A cell without participation.
        """
        total = cell.weighted_sum.copy()
        weight = np.float32(cell.weight_sum)
        for (rows, trained), (filling, _) in zip(
            self._rows(total, _weights_of(cell)), self._rows(fill, _weights_of(cell)), strict=True
        ):
            held = trained > 0.0
            rows[held] *= (weight / trained[held]).astype(np.float32)[:, None]
            rows[~held] = filling[~held] * weight
        return dataclasses.replace(cell, weighted_sum=total, row_weights=None)

    def _rows(
        self, values: NDArray[np.floating], weights: Float64Array
    ) -> Iterator[tuple[NDArray[np.floating], Float64Array]]:
        """Views of each tensor as [rank, …], with the weights of its rows, [rank]."""
        places = modules_of(self.tensors)
        of_modules = weights.reshape(-1, self.rank)
        for slot, where in self.tensors.slices():
            yield by_row(values[where], slot), of_modules[places[module_of(slot.name)]]


def _ends_with(module: str, names: tuple[str, ...]) -> bool:
    """As peft finds modules: by the whole name, or by its last parts."""
    return any(module == name or module.endswith("." + name) for name in names)


def _weights_of(cell: CellSum) -> Float64Array:
    if cell.row_weights is None:
        msg = "a cell without participation, though agents differ in what they train"
        raise AggregationError(msg)
    return cell.row_weights


def _noting(cells: Iterable[CellSum], weights: Float64Array) -> Iterator[CellSum]:
    """The same cells; what they say of rows is added to `weights` as they pass."""
    for cell in cells:
        weights += _weights_of(cell)
        yield cell


def _length(cell: CellSum) -> float:
    return l2_norm(cell.weighted_sum) / cell.weight_sum


def _scaled(cell: CellSum, factor: float) -> CellSum:
    return dataclasses.replace(cell, weighted_sum=cell.weighted_sum * np.float32(factor))
