"""What the evaluator asks and answers: its task, the candidates' files, its report."""

from collections.abc import Iterable
from typing import Final

from aggregator_server.blobs import Blobs
from aggregator_server.charter import Charter
from aggregator_server.errors import Refusal, refuse_first
from aggregator_server.gating import CandidateList
from aggregator_server.membership import require_author, require_federation
from aggregator_server.releases import blob_key
from aggregator_server.store.rows import EvaluationRow
from aggregator_server.store.store import Store
from protocol.blocks import EvaluatorGate
from protocol.chain import BlobRef
from protocol.errors import SignatureError
from protocol.gating import EvaluationReport
from protocol.messages import EvaluationReply, EvaluationTask
from protocol.problems import ProblemType
from protocol.signing import Signed, verify
from protocol.wire import b64u_encode, parse

_NO_GATE: Final = "this federation has no evaluator"


class Evaluations:
    """The evaluator's side of the gate.

    Guarantees:
        1. Only the evaluator that the manifest names learns of candidates.
        2. The files of candidates that became no release are deleted once their round is over.
    """

    def __init__(self, store: Store, blobs: Blobs, charter: Charter) -> None:
        """Use the gate of the charter's manifest."""
        self._store = store
        self._blobs = blobs
        self._charter = charter

    def require_evaluator(self, identity: bytes) -> None:
        """Refuse anyone but the evaluator.

        Raises:
            Refusal: A federation without one (`not-found`), or another key (`unknown-agent`).
        """
        gate = self._charter.manifest.gate
        if not isinstance(gate, EvaluatorGate):
            raise Refusal(ProblemType.NOT_FOUND, _NO_GATE)
        if identity != gate.evaluator:
            raise Refusal(
                ProblemType.UNKNOWN_AGENT,
                f"{b64u_encode(identity)} is not the evaluator that the manifest names",
            )

    def reply(self) -> EvaluationReply:
        """What the evaluator is to do now."""
        row = self._store.rounds.latest()
        n_done = self._store.releases.n_of_rounds()
        waiting = None if row is None or row.over else self._open(row.number)
        return EvaluationReply(
            task=None if waiting is None else parse(Signed[EvaluationTask], waiting.task),
            finished=n_done >= self._charter.manifest.rounds.n_rounds,
        )

    def receive(self, identity: bytes, signed: Signed[EvaluationReport]) -> None:
        """Journal a report; the same again changes nothing.

        Args:
            identity: The evaluator, who makes the request.
            signed: Its report.

        Raises:
            Refusal: Another's signature or federation, no such task (`not-found`), adapters other
                than the task's (`bad-message`), another report before (`conflict`), or a round
                that no longer waits (`round-closed`).
        """
        body = signed.body
        require_author(identity, body.evaluator)
        try:
            verify(signed, "evaluation", key=identity)
        except SignatureError as error:
            raise Refusal(ProblemType.BAD_SIGNATURE, str(error)) from error
        require_federation(self._charter, body.federation)
        for row in self._store.evaluations.of_round(body.round):
            task = parse(Signed[EvaluationTask], row.task).body
            if task.digest() == body.task:
                break
        else:
            raise Refusal(ProblemType.NOT_FOUND, f"round {body.round} asked nothing like that")
        refuse_first(
            ProblemType.BAD_MESSAGE,
            {
                "the report is about other candidates than the task": body.candidates
                != tuple(ref.sha256 for ref in task.candidates),
                "the report compares with another adapter than the task": body.current
                != task.current.sha256,
            },
        )
        self._store.evaluations.answer(
            row.round, row.attempt, report=signed.canonical(), digest=body.digest()
        )

    def candidate(self, sha: bytes) -> BlobRef:
        """The file of a candidate by its digest.

        Raises:
            Refusal: No candidate has it (`not-found`).
        """
        for row, _ in self._store.evaluations.with_blobs():
            for candidate in parse(CandidateList, row.candidates).candidates:
                if candidate.adapter.sha256 == sha:
                    return candidate.adapter
        raise Refusal(ProblemType.NOT_FOUND, "no candidate has this file")

    def chunks(self, sha: bytes, start: int, stop: int) -> Iterable[bytes]:
        """Bytes `start` to `stop` of a candidate's file.

        Raises:
            BlobError: It cannot be read.
        """
        return self._blobs.stream(blob_key(sha), start, stop)

    def sweep(self) -> None:
        """Delete the files of candidates whose round is over, but for those of releases.

        Raises:
            BlobError: A file cannot be deleted; the next call tries again.
        """
        rows = self._store.evaluations.with_blobs()
        ended = [row for row, is_over in rows if is_over]
        if not ended:
            return
        kept = set(self._store.releases.blobs())
        for row, is_over in rows:
            if not is_over:
                kept |= _blobs_of(row)
        for row in ended:
            for sha in _blobs_of(row) - kept:
                self._blobs.delete(blob_key(sha))
            self._store.evaluations.forget_blobs(row.round, row.attempt)

    def _open(self, number: int) -> EvaluationRow | None:
        rows = self._store.evaluations.of_round(number)
        return rows[-1] if rows and rows[-1].report is None else None


def _blobs_of(row: EvaluationRow) -> set[bytes]:
    candidates = parse(CandidateList, row.candidates).candidates
    return {sha for candidate in candidates for sha in candidate.blobs}
