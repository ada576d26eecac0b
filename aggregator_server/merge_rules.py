"""What a round makes of the sums of its cells: filter, mean, noise, optimiser, control variate.

Every decision stands here, and nothing is read from a disk or written to one. The server hands in
how its files are read (`merging`), a simulation hands in arrays; both get the same from the same.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, Self

import numpy as np
from numpy.typing import NDArray

from aggregator_server import filtering
from aggregator_server.aggregation import optimizers
from aggregator_server.aggregation.fedavg import average
from aggregator_server.aggregation.lora_flex import flexlora_step
from aggregator_server.aggregation.lora_gap import estimate_gap, kept_updates
from aggregator_server.aggregation.mixed_ranks import RankRows
from aggregator_server.aggregation.robust.outcome import robust_mean
from aggregator_server.aggregation.robust.pipeline import MIN_FILTER_UNITS, Mode
from aggregator_server.aggregation.scaffold import ControlBook, initial_control, renewed
from aggregator_server.errors import AggregationError
from aggregator_server.filtering import LEFT_OUT, CellT, FilterDecision, LazyUnits
from privacy.central import noisy_mean
from privacy.noise import KEY_BYTES, SecureStream
from privacy.turns import UpdateTerms
from privacy.updates import CellSum, Float32Array
from protocol.blocks import FilterRule, LoraRule, NoMasking
from protocol.chain import AggregationReport, CovarianceGap, NoisyAggregationReport
from protocol.layout import VectorLayout
from protocol.manifest import FederationManifest
from protocol.privacy import CentralPrivacy

Report = AggregationReport | NoisyAggregationReport


def _system_seed() -> bytes:
    return os.urandom(KEY_BYTES)


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Where the random numbers of a round come from: by default, the operating system.

    Guarantees:
        1. By default every call draws anew, so nobody can foresee a projection or take noise off.
        2. Of equal secrets and numbers (`of`), every call gives the same, always.
    """

    filter_seed: Callable[[], bytes] = _system_seed
    """Gives 32 bytes: the projection on which the filter looks for evidence."""
    gap_seed: Callable[[], bytes] = _system_seed
    """Gives 32 bytes: the projections that estimate the covariance gap."""
    noise: Callable[[], SecureStream] = SecureStream
    """Gives a stream at its start: the noise of profile P3."""

    @classmethod
    def of(cls, secret: bytes, number: int) -> Self:
        """What a simulation can repeat. A server must not: who knows the secret knows the noise.

        Args:
            secret: At least 32 bytes; see `SecureStream.of`.
            number: Of the round.
        """

        def stream(purpose: str) -> SecureStream:
            return SecureStream.of(secret, purpose, number)

        return cls(
            filter_seed=lambda: stream("filter seed").take_bytes(KEY_BYTES),
            gap_seed=lambda: stream("gap seed").take_bytes(KEY_BYTES),
            noise=lambda: stream("noise of the mean"),
        )


SYSTEM: Final = Chance()


def _nothing() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is known of the release that a round started from; each is asked for where needed."""

    vector: Callable[[], Float32Array]
    """What agents started from, [n_values] float32 in the order of the round's tensors."""
    optimizer_state: Callable[[], bytes | None] = _nothing
    """Of the server's optimiser, as `Merged` had it; None before the first round."""
    clip_norm: Callable[[], float | None] = _nothing
    """C of profile P3, as the last noisy report says (`next_clip_norm`); None: the manifest's."""
    control: Callable[[], tuple[Float32Array, ControlBook] | None] = _nothing
    """SCAFFOLD's c and its book, as `Merged` had them; None before the first round."""


@dataclass(frozen=True, kw_only=True)
class RoundSums(Generic[CellT]):
    """The cells of a round that gave a sum, and how the sum of one is read."""

    cells: Sequence[CellT]
    """In the order that the round fixes."""
    load: Callable[[CellT], CellSum]
    """Reads the sum of one, as often as it is asked."""
    terms: UpdateTerms
    """Of the round's updates."""

    @property
    def tensors(self) -> VectorLayout:
        """Of the adapter's values in the updates."""
        return self.terms.layout.tensors

    def only(self, cells: Sequence[CellT]) -> "RoundSums[CellT]":
        """The same round with some of its cells."""
        return dataclasses.replace(self, cells=cells)

    def each(self) -> Iterator[CellSum]:
        """The sums in order, one in memory at a time."""
        return map(self.load, self.cells)

    def units(self, see: Callable[[CellSum], CellSum] = lambda found: found) -> LazyUnits[CellT]:
        """The cells as the units of a filter.

        Args:
            see: What the filter is shown of a sum; by default all of it.
        """
        return LazyUnits(
            self.cells, lambda cell: see(self.load(cell)), n_values=self.tensors.n_values
        )


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a round adds to the global adapter, and what of it is told."""

    step: NDArray[np.float64]
    """[n_values], to be added to the vector that the round started from (`fedavg.apply_mean`)."""
    report: Report
    optimizer_state: bytes | None
    """Of the release to come; None for FedAvg, which remembers nothing."""
    control: tuple[Float32Array, ControlBook] | None
    """SCAFFOLD's c and whose it is the mean of; None where agents send no control variates."""


class MergeRules:
    """Filters and averages the cells of one federation's rounds, as its manifest says.

    Guarantees:
        1. Equal cells in equal order, an equal start and equal chance give equal bits.
        2. Chance, and the start's vector, clip norm and control variate, are asked for only where
           the manifest's rules need them.

    Args:
        manifest: The federation's.
        tensors: Layout of the adapter's values in the updates of all rounds, without companions.
    """

    def __init__(self, manifest: FederationManifest, tensors: VectorLayout) -> None:
        """Find the rank rows where agents may differ in what they train."""
        self._manifest = manifest
        lora = manifest.lora
        self._rows = RankRows.of(tensors, lora) if lora.is_mixed else None

    def decide(self, sums: RoundSums[CellT], *, chance: Chance = SYSTEM) -> FilterDecision:
        """Judge the cells of a round.

        Args:
            sums: All that gave a sum.
            chance: Asked now, when nobody can fit an update to what it gives any more.

        Raises:
            AggregationError: None of them can be used.
        """
        faults = self._faults(sums)
        usable = sums.only([cell for cell in sums.cells if cell.transcript not in faults])
        rule = self._manifest.filter.rule
        if rule is FilterRule.NONE or not usable.cells:
            units = sums.units()
        elif self._rows is not None and len(usable.cells) >= MIN_FILTER_UNITS:
            units = usable.units(self._rows.stretched)
        else:
            units = self._units(usable, of=usable)
        return filtering.decide(
            sums.cells,
            units,
            rule=rule,
            mode=Mode.OPEN if self._is_open else Mode.CELLS,
            layout=sums.tensors,
            faults=faults,
            draw_seed=chance.filter_seed,
        )

    def decide_without(
        self,
        sums: RoundSums[CellT],
        decision: FilterDecision,
        left_out: Collection[bytes],
        *,
        chance: Chance = SYSTEM,
    ) -> FilterDecision:
        """Judge anew those that a decision kept, but for some.

        Args:
            sums: All that gave a sum.
            decision: On these; what it removed stays removed.
            left_out: Transcripts of those that are left out.
            chance: As for `decide`.

        Raises:
            AggregationError: None is left, or none of them can be used.
        """
        again = [
            cell
            for cell, found in zip(sums.cells, decision.cells, strict=True)
            if found.removed is None and cell.transcript not in left_out
        ]
        if not again:
            msg = f"the gate leaves out all {len(left_out)} cells of the round"
            raise AggregationError(msg)
        judged = self.decide(sums.only(again), chance=chance)
        fresh = {found.transcript: found for found in judged.cells}
        told = tuple(
            fresh.get(found.transcript) or found.without(LEFT_OUT) for found in decision.cells
        )
        n_rejected = sum(found.removed is not None for found in told)
        return FilterDecision(
            report=decision.report.model_copy(update={"n_rejected": n_rejected}), cells=told
        )

    def merge(
        self,
        sums: RoundSums[CellT],
        decision: FilterDecision,
        start: Start,
        *,
        chance: Chance = SYSTEM,
        with_gap: bool = True,
    ) -> Merged:
        """The step of a round.

        Args:
            sums: All that gave a sum, in the order of the decision.
            decision: What the filter decided.
            start: The release that the round started from.
            chance: For noise, and for the estimate of what averaging lost.
            with_gap: Whether that is estimated, which takes longer than the average itself.

        Raises:
            AggregationError: Cells and decision do not match, a mean that is not finite, or a
                state that is not of the manifest's optimiser.
            NoiseError: See `noisy_mean`.
        """
        if tuple(cell.transcript for cell in sums.cells) != tuple(
            cell.transcript for cell in decision.cells
        ):
            msg = "the filter decided on other cells than the round has"
            raise AggregationError(msg)
        kept = sums.only(
            [cell for cell, keeps in zip(sums.cells, decision.kept, strict=True) if keeps]
        )
        gap = self._gap(sums, decision, start, chance) if with_gap else None
        mean, report = self._mean(sums, kept, decision, start, chance, gap)
        optimizer = optimizers.optimizer_of(self._manifest.aggregation.optimizer)
        state = optimizers.initial_state(optimizer, n_values=len(mean))
        before = start.optimizer_state()
        if before is not None:
            state = optimizers.OptimizerState.from_bytes(before)
        step, state = optimizers.apply(optimizer, state, mean)
        if self._rows is not None:  # momentum would move a row that nobody trained
            step[self._rows.untrained(kept.each())] = 0.0
        return Merged(
            step=step,
            report=report,
            optimizer_state=None if state is None else state.to_bytes(),
            control=self._control(kept, start),
        )

    @property
    def _is_open(self) -> bool:
        """Whether a cell is one agent, whose update is seen by itself."""
        return isinstance(self._manifest.masking, NoMasking)

    def _faults(self, sums: RoundSums[CellT]) -> dict[bytes, str]:
        """Of cells whose participation cannot be what honest agents say."""
        if self._rows is None:
            return {}
        found = ((cell.transcript, self._rows.fault_of(sums.load(cell))) for cell in sums.cells)
        return {transcript: fault for transcript, fault in found if fault is not None}

    def _control(
        self, kept: RoundSums[CellT], start: Start
    ) -> tuple[Float32Array, ControlBook] | None:
        """C after a round, from the changes of those whose updates count."""
        if not self._manifest.training.scaffold:
            return None
        control, book = start.control() or initial_control(kept.tensors.n_values)
        changes = {cell.only_member: partial(_change_of, kept, cell) for cell in kept.cells}
        capped = self._manifest.filter.rule is not FilterRule.NONE
        return renewed(control, book, changes, capped=capped)

    def _mean(
        self,
        sums: RoundSums[CellT],
        kept: RoundSums[CellT],
        decision: FilterDecision,
        start: Start,
        chance: Chance,
        gap: CovarianceGap | None,
    ) -> tuple[NDArray[np.float64], Report]:
        privacy = self._manifest.privacy
        if isinstance(privacy, CentralPrivacy):
            return _noisy_mean(kept, privacy, start, chance)
        if self._manifest.lora.rule is LoraRule.FLEXLORA:
            return self._flexlora(kept, start)
        if decision.report.rule is FilterRule.NONE:
            plain = (
                average(kept.each(), n_values=sums.tensors.n_values)
                if self._rows is None
                else self._rows.average(kept.each())
            )
            mean, n_agents = plain.mean, plain.n_agents
        else:
            units = self._units(sums, of=kept)
            mean = robust_mean(units, decision.kept, decision.factors)
            n_agents = int(units.n_members[decision.kept].sum())
        return mean, AggregationReport(
            rule="fedavg",
            n_cells=int(decision.kept.sum()),
            n_agents=n_agents,
            update_norm=float(np.linalg.norm(mean)),
            covariance_gap=gap,
        )

    def _flexlora(self, kept: RoundSums[CellT], start: Start) -> tuple[NDArray[np.float64], Report]:
        found = flexlora_step(kept.units(), start.vector(), kept.tensors, self._manifest.lora)
        return found.step, AggregationReport(
            rule="flexlora",
            n_cells=len(kept.cells),
            n_agents=len(kept.cells),
            update_norm=float(np.linalg.norm(found.step)),
            left_out_norm=found.error_norm,
        )

    def _gap(
        self, sums: RoundSums[CellT], decision: FilterDecision, start: Start, chance: Chance
    ) -> CovarianceGap | None:
        """What the average lost; None where products cannot be seen, or a factor is shared.

        Nor where each rank row has weights of its own: products have one weight for each agent.
        """
        lora = self._manifest.lora
        seen = self._is_open and lora.rule is LoraRule.FEDIT
        hidden = isinstance(self._manifest.privacy, CentralPrivacy)
        if not seen or lora.is_mixed or hidden:
            return None
        return estimate_gap(
            kept_updates(sums.units(), decision.kept, decision.factors),
            start=start.vector(),
            layout=sums.tensors,
            scale=lora.scale,
            seed=chance.gap_seed(),
        )

    def _units(self, sums: RoundSums[CellT], *, of: RoundSums[CellT]) -> LazyUnits[CellT]:
        """Cells as they are averaged: rows that one did not train are the mean of others, `of`."""
        rows = self._rows
        if rows is None:
            return sums.units()
        fill = rows.fill([partial(of.load, cell) for cell in of.cells])
        return sums.units(lambda found: rows.filled(found, fill))


def _noisy_mean(
    kept: RoundSums[CellT], privacy: CentralPrivacy, start: Start, chance: Chance
) -> tuple[NDArray[np.float64], Report]:
    plan, clip_norm = kept.terms.plan, start.clip_norm()
    noisy = noisy_mean(
        kept.each(),
        n_values=kept.tensors.n_values,
        privacy=privacy,
        clip_norm=privacy.clip_norm if clip_norm is None else clip_norm,
        rounding_norm=0.0 if plan is None else plan.rounding_norm,
        # Of the system anew, also where a killed server does this again: nobody saw the first.
        stream=chance.noise(),
    )
    return noisy.mean, NoisyAggregationReport(
        n_cells=noisy.n_cells,
        n_agents=noisy.n_agents,
        update_norm=noisy.norm,
        clip_norm=noisy.clip_norm,
        noise_std=noisy.noise_std,
        next_clip_norm=noisy.next_clip_norm,
    )


def _change_of(sums: RoundSums[CellT], cell: CellT) -> Float32Array:
    found = sums.load(cell).control
    if found is None:  # cannot be: the layout of a federation with SCAFFOLD has it
        msg = f"cell {cell.transcript.hex()[:8]} has no control variate"
        raise AggregationError(msg)
    return found
