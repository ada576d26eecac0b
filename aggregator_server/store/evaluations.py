"""What the evaluator is asked, and what it answers."""

import dataclasses

from sqlalchemy import insert, select, update

from aggregator_server.errors import Refusal
from aggregator_server.store import counters
from aggregator_server.store.counters import Counter
from aggregator_server.store.database import Database
from aggregator_server.store.rounds import TERMINAL, require_phase
from aggregator_server.store.rows import EvaluationRow
from aggregator_server.store.schema import evaluations, rounds
from protocol.phases import RoundPhase
from protocol.problems import ProblemType


class EvaluationStore:
    """The table of evaluations.

    Guarantees:
        1. An attempt of a round has one list of candidates and at most one report, which never
           change.
        2. A report counts only while its round waits for it.
    """

    def __init__(self, database: Database) -> None:
        """Wrap a database."""
        self._database = database

    def ask(self, row: EvaluationRow) -> None:
        """Journal what the evaluator is asked.

        Raises:
            StaleWriteError: The round has moved on.
        """
        with self._database.writing() as connection:
            require_phase(connection, row.round, RoundPhase.FILTERED)
            connection.execute(insert(evaluations).values(dataclasses.asdict(row)))
            counters.add(connection, Counter.CHANGES)

    def of_round(self, number: int) -> tuple[EvaluationRow, ...]:
        """The attempts of a round, the first one first."""
        query = (
            select(evaluations).where(evaluations.c.round == number).order_by(evaluations.c.attempt)
        )
        with self._database.reading() as connection:
            return tuple(EvaluationRow(**row._mapping) for row in connection.execute(query))

    def answer(self, number: int, attempt: int, *, report: bytes, digest: bytes) -> None:
        """Journal the evaluator's report; the same again changes nothing.

        Args:
            number: The round.
            attempt: Of the task that the report names.
            report: Canonical JSON of the `Signed[EvaluationReport]`, which the caller has checked.
            digest: Of its body.

        Raises:
            Refusal: Another report was journalled before (`conflict`), or the round no longer
                waits for one (`round-closed`).
        """
        place = (evaluations.c.round == number, evaluations.c.attempt == attempt)
        with self._database.writing() as connection:
            known = connection.execute(
                select(evaluations.c.report_digest).where(*place)
            ).scalar_one()
            if known is not None:
                if bytes(known) != digest:
                    raise Refusal(
                        ProblemType.CONFLICT, f"round {number} was already judged otherwise"
                    )
                return
            phase = connection.execute(
                select(rounds.c.phase).where(rounds.c.number == number)
            ).scalar_one()
            if phase != RoundPhase.FILTERED.value:
                raise Refusal(ProblemType.ROUND_CLOSED, f"round {number} waits for no evaluator")
            connection.execute(
                update(evaluations).where(*place).values(report=report, report_digest=digest)
            )

    def with_blobs(self) -> tuple[tuple[EvaluationRow, bool], ...]:
        """The attempts whose candidates' files are kept, and whether their round is over."""
        query = (
            select(evaluations, rounds.c.phase)
            .join(rounds, rounds.c.number == evaluations.c.round)
            .where(evaluations.c.has_blobs)
            .order_by(evaluations.c.round, evaluations.c.attempt)
        )
        over = {phase.value for phase in TERMINAL}
        with self._database.reading() as connection:
            found = []
            for row in connection.execute(query):
                values = dict(row._mapping)
                is_over = values.pop("phase") in over
                found.append((EvaluationRow(**values), is_over))
            return tuple(found)

    def forget_blobs(self, number: int, attempt: int) -> None:
        """Journal that the candidates' files are deleted."""
        with self._database.writing() as connection:
            connection.execute(
                update(evaluations)
                .where(evaluations.c.round == number, evaluations.c.attempt == attempt)
                .values(has_blobs=False)
            )
