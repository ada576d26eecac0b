"""The filter of a round: its cells as a rule reads them, and what was decided of each.

The decision is made once, journalled before the round moves on, and read again by whoever averages:
a server that is killed in between does not draw another seed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Final, Generic, Protocol, TypeVar

import numpy as np
from pydantic import Field

from aggregator_server.aggregation.robust.outcome import FilterOutcome
from aggregator_server.aggregation.robust.pipeline import Mode, run_pipeline
from aggregator_server.aggregation.robust.units import (
    BoolArray,
    Float64Array,
    Int64Array,
    Units,
)
from aggregator_server.errors import AggregationError
from privacy.updates import CellSum, Float32Array
from protocol.blocks import FilterRule
from protocol.chain import FilterReport
from protocol.layout import VectorLayout
from protocol.wire import Digest, WireModel

LEFT_OUT: Final = "the gate left it out"


class SummedCell(Protocol):
    """A cell whose sum is known, wherever the sum is: one agent in the open mode, or several."""

    @property
    def transcript(self) -> bytes:
        """What names it in decisions and releases, 32 bytes; no other of the round has it."""
        ...

    @property
    def weight_sum(self) -> int:
        """Σ w over its members, at least 1."""
        ...

    @property
    def n_members(self) -> int:
        """Number of agents in it, at least 1."""
        ...

    @property
    def only_member(self) -> bytes:
        """The agent of a cell of one; nobody asks for that of another cell."""
        ...


CellT = TypeVar("CellT", bound=SummedCell)


class LazyUnits(Generic[CellT]):
    """The cells of a round as the units of a filter, each read when it is asked for.

    Guarantees:
        1. At most one of them is in memory at a time, and of `rows` no more than is asked for.

    Args:
        cells: In the order that the round fixes; at least one.
        load: Reads the sum of one.
        n_values: Length of every sum.
    """

    def __init__(
        self, cells: Sequence[CellT], load: Callable[[CellT], CellSum], *, n_values: int
    ) -> None:
        """Nothing is read yet."""
        self._cells = cells
        self._load = load
        self._n_values = n_values

    @property
    def n_values(self) -> int:
        """Length of every update."""
        return self._n_values

    @property
    def weights(self) -> Int64Array:
        """Sum of the FedAvg weights of each unit's members, [n] int64."""
        return np.array([cell.weight_sum for cell in self._cells], np.int64)

    @property
    def n_members(self) -> Int64Array:
        """Number of agents in each unit, [n] int64."""
        return np.array([cell.n_members for cell in self._cells], np.int64)

    def load(self, index: int) -> Float32Array:
        """The mean update of one unit, [n_values] float32.

        Raises:
            AggregationError: It is of another length.
        """
        found = self._load(self._cells[index])
        if found.weighted_sum.shape != (self._n_values,):
            msg = f"a cell of {found.weighted_sum.shape} values; expected ({self._n_values},)"
            raise AggregationError(msg)
        return found.weighted_sum / np.float32(found.weight_sum)

    def rows(self, start: int, stop: int) -> Float32Array:
        """Values `start` to `stop` of all units' means, [n, stop - start] float32."""
        return np.stack([self.load(index)[start:stop] for index in range(len(self._cells))])


class FilteredCell(WireModel):
    """What was decided of one cell."""

    transcript: Digest
    factor: Annotated[float, Field(ge=0.0)]
    """What its mean is scaled by."""
    removed: Annotated[str, Field(max_length=500)] | None
    """Why it does not count; None: it does."""
    score: float | None = None
    """How hard it pulls with the others, where the rule says so: 1 is ordinary, below 0 against."""

    def without(self, reason: str) -> "FilteredCell":
        """The same, removed for a reason, unless it had been already."""
        return self if self.removed is not None else self.model_copy(update={"removed": reason})


class FilterDecision(WireModel):
    """What was decided of all cells of a round, in their order."""

    report: FilterReport
    cells: tuple[FilteredCell, ...]

    @property
    def kept(self) -> BoolArray:
        """[n] bool."""
        return np.array([cell.removed is None for cell in self.cells], np.bool_)

    @property
    def factors(self) -> Float64Array:
        """[n] float64."""
        return np.array([cell.factor for cell in self.cells], np.float64)


def decide(
    cells: Sequence[SummedCell],
    units: Units,
    *,
    rule: FilterRule,
    mode: Mode,
    layout: VectorLayout,
    faults: Mapping[bytes, str],
    draw_seed: Callable[[], bytes],
) -> FilterDecision:
    """Judge the cells of a round, once its uploads are closed.

    Args:
        cells: In the order that the round fixes.
        units: Those of them that have no fault, in the same order; read where a rule asks for it.
        rule: The manifest's.
        mode: Whether a cell is one agent.
        layout: Of the values that are judged.
        faults: Why cells cannot be used at all, by transcript.
        draw_seed: Gives the 32 bytes of the rule's projection; asked once, and by a rule that has
            one.

    Raises:
        AggregationError: None of them can be used.
    """
    usable = [cell for cell in cells if cell.transcript not in faults]
    if not usable:
        msg = f"none of the {len(cells)} cells can be used: {next(iter(faults.values()), 'none')}"
        raise AggregationError(msg)
    judged = {
        cell.transcript: FilteredCell(transcript=cell.transcript, factor=1.0, removed=None)
        for cell in usable
    }
    if rule is FilterRule.ROBUST:
        # Drawn now, when nobody can fit an update to the projection any more.
        seed = draw_seed()
        found: FilterOutcome = run_pipeline(units, mode=mode, layout=layout, seed=seed).outcome
        judged = {
            cell.transcript: FilteredCell(
                transcript=cell.transcript,
                factor=float(found.factors[index]),
                removed=None if found.kept[index] else found.reasons[index][:500],
                # 0 is no score: a unit that went for its size, or a round with nothing in common.
                score=float(found.scores[index]) or None,
            )
            for index, cell in enumerate(usable)
        }
    for transcript, fault in faults.items():
        judged[transcript] = FilteredCell(transcript=transcript, factor=0.0, removed=fault)
    decided = tuple(judged[cell.transcript] for cell in cells)
    n_rejected = sum(cell.removed is not None for cell in decided)
    report = FilterReport(rule=rule, n_cells=len(cells), n_rejected=n_rejected)
    return FilterDecision(report=report, cells=decided)
