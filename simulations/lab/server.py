"""The server's part of a round, on arrays in memory: cells, sums, filter, average, release.

Cells are cut by `privacy.secagg.cells`, updates encoded by `privacy.fixed_point`, sums made by
`simulations.masked_cells` and averaged by `aggregator_server.merge_rules`: what a deployment runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from aggregator_server.aggregation.fedavg import apply_mean
from aggregator_server.errors import AggregationError
from aggregator_server.masking.vectors import cell_sum
from aggregator_server.merge_rules import Chance, MergeRules, RoundSums, Start
from privacy.errors import UpdateRangeError
from privacy.fixed_point import EncodingPlan, encode
from privacy.masking import Words
from privacy.noise import SecureStream
from privacy.secagg.cells import assign
from privacy.updates import CellSum, Float32Array, PlainUpdate
from protocol.blocks import CellMasking
from protocol.chain import AggregationReport, NoisyAggregationReport
from protocol.masked import ReadyList
from protocol.wire import domain_hash
from quant.adapter import flatten, unflatten
from simulations.lab.chance import RunChance
from simulations.lab.records import Cryptography, Fate
from simulations.lab.terms import RunTerms
from simulations.masked_cells import (
    CellTerms,
    CellTotal,
    Stage,
    left_to_try,
    masked_sum,
    n_uploads,
    plain_sum,
)

_FIRST_WAVE: Final = 1
_SUM_OF: Final = {Cryptography.REAL: masked_sum, Cryptography.EXACT_SUM: plain_sum}


@dataclass(frozen=True, kw_only=True, eq=False)
class Release:
    """What a round starts from.

    Attributes:
        number: From 0.
        vector: The whole adapter, [n_whole] float32.
        optimizer_state: Of the server's optimiser; None: it remembers nothing yet.
        clip_norm: C of profile P3 for the next round; None: the manifest's.
    """

    number: int
    vector: Float32Array
    optimizer_state: bytes | None = field(default=None, repr=False)
    clip_norm: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Closed:
    """A round that is over.

    Attributes:
        release: What it made, or what it started from where it made nothing.
        fates: Of all whose updates came in, by client.
        n_cells: Sums that the server saw.
        n_cells_removed: Of these, by the filter.
        update_norm: L2 norm of the mean.
        covariance_gap: What averaging the factors apart lost, relative to the round's change.
        up_n_bytes: Bodies of all updates that came in.
        failure: Why there is no new release.
    """

    release: Release
    fates: Mapping[int, Fate]
    n_cells: int = 0
    n_cells_removed: int = 0
    update_norm: float = 0.0
    covariance_gap: float | None = None
    up_n_bytes: int = 0
    failure: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cell:
    """A sum, and whose it is."""

    transcript: bytes
    agents: tuple[int, ...]
    found: CellSum = field(repr=False)

    @property
    def weight_sum(self) -> int:
        return self.found.weight_sum

    @property
    def n_members(self) -> int:
        return self.found.n_members

    @property
    def only_member(self) -> bytes:
        return identity_of(self.agents[0])


def identity_of(agent: int) -> bytes:
    """What stands for a virtual agent's public key, 32 bytes.

    Args:
        agent: The client's number.
    """
    return agent.to_bytes(32, "big")


class VirtualServer:
    """Closes the rounds of one run.

    Guarantees:
        1. Equal updates in equal order from an equal release give an equal release, bit for bit.
        2. With either kind of cryptography the same: an encoded update, a drop-out and a sum are
           the same in both.

    Args:
        terms: Of the run.
        chance: Of the run.
        cryptography: Of masked sums.
        vanish: The chance that a member leaves its cell, at a stage drawn evenly.
    """

    def __init__(
        self, terms: RunTerms, chance: RunChance, *, cryptography: Cryptography, vanish: float
    ) -> None:
        """Take the parts."""
        self._terms = terms
        self._chance = chance
        self._sum = _SUM_OF[cryptography]
        self._vanish = vanish
        self._rules = MergeRules(terms.manifest, terms.tensors)

    def close(
        self,
        number: int,
        release: Release,
        updates: Sequence[tuple[int, PlainUpdate]],
        *,
        with_gap: bool = True,
    ) -> Closed:
        """Make a release of the updates that came in, or none where they are too few.

        Args:
            number: Of the round, from 1.
            release: What the agents started from.
            updates: By client, in an order that the round fixes.
            with_gap: Whether to estimate what averaging the factors apart lost.
        """
        terms = self._terms.turns.at(release.number)
        fates = {agent: Fate.COUNTED for agent, _ in updates}
        fewest, n_bodies = self._terms.manifest.rounds.min_cohort, len(updates)
        cells: list[_Cell] = []
        failure: str | None = None
        if terms.plan is None:
            n_ready = len(updates)
            cells = [
                _Cell(
                    transcript=domain_hash("laboratory cell", number, agent),
                    agents=(agent,),
                    found=CellSum.of_plain(update),
                )
                for agent, update in updates
            ]
        else:
            payloads = self._encoded(number, terms.plan, updates, fates)
            n_ready, n_bodies = len(payloads), 0
            if n_ready >= fewest:
                cells, n_bodies = self._masked(number, terms.plan, payloads, fates)
                failure = None if cells else "no cell of the round gave a sum"
        if n_ready < fewest:
            failure = f"too few updates: {n_ready} of at least {fewest}"
        up_n_bytes = n_bodies * terms.n_bytes
        if failure is not None:
            return Closed(release=release, fates=fates, up_n_bytes=up_n_bytes, failure=failure)
        sums = RoundSums(cells=cells, load=lambda cell: cell.found, terms=terms)
        start = unflatten(release.vector, self._terms.whole)
        vector = flatten(start, terms.layout.tensors)
        chance = Chance.of(self._chance.secret("server"), number)
        try:
            decision = self._rules.decide(sums, chance=chance)
            merged = self._rules.merge(
                sums,
                decision,
                Start(
                    vector=lambda: vector,
                    optimizer_state=lambda: release.optimizer_state,
                    clip_norm=lambda: release.clip_norm,
                ),
                chance=chance,
                with_gap=with_gap,
            )
            moved = apply_mean(vector, merged.step)
        except AggregationError as error:
            return Closed(
                release=release,
                fates=fates,
                n_cells=len(cells),
                up_n_bytes=up_n_bytes,
                failure=str(error),
            )
        for cell, kept in zip(cells, decision.kept, strict=True):
            if not kept:
                fates |= dict.fromkeys(cell.agents, Fate.REMOVED)
        report = merged.report
        whole = start | unflatten(moved, terms.layout.tensors)
        return Closed(
            release=Release(
                number=release.number + 1,
                vector=flatten(whole, self._terms.whole),
                optimizer_state=merged.optimizer_state,
                clip_norm=report.next_clip_norm
                if isinstance(report, NoisyAggregationReport)
                else None,
            ),
            fates=fates,
            n_cells=len(cells),
            n_cells_removed=int((~decision.kept).sum()),
            update_norm=report.update_norm,
            covariance_gap=_gap(report),
            up_n_bytes=up_n_bytes,
        )

    def not_closed(self, release: Release, came: Sequence[int], *, failure: str) -> Closed:
        """A round that failed before there was anything to add up.

        Args:
            release: What the agents started from.
            came: Whose updates had come in, in the open.
            failure: Why it failed.
        """
        terms = self._terms.turns.at(release.number)
        n_bodies = len(came) if terms.plan is None else 0
        return Closed(
            release=release, fates={}, up_n_bytes=n_bodies * terms.n_bytes, failure=failure
        )

    def _encoded(
        self,
        number: int,
        plan: EncodingPlan,
        updates: Sequence[tuple[int, PlainUpdate]],
        fates: dict[int, Fate],
    ) -> dict[int, Words]:
        """What each agent would mask, by client; sets the fates of those who withdraw."""
        payloads = {}
        for agent, update in updates:
            try:
                payloads[agent] = encode(
                    update.vector,
                    weight=update.weight,
                    plan=plan,
                    stream=SecureStream.of(
                        self._chance.secret("encoding", number), "encoding", agent
                    ),
                )
            except UpdateRangeError:  # the agent withdraws; see `edge_agent.masked`
                fates[agent] = Fate.FAILED
        return payloads

    def _masked(
        self,
        number: int,
        plan: EncodingPlan,
        payloads: Mapping[int, Words],
        fates: dict[int, Fate],
    ) -> tuple[list[_Cell], int]:
        """The sums of a round's cells, and how many updates were sent; sets the others' fates.

        A cell that was lost is tried again once, with those that are left, as the server does.
        """
        masking = self._terms.manifest.masking
        if not isinstance(masking, CellMasking):  # cannot be: the experiment refuses helpers
            msg = f"masking {masking.mode!r} is not simulated"
            raise AggregationError(msg)
        if len(payloads) < masking.min_cell:
            fates |= dict.fromkeys(payloads, Fate.CELL_LOST)
            return [], 0
        cell_terms = CellTerms(
            plan=plan,
            masking=masking,
            federation=self._terms.manifest.federation,
            round_number=number,
            round_digest=self._chance.secret("round", number),
        )
        cells, n_bodies = list[_Cell](), 0
        rng = self._chance.generator("vanishing", number)
        waves = [tuple(sorted(payloads))]
        for wave, ready in enumerate(waves, start=_FIRST_WAVE):  # grows by second tries
            for agents in self._cells_of(ready, cell_terms, wave=wave):
                leaving = rng.random(len(agents)) < self._vanish
                stages = rng.integers(len(Stage), size=len(agents))
                vanishings = {
                    place: Stage(int(stages[place])) for place in np.flatnonzero(leaving).tolist()
                }
                found = self._sum(cell_terms, [payloads[agent] for agent in agents], vanishings)
                n_bodies += n_uploads(found, len(agents), vanishings)
                if isinstance(found, CellTotal):
                    counted = tuple(agents[place] for place in found.counted)
                    fates |= dict.fromkeys(agents, Fate.VANISHED)
                    fates |= dict.fromkeys(counted, Fate.COUNTED)
                    cells.append(
                        _Cell(
                            transcript=domain_hash("laboratory cell", number, *agents),
                            agents=counted,
                            found=cell_sum(found.payload, plan),
                        )
                    )
                    continue
                fates |= dict.fromkeys(agents, Fate.CELL_LOST)
                places = left_to_try(
                    found, len(agents), vanishings, with_noise=plan.noise is not None
                )
                left = tuple(agents[place] for place in places)
                if wave == _FIRST_WAVE and len(left) >= masking.min_cell:
                    waves.append(left)
        return cells, n_bodies

    def _cells_of(
        self, ready: Sequence[int], terms: CellTerms, *, wave: int
    ) -> list[tuple[int, ...]]:
        """Ready agents cut into cells, each ascending by its members' drawn places."""
        again = () if wave == _FIRST_WAVE else (wave,)
        ready_list = ReadyList(
            federation=terms.federation,
            round=terms.round_number,
            round_digest=terms.round_digest,
            wave=wave,
            entries=tuple(
                (
                    identity_of(agent),
                    self._chance.secret("ready", terms.round_number, agent, *again),
                )
                for agent in ready
            ),
        )
        return [
            tuple(int.from_bytes(identity, "big") for identity in identities)
            for identities in assign(ready_list, terms.masking.cell_target)
        ]


def _gap(report: AggregationReport | NoisyAggregationReport) -> float | None:
    if isinstance(report, NoisyAggregationReport) or report.covariance_gap is None:
        return None
    gap = report.covariance_gap
    if gap.estimated_change_norm == 0.0:
        return 0.0
    return gap.estimated_norm / gap.estimated_change_norm
