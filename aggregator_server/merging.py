"""From the sums of a round's cells to the step of the global adapter: filter, mean, optimiser.

What is decided here depends on the manifest and the stored sums alone, and can be done again after
a kill: the filter's decision is journalled, the optimiser's state belongs to a release.
"""

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from aggregator_server.aggregation import optimizers
from aggregator_server.aggregation.fedavg import average
from aggregator_server.aggregation.lora_flex import flexlora_step
from aggregator_server.aggregation.lora_gap import estimate_gap, kept_updates
from aggregator_server.aggregation.mixed_ranks import RankRows
from aggregator_server.aggregation.robust.outcome import robust_mean
from aggregator_server.aggregation.robust.pipeline import MIN_FILTER_UNITS, Mode
from aggregator_server.aggregation.scaffold import ControlBook, renewed
from aggregator_server.blobs import Blobs
from aggregator_server.charter import Charter
from aggregator_server.controls import stored_control
from aggregator_server.errors import AggregationError
from aggregator_server.filtering import LEFT_OUT, FilterDecision, StoredUnits, decide
from aggregator_server.masking.vectors import load_sum
from aggregator_server.phase import base_release
from aggregator_server.releases import Releases
from aggregator_server.store.rows import BlobRole, CellRow
from aggregator_server.store.store import Store
from aggregator_server.uploads import Uploads
from privacy.central import noisy_mean
from privacy.noise import KEY_BYTES, SecureStream
from privacy.turns import UpdateTerms
from privacy.updates import CellSum, Float32Array
from protocol.blocks import FedAvgBlock, FilterRule, LoraRule, OptimizerBlock
from protocol.chain import AggregationReport, CovarianceGap, NoisyAggregationReport, Release
from protocol.layout import VectorLayout
from protocol.privacy import CentralPrivacy
from protocol.wire import b64u_decode

Report = AggregationReport | NoisyAggregationReport


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a round adds to the global adapter, and what of it is told."""

    step: NDArray[np.float64]
    """[n_values], to be added to the vector that the round started from."""
    report: Report
    optimizer_state: bytes | None
    """Of the release to come; None for FedAvg, which remembers nothing."""
    control: tuple[Float32Array, ControlBook] | None
    """SCAFFOLD's c and whose it is the mean of; None where agents send no control variates."""


class Merger:
    """Filters and averages the cells of one federation's rounds.

    Args:
        store: Of the federation.
        blobs: Where sums lie.
        uploads: Reads plain updates.
        releases: The chain.
        charter: The manifest and what follows from it.
    """

    def __init__(
        self, store: Store, blobs: Blobs, uploads: Uploads, releases: Releases, charter: Charter
    ) -> None:
        """Take the parts; nothing is read yet."""
        self._store = store
        self._blobs = blobs
        self._uploads = uploads
        self._releases = releases
        self._charter = charter
        lora = charter.manifest.lora
        self._rows = RankRows.of(charter.layout.tensors, lora) if lora.is_mixed else None

    def decide(self, cells: Sequence[CellRow]) -> FilterDecision:
        """Judge the cells of a round.

        Args:
            cells: All that gave a sum.

        Raises:
            AggregationError: None of them can be used.
        """
        faults = self._faults(cells)
        usable = [cell for cell in cells if cell.transcript not in faults]
        rule = self._charter.manifest.filter.rule
        if rule is FilterRule.NONE or not usable:
            units = self._plain_units(cells)
        elif self._rows is not None and len(usable) >= MIN_FILTER_UNITS:
            units = self._seen_units(usable, self._rows.stretched)
        else:
            units = self._units(usable, of=usable)
        return decide(
            cells,
            units,
            rule=rule,
            mode=Mode.OPEN if self._charter.masked is None else Mode.CELLS,
            layout=self._tensors(cells),
            faults=faults,
        )

    def decide_without(
        self, cells: Sequence[CellRow], decision: FilterDecision, left_out: Collection[bytes]
    ) -> FilterDecision:
        """Judge anew those that a decision kept, but for some.

        Args:
            cells: All that gave a sum.
            decision: On these; what it removed stays removed.
            left_out: Transcripts of those that are left out.

        Raises:
            AggregationError: None is left, or none of them can be used.
        """
        again = tuple(
            cell
            for cell, found in zip(cells, decision.cells, strict=True)
            if found.removed is None and cell.transcript not in left_out
        )
        if not again:
            msg = f"the gate leaves out all {len(left_out)} cells of the round"
            raise AggregationError(msg)
        fresh = {found.transcript: found for found in self.decide(again).cells}
        told = tuple(
            fresh.get(found.transcript) or found.without(LEFT_OUT) for found in decision.cells
        )
        n_rejected = sum(found.removed is not None for found in told)
        return FilterDecision(
            report=decision.report.model_copy(update={"n_rejected": n_rejected}), cells=told
        )

    def _faults(self, cells: Sequence[CellRow]) -> dict[bytes, str]:
        """Of cells whose participation cannot be what honest agents say."""
        if self._rows is None:
            return {}
        found = ((cell.transcript, self._rows.fault_of(self._load(cell))) for cell in cells)
        return {transcript: fault for transcript, fault in found if fault is not None}

    def merge(self, cells: Sequence[CellRow], decision: FilterDecision, base: Release) -> Merged:
        """The step of a round.

        Args:
            cells: All that gave a sum, in the order of the decision.
            decision: What the filter decided.
            base: The release that the round started from.

        Raises:
            AggregationError: Cells and decision do not match, or a mean that is not finite.
            NoiseError: See `noisy_mean`.
        """
        if tuple(cell.transcript for cell in cells) != tuple(
            cell.transcript for cell in decision.cells
        ):
            msg = "the filter decided on other cells than the round has"
            raise AggregationError(msg)
        mean, report = self._mean(cells, decision, base)
        block = self._charter.manifest.aggregation.optimizer
        optimizer = optimizer_of(block)
        state = optimizers.initial_state(optimizer, n_values=len(mean))
        kept = self._releases.hidden_file(base.number, BlobRole.OPTIMIZER)
        if kept is not None:
            state = optimizers.OptimizerState.from_bytes(kept)
        step, state = optimizers.apply(optimizer, state, mean)
        if self._rows is not None:  # momentum would move a row that nobody trained
            step[self._rows.untrained(map(self._load, _kept(cells, decision)))] = 0.0
        return Merged(
            step=step,
            report=report,
            optimizer_state=None if state is None else state.to_bytes(),
            control=self._control(_kept(cells, decision), base),
        )

    def _control(
        self, kept: Sequence[CellRow], base: Release
    ) -> tuple[Float32Array, ControlBook] | None:
        """C after a round, from the changes of those whose updates count."""
        if not self._charter.manifest.training.scaffold:
            return None
        control, book = stored_control(self._releases, base, self._charter.layout.tensors)
        changes = {_only_member(cell): partial(self._change_of, cell) for cell in kept}
        capped = self._charter.manifest.filter.rule is not FilterRule.NONE
        return renewed(control, book, changes, capped=capped)

    def _change_of(self, cell: CellRow) -> Float32Array:
        found = self._load(cell).control
        if found is None:  # cannot be: the layout of a federation with SCAFFOLD has it
            msg = f"cell {cell.transcript.hex()[:8]} has no control variate"
            raise AggregationError(msg)
        return found

    def _mean(
        self, cells: Sequence[CellRow], decision: FilterDecision, base: Release
    ) -> tuple[NDArray[np.float64], Report]:
        manifest = self._charter.manifest
        kept = _kept(cells, decision)
        if isinstance(manifest.privacy, CentralPrivacy):
            return self._noisy_mean(kept, manifest.privacy, base)
        if manifest.lora.rule is LoraRule.FLEXLORA:
            return self._flexlora(kept, base)
        if decision.report.rule is FilterRule.NONE:
            sums = map(self._load, kept)
            plain = (
                average(sums, n_values=self._tensors(cells).n_values)
                if self._rows is None
                else self._rows.average(sums)
            )
            mean, n_agents = plain.mean, plain.n_agents
        else:
            units = self._units(cells, of=kept)
            mean = robust_mean(units, decision.kept, decision.factors)
            n_agents = int(units.n_members[decision.kept].sum())
        return mean, AggregationReport(
            rule="fedavg",
            n_cells=int(decision.kept.sum()),
            n_agents=n_agents,
            update_norm=float(np.linalg.norm(mean)),
            covariance_gap=self._gap(cells, decision, base),
        )

    def _flexlora(
        self, cells: Sequence[CellRow], base: Release
    ) -> tuple[NDArray[np.float64], Report]:
        found = flexlora_step(
            self._plain_units(cells),
            self._releases.vector(base),
            self._tensors(cells),
            self._charter.manifest.lora,
        )
        return found.step, AggregationReport(
            rule="flexlora",
            n_cells=len(cells),
            n_agents=len(cells),
            update_norm=float(np.linalg.norm(found.step)),
            left_out_norm=found.error_norm,
        )

    def _gap(
        self, cells: Sequence[CellRow], decision: FilterDecision, base: Release
    ) -> CovarianceGap | None:
        """What the average lost; None where products cannot be seen, or a factor is shared.

        Nor where each rank row has weights of its own: products have one weight for each agent.
        """
        lora = self._charter.manifest.lora
        seen = self._charter.masked is None and lora.rule is LoraRule.FEDIT
        if not seen or lora.is_mixed:
            return None
        return estimate_gap(
            kept_updates(self._plain_units(cells), decision.kept, decision.factors),
            start=self._releases.vector(base),
            layout=self._tensors(cells),
            scale=lora.scale,
            seed=os.urandom(KEY_BYTES),
        )

    def _noisy_mean(
        self, cells: Sequence[CellRow], privacy: CentralPrivacy, base: Release
    ) -> tuple[NDArray[np.float64], Report]:
        terms = self._terms(cells)
        noisy = noisy_mean(
            map(self._load, cells),
            n_values=terms.layout.tensors.n_values,
            privacy=privacy,
            clip_norm=self._clip_norm(base, privacy),
            rounding_norm=0.0 if terms.plan is None else terms.plan.rounding_norm,
            # Fresh, also where a killed server does this again: the first was seen by nobody.
            stream=SecureStream(),
        )
        return noisy.mean, NoisyAggregationReport(
            n_cells=noisy.n_cells,
            n_agents=noisy.n_agents,
            update_norm=noisy.norm,
            clip_norm=noisy.clip_norm,
            noise_std=noisy.noise_std,
            next_clip_norm=noisy.next_clip_norm,
        )

    def _clip_norm(self, base: Release, privacy: CentralPrivacy) -> float:
        """Of this round: what the last noisy release says, also behind a rollback."""
        release = base
        while not isinstance(release.aggregation, NoisyAggregationReport):
            if release.number == 0:
                return privacy.clip_norm
            release = self._releases.get(release.number - 1)
        return release.aggregation.next_clip_norm

    def _terms(self, cells: Sequence[CellRow]) -> UpdateTerms:
        """Of the one round that cells belong to."""
        return self._charter.turns.at(base_release(self._store, cells[0].round))

    def _tensors(self, cells: Sequence[CellRow]) -> VectorLayout:
        """Of the adapter's values in the updates of the round that cells belong to."""
        return self._terms(cells).layout.tensors

    def _plain_units(self, cells: Sequence[CellRow]) -> StoredUnits:
        return StoredUnits(cells, self._load, n_values=self._tensors(cells).n_values)

    def _units(self, cells: Sequence[CellRow], *, of: Sequence[CellRow]) -> StoredUnits:
        """Cells as they are averaged: rows that one did not train are the mean of others, `of`."""
        rows = self._rows
        if rows is None:
            return self._plain_units(cells)
        fill = rows.fill([partial(self._load, cell) for cell in of])
        return self._seen_units(cells, lambda cell: rows.filled(cell, fill))

    def _seen_units(
        self, cells: Sequence[CellRow], see: Callable[[CellSum], CellSum]
    ) -> StoredUnits:
        return StoredUnits(
            cells, lambda cell: see(self._load(cell)), n_values=self._tensors(cells).n_values
        )

    def _load(self, cell: CellRow) -> CellSum:
        if cell.upload is not None:
            return self._uploads.load(self._store.uploads.get(cell.upload))
        plan = self._terms([cell]).plan
        if plan is None or cell.sum_sha256 is None:
            msg = f"cell {cell.transcript.hex()[:8]} of round {cell.round} has no sum"
            raise AggregationError(msg)
        return load_sum(self._blobs, cell.transcript, cell.sum_sha256, plan)


def _only_member(cell: CellRow) -> bytes:
    """The agent of a cell of one."""
    [[agent, _]] = json.loads(cell.members)
    return b64u_decode(agent, n_bytes=32)


def _kept(cells: Sequence[CellRow], decision: FilterDecision) -> list[CellRow]:
    return [cell for cell, kept in zip(cells, decision.kept, strict=True) if kept]


def optimizer_of(block: OptimizerBlock) -> optimizers.Optimizer:
    """The optimiser of a manifest.

    Args:
        block: The manifest's.

    Raises:
        AggregationError: A setting out of range.
    """
    if isinstance(block, FedAvgBlock):
        return optimizers.FedAvg(learning_rate=block.learning_rate)
    return optimizers.RULES[block.kind](**block.model_dump(exclude={"kind"}))
