"""From the sums of a round's cells to the step of the global adapter: filter, mean, optimiser.

What is decided here depends on the manifest and the stored sums alone, and can be done again after
a kill: the filter's decision is journalled, the optimiser's state belongs to a release.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aggregator_server.aggregation import optimizers
from aggregator_server.aggregation.fedavg import average
from aggregator_server.aggregation.lora_flex import flexlora_step
from aggregator_server.aggregation.lora_gap import estimate_gap, kept_updates
from aggregator_server.aggregation.lora_pairs import scale_of
from aggregator_server.aggregation.robust.outcome import robust_mean
from aggregator_server.aggregation.robust.pipeline import Mode
from aggregator_server.blobs import Blobs
from aggregator_server.charter import Charter
from aggregator_server.errors import AggregationError
from aggregator_server.filtering import LEFT_OUT, FilterDecision, StoredUnits, decide
from aggregator_server.masking.vectors import load_sum
from aggregator_server.phase import base_release
from aggregator_server.releases import Releases
from aggregator_server.store.rows import CellRow
from aggregator_server.store.store import Store
from aggregator_server.uploads import Uploads
from privacy.central import noisy_mean
from privacy.noise import KEY_BYTES, SecureStream
from privacy.turns import UpdateTerms
from privacy.updates import CellSum
from protocol.chain import AggregationReport, CovarianceGap, NoisyAggregationReport, Release
from protocol.lora_rules import LoraRule
from protocol.manifest import FedAvgBlock, FilterRule, OptimizerBlock
from protocol.privacy import CentralPrivacy

Report = AggregationReport | NoisyAggregationReport


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a round adds to the global adapter, and what of it is told."""

    step: NDArray[np.float64]
    """[n_values], to be added to the vector that the round started from."""
    report: Report
    optimizer_state: bytes | None
    """Of the release to come; None for FedAvg, which remembers nothing."""


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

    def decide(self, cells: Sequence[CellRow]) -> FilterDecision:
        """Judge the cells of a round.

        Args:
            cells: All that gave a sum.

        Raises:
            AggregationError: None of them can be used.
        """
        return decide(
            cells,
            self._units(cells),
            rule=self._charter.manifest.filter.rule,
            mode=Mode.OPEN if self._charter.masked is None else Mode.CELLS,
            layout=self._terms(cells).layout,
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
        kept = self._releases.optimizer_state(base.number)
        if kept is not None:
            state = optimizers.OptimizerState.from_bytes(kept)
        step, state = optimizers.apply(optimizer, state, mean)
        return Merged(
            step=step, report=report, optimizer_state=None if state is None else state.to_bytes()
        )

    def _mean(
        self, cells: Sequence[CellRow], decision: FilterDecision, base: Release
    ) -> tuple[NDArray[np.float64], Report]:
        manifest, n_values = self._charter.manifest, self._terms(cells).layout.n_values
        kept = [cell for cell, is_kept in zip(cells, decision.kept, strict=True) if is_kept]
        if isinstance(manifest.privacy, CentralPrivacy):
            return self._noisy_mean(kept, manifest.privacy, base)
        if manifest.lora.rule is LoraRule.FLEXLORA:
            return self._flexlora(kept, base)
        if decision.report.rule is FilterRule.NONE:
            plain = average(map(self._load, kept), n_values=n_values)
            mean, n_agents = plain.mean, plain.n_agents
        else:
            units = self._units(cells)
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
            self._units(cells),
            self._releases.vector(base),
            self._charter.layout,
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
        """What the average lost; None where products cannot be seen, or a factor is shared."""
        lora = self._charter.manifest.lora
        if self._charter.masked is not None or lora.rule is not LoraRule.FEDIT:
            return None
        return estimate_gap(
            kept_updates(self._units(cells), decision.kept, decision.factors),
            start=self._releases.vector(base),
            layout=self._charter.layout,
            scale=scale_of(lora),
            seed=os.urandom(KEY_BYTES),
        )

    def _noisy_mean(
        self, cells: Sequence[CellRow], privacy: CentralPrivacy, base: Release
    ) -> tuple[NDArray[np.float64], Report]:
        terms = self._terms(cells)
        noisy = noisy_mean(
            map(self._load, cells),
            n_values=terms.layout.n_values,
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

    def _units(self, cells: Sequence[CellRow]) -> StoredUnits:
        return StoredUnits(cells, self._load, n_values=self._terms(cells).layout.n_values)

    def _load(self, cell: CellRow) -> CellSum:
        if cell.upload is not None:
            return self._uploads.load(self._store.uploads.get(cell.upload))
        plan = self._terms([cell]).plan
        if plan is None or cell.sum_sha256 is None:
            msg = f"cell {cell.transcript.hex()[:8]} of round {cell.round} has no sum"
            raise AggregationError(msg)
        return load_sum(self._blobs, cell.transcript, cell.sum_sha256, plan)


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
