"""FILTERED: the candidate is made, and the trusted evaluator, where there is one, judges it.

A first candidate holds all that the filter kept. If the evaluator objects, up to `max_retries` more
are made at once, each without another part of the cells, and the best of those that pass becomes
the release. If none passes, or the evaluator is silent, the old release stays and the operator
finds an incident.
"""

import secrets
from collections.abc import Sequence
from typing import Final

import structlog

from aggregator_server.candidates import Candidate, CandidateMaker
from aggregator_server.charter import Charter
from aggregator_server.phase import Found, round_manifest
from aggregator_server.releases import Releases
from aggregator_server.store.rows import EvaluationRow, IncidentKind, NewIncident, RoundRow
from aggregator_server.store.store import Store
from protocol.blocks import EvaluatorGate
from protocol.chain import EvaluatorVerdict, NoVerdict, Verdict
from protocol.clock import Clock
from protocol.gating import EvaluationReport, objection
from protocol.limits import MAX_TEXT_CHARS
from protocol.messages import EvaluationTask
from protocol.phases import RoundEvent, RoundPhase
from protocol.signing import Signed, sign
from protocol.wire import WireModel, parse

_FIRST: Final = 1
_RETRY: Final = 2
_log = structlog.get_logger(__name__)


class CandidateList(WireModel):
    """The candidates of one attempt, in the order of its task."""

    candidates: tuple[Candidate, ...]


class Passed(WireModel):
    """What the gate lets through, and why."""

    candidate: Candidate
    verdict: Verdict


class Ungated:
    """FILTERED in a federation without an evaluator: the candidate passes."""

    name = RoundPhase.FILTERED

    def __init__(self, maker: CandidateMaker) -> None:
        """Make candidates with the maker."""
        self._maker = maker

    def work(self, row: RoundRow) -> Found | None:
        """Make the candidate; nobody judges it."""
        return _found(Passed(candidate=self._maker.make(row), verdict=NoVerdict()))


class EvaluatorsGate:
    """FILTERED in a federation with an evaluator.

    Guarantees:
        1. What passes is, byte for byte, an adapter that the evaluator's signed report names.
        2. A candidate is journalled before the evaluator is asked about it, and is not made again.
        3. Where no candidate passes, or none is judged in time, the round fails, the old release
           stays, and an incident says why.

    Args:
        store: Of the federation.
        maker: Makes candidates.
        releases: The chain.
        charter: The manifest and what follows from it.
        gate: The manifest's.
        clock: Time.
    """

    name = RoundPhase.FILTERED

    def __init__(
        self,
        store: Store,
        maker: CandidateMaker,
        releases: Releases,
        charter: Charter,
        gate: EvaluatorGate,
        clock: Clock,
    ) -> None:
        """Take the parts."""
        self._store = store
        self._maker = maker
        self._releases = releases
        self._charter = charter
        self._gate = gate
        self._clock = clock

    def work(self, row: RoundRow) -> Found | None:
        """Ask, wait, judge; ask once more without some of the cells; None to wait."""
        attempts = self._store.evaluations.of_round(row.number)
        if not attempts:
            self._ask(row, _FIRST, (self._maker.make(row),))
            return None
        last = attempts[-1]
        if last.report is None:
            return self._wait(row, last)
        report = parse(Signed[EvaluationReport], last.report)
        candidates = parse(CandidateList, last.candidates).candidates
        passing = [
            index
            for index in range(len(candidates))
            if objection(report.body, index, self._gate) is None
        ]
        if passing:
            best = min(passing, key=lambda index: report.body.mean_loss(index + 1))
            return self._pass(row, candidates[best], report)
        if last.attempt == _FIRST and (parts := self._parts(candidates[0])):
            _log.warning("the evaluator objects; parts are left out", round=row.number)
            made = tuple(self._maker.make(row, left_out=part) for part in parts)
            self._ask(row, _RETRY, made)
            return None
        first = parse(Signed[EvaluationReport], attempts[0].report or b"").body
        reason = f"the evaluator objects to the candidate: {objection(first, 0, self._gate)}"
        if last.attempt == _RETRY:
            reason += f"; leaving out any one of {len(candidates)} parts of the cells did not help"
        return self._refuse(row, IncidentKind.GATE_REFUSED, reason)

    def _ask(self, row: RoundRow, attempt: int, candidates: Sequence[Candidate]) -> None:
        manifest = round_manifest(row)
        task = EvaluationTask(
            federation=manifest.federation,
            round=row.number,
            round_digest=row.digest,
            attempt=attempt,
            current=self._releases.get(manifest.release).adapter,
            candidates=tuple(candidate.adapter for candidate in candidates),
        )
        made = CandidateList(candidates=tuple(candidates))
        self._store.evaluations.ask(
            EvaluationRow(
                round=row.number,
                attempt=attempt,
                task=sign(self._charter.keys.server, "evaluation-task", task).signed.canonical(),
                candidates=made.canonical().decode("ascii"),
                asked_at=self._clock.now(),
                has_blobs=True,
            )
        )
        _log.info("the evaluator is asked", round=row.number, n_candidates=len(candidates))

    def _wait(self, row: RoundRow, asked: EvaluationRow) -> Found | None:
        if self._clock.now() < asked.asked_at + self._gate.wait_s:
            return None
        reason = f"the evaluator did not answer within {self._gate.wait_s:g} s; is it running?"
        return self._refuse(row, IncidentKind.EVALUATOR_SILENT, reason)

    def _pass(
        self, row: RoundRow, candidate: Candidate, report: Signed[EvaluationReport]
    ) -> Found | None:
        n_left_out = len(candidate.left_out)
        incident = None
        if n_left_out:
            names = ", ".join(transcript.hex()[:8] for transcript in candidate.left_out)
            incident = self._incident(
                row,
                IncidentKind.GATE_LEFT_OUT,
                f"the evaluator let the round pass only without {n_left_out} of its cells: {names}",
            )
        verdict = EvaluatorVerdict(report=report, n_left_out=n_left_out)
        return _found(Passed(candidate=candidate, verdict=verdict), incident)

    def _refuse(self, row: RoundRow, kind: IncidentKind, reason: str) -> Found:
        reason = reason[:MAX_TEXT_CHARS]
        _log.warning("the old release stays", round=row.number, reason=reason)
        return Found(
            event=RoundEvent.FAIL, failure=reason, incident=self._incident(row, kind, reason)
        )

    def _incident(self, row: RoundRow, kind: IncidentKind, text: str) -> NewIncident:
        return NewIncident(kind=kind, text=text, at=self._clock.now(), round=row.number)

    def _parts(self, candidate: Candidate) -> tuple[tuple[bytes, ...], ...]:
        """A division of the kept cells by lot, each by itself where they are few; may be empty."""
        kept = candidate.accepted
        n_parts = min(self._gate.max_retries, len(kept))
        if n_parts < 2:
            return ()
        shuffled = secrets.SystemRandom().sample(kept, len(kept))
        return tuple(tuple(shuffled[index::n_parts]) for index in range(n_parts))


def _found(passed: Passed, incident: NewIncident | None = None) -> Found:
    return Found(
        event=RoundEvent.GATE_PASSED, passed=passed.canonical().decode("ascii"), incident=incident
    )
