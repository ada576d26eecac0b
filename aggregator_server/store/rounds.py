"""Rounds and who was selected for them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, func, insert, select, update

from aggregator_server.errors import Refusal, StaleWriteError
from aggregator_server.store import counters
from aggregator_server.store.agents import present_agents
from aggregator_server.store.counters import Counter
from aggregator_server.store.database import Database
from aggregator_server.store.incidents import add_incident
from aggregator_server.store.releases import count_of_rounds, newest_number
from aggregator_server.store.rows import (
    AgentView,
    JudgedRow,
    NewIncident,
    RoundProgress,
    RoundRow,
    SelectionRow,
    UploadPhase,
)
from aggregator_server.store.schema import (
    agents,
    cells,
    readies,
    rounds,
    selections,
    uploads,
)
from aggregator_server.store.uploads import (
    end_uploads,
    has_accepted,
    require_open,
    uploads_of,
)
from protocol.phases import RoundPhase
from protocol.problems import ProblemType
from protocol.wire import b64u_decode

TERMINAL = frozenset({RoundPhase.PUBLISHED, RoundPhase.FAILED})
"""The phases that nothing leaves."""


class RoundStore:
    """The tables of rounds and selections.

    Guarantees:
        1. A round number has one manifest, which never changes.
        2. A phase changes only from the phase that the caller saw.
    """

    def __init__(self, database: Database) -> None:
        """Wrap a database."""
        self._database = database

    def latest(self) -> RoundRow | None:
        """The round with the highest number."""
        with self._database.reading() as connection:
            return latest_round(connection)

    def get(self, number: int) -> RoundRow | None:
        """A round by number."""
        query = select(rounds).where(rounds.c.number == number)
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            return None if row is None else _round(row._mapping)

    def open(self, round_row: RoundRow, *, release: int, ranks: Sequence[SelectionRow]) -> None:
        """Journal a new round with its first selection.

        Args:
            round_row: The round, with the number after the last one.
            release: The release that it starts from, which must still be the newest.
            ranks: The agents selected.

        Raises:
            StaleWriteError: Another round or release came in between.
        """
        with self._database.writing() as connection:
            last = latest_round(connection)
            number = 1 if last is None else last.number + 1
            over = last is None or last.phase in TERMINAL
            if round_row.number != number or not over or newest_number(connection) != release:
                msg = f"round {round_row.number} cannot open: the federation has moved on"
                raise StaleWriteError(msg)
            connection.execute(insert(rounds).values(**_values(round_row)))
            _select_agents(connection, ranks)

    def select(self, number: int, ranks: Sequence[SelectionRow]) -> None:
        """Fill free places of an open round.

        Raises:
            StaleWriteError: The round is no longer open.
        """
        with self._database.writing() as connection:
            require_phase(connection, number, RoundPhase.OPEN)
            _select_agents(connection, ranks)

    def candidates(self, number: int, *, seen_after: float) -> tuple[bytes, ...]:
        """The present members who were never selected in a round."""
        with self._database.reading() as connection:
            taken = select(selections.c.agent).where(selections.c.round == number)
            known = {bytes(agent) for agent in connection.execute(taken).scalars()}
            present = present_agents(connection, seen_after)
            return tuple(agent for agent in present if agent not in known)

    def progress(self, number: int) -> RoundProgress:
        """How far a round has come."""
        with self._database.reading() as connection:
            found = list(uploads_of(connection, number))
            accepted = {agent for agent, phase, _ in found if phase is UploadPhase.ACCEPTED}
            held = select(selections.c.agent).where(
                selections.c.round == number, selections.c.withdrawn_reason.is_(None)
            )
            holders = {bytes(agent) for agent in connection.execute(held).scalars()}
            ready = select(readies.c.agent).where(readies.c.round == number)
            sent_ready = {bytes(agent) for agent in connection.execute(ready).scalars()}
            return RoundProgress(
                n_selected=len(holders),
                n_accepted=len(accepted),
                n_open=len(holders - accepted),
                bytes_received=sum(upload.n_bytes_received for _, _, upload in found),
                receiving=tuple(
                    upload for _, phase, upload in found if phase is UploadPhase.RECEIVING
                ),
                n_ready=len(holders & sent_ready),
            )

    def move(
        self,
        number: int,
        *,
        seen: RoundPhase,
        to: RoundPhase,
        n_accepted: int | None = None,
        filter_report: str | None = None,
        passed: str | None = None,
        failure: str | None = None,
        incident: NewIncident | None = None,
    ) -> None:
        """Journal the next phase of a round with what the last one found.

        Args:
            number: The round.
            seen: The phase that the caller saw.
            to: The phase that follows by the transition table.
            n_accepted: The accepted uploads that the decision was based on, if it was.
            filter_report: JSON of the filter's decision.
            passed: JSON of what the gate let through.
            failure: Why the round failed.
            incident: Journalled with it.

        Raises:
            StaleWriteError: The phase or the number of accepted uploads has changed.
        """
        found = {"filter_report": filter_report, "passed": passed, "failure": failure}
        with self._database.writing() as connection:
            require_phase(connection, number, seen)
            if n_accepted is not None and _n_accepted(connection, number) != n_accepted:
                msg = f"round {number} has another number of uploads than {n_accepted}"
                raise StaleWriteError(msg)
            set_phase(connection, number, to, found)
            if incident is not None:
                add_incident(connection, incident)

    def withdraw(self, number: int, agent: bytes, *, reason: str, digest: bytes) -> None:
        """Free the place of an agent; the same withdrawal again changes nothing.

        Raises:
            Refusal: No such round, a closed one, no place in it, an accepted update, or another
                withdrawal journalled before.
        """
        with self._database.writing() as connection:
            place = (selections.c.round == number, selections.c.agent == agent)
            row = connection.execute(select(selections).where(*place)).first()
            if row is not None and row.withdrawal_digest is not None:
                if bytes(row.withdrawal_digest) != digest:
                    raise Refusal(
                        ProblemType.CONFLICT, f"already withdrawn from round {number} otherwise"
                    )
                return
            require_open(connection, number)
            if row is None:
                raise Refusal(ProblemType.NOT_SELECTED, f"not selected in round {number}")
            if has_accepted(connection, number, agent):
                raise Refusal(
                    ProblemType.CONSUMED, f"round {number} already has an update of this agent"
                )
            connection.execute(
                update(selections)
                .where(*place)
                .values(withdrawn_reason=reason, withdrawal_digest=digest)
            )
            end_uploads(connection, number, agent)

    def judged(self, *, limit: int) -> tuple[JudgedRow, ...]:
        """The published rounds with what was decided of their cells, the newest first.

        Args:
            limit: At most so many.
        """
        query = (
            select(rounds.c.number, rounds.c.filter_report, rounds.c.passed)
            .where(rounds.c.phase == RoundPhase.PUBLISHED.value)
            .order_by(rounds.c.number.desc())
            .limit(limit)
        )
        with self._database.reading() as connection:
            found = connection.execute(query).all()
            numbers = [row.number for row in found]
            in_them = select(cells.c.round, cells.c.transcript, cells.c.members).where(
                cells.c.round.in_(numbers)
            )
            by_round: dict[int, list[tuple[bytes, tuple[bytes, ...]]]] = {n: [] for n in numbers}
            for cell in connection.execute(in_them):
                members = tuple(b64u_decode(name) for name, _ in json.loads(cell.members))
                by_round[cell.round].append((bytes(cell.transcript), members))
            return tuple(
                JudgedRow(**row._mapping, cells=tuple(by_round[row.number])) for row in found
            )

    def view(self, agent: bytes) -> AgentView:
        """All that decides what an agent should do now."""
        with self._database.reading() as connection:
            last = latest_round(connection)
            selected = accepted = False
            if last is not None:
                query = select(selections.c.withdrawn_reason).where(
                    selections.c.round == last.number, selections.c.agent == agent
                )
                row = connection.execute(query).first()
                selected = row is not None and row.withdrawn_reason is None
                accepted = has_accepted(connection, last.number, agent)
            set_aside = select(agents.c.quarantined_at).where(agents.c.identity == agent)
            return AgentView(
                round=last,
                selected=selected,
                accepted=accepted,
                quarantined=connection.execute(set_aside).scalar_one_or_none() is not None,
                newest_release=newest_number(connection),
                n_releases_of_rounds=count_of_rounds(connection),
            )


def latest_round(connection: Connection) -> RoundRow | None:
    """The round with the highest number, inside the caller's transaction."""
    row = connection.execute(select(rounds).order_by(rounds.c.number.desc()).limit(1)).first()
    return None if row is None else _round(row._mapping)


def set_phase(
    connection: Connection, number: int, to: RoundPhase, found: Mapping[str, str | None]
) -> None:
    """Write a phase with what was found, and end incomplete uploads, inside a transaction."""
    values = {name: value for name, value in found.items() if value is not None}
    connection.execute(
        update(rounds).where(rounds.c.number == number).values(phase=to.value, **values)
    )
    end_uploads(connection, number)  # only an open round takes parts


def _select_agents(connection: Connection, ranks: Sequence[SelectionRow]) -> None:
    if ranks:
        connection.execute(insert(selections), [dataclasses.asdict(row) for row in ranks])
        counters.add(connection, Counter.CHANGES)


def require_phase(connection: Connection, number: int, seen: RoundPhase) -> None:
    """Refuse to write when a round has moved on, inside the caller's transaction.

    Raises:
        StaleWriteError: It is in another phase.
    """
    phase = connection.execute(select(rounds.c.phase).where(rounds.c.number == number)).scalar_one()
    if phase != seen.value:
        msg = f"round {number} is {phase}, no longer {seen.value}"
        raise StaleWriteError(msg)


def _n_accepted(connection: Connection, number: int) -> int:
    query = select(func.count()).where(
        uploads.c.round == number, uploads.c.phase == UploadPhase.ACCEPTED.value
    )
    return int(connection.execute(query).scalar_one())


def _round(values: object) -> RoundRow:
    row = dict(values)  # type: ignore[call-overload]  # a row mapping
    return RoundRow(**{**row, "phase": RoundPhase(row["phase"])})


def _values(row: RoundRow) -> dict[str, object]:
    return {**dataclasses.asdict(row), "phase": row.phase.value}
