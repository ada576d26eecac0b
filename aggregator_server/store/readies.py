"""READY messages and the lists that they become: who is in which cell."""

import dataclasses
from collections.abc import Sequence

from sqlalchemy import Connection, and_, func, insert, select, update

from aggregator_server.errors import Refusal, StaleWriteError
from aggregator_server.store import counters
from aggregator_server.store.cells import cell_values, has_confirmed, set_retried
from aggregator_server.store.counters import Counter
from aggregator_server.store.database import Database
from aggregator_server.store.rounds import require_phase, set_phase
from aggregator_server.store.rows import CellMemberRow, MaskedCellRow, ReadyRow, WaveRow
from aggregator_server.store.schema import (
    agents,
    cell_members,
    masked_cells,
    readies,
    rounds,
    selections,
    waves,
)
from aggregator_server.store.uploads import require_place
from protocol.limits import MAX_READY_ATTEMPTS
from protocol.phases import CellPhase, RoundPhase
from protocol.problems import ProblemType


class ReadyStore:
    """The tables of READY messages and of their lists.

    Guarantees:
        1. An identity has one READY that counts, the one of its highest attempt.
        2. A READY stands in one list, and a list's cells are journalled with it.
        3. Nobody whose CONFIRM was journalled is in another cell of the round.
    """

    def __init__(self, database: Database) -> None:
        """Wrap a database."""
        self._database = database

    def add(self, row: ReadyRow) -> None:
        """Journal a READY; again changes nothing.

        Args:
            row: Whose signature and contents the caller has checked; `wave` is None.

        Raises:
            Refusal: Another READY for this attempt, or an older attempt than the newest
                (`conflict`); no place in the round (`not-selected`); a round that no longer
                gathers, or a cell that was not this agent's to retry (`round-closed`); an update
                that already counts (`consumed`).
        """
        with self._database.writing() as connection:
            known = connection.execute(
                select(readies)
                .where(readies.c.round == row.round, readies.c.agent == row.agent)
                .order_by(readies.c.attempt.desc())
            ).all()
            for old in known:
                if old.attempt == row.attempt:
                    if bytes(old.digest) != row.digest:
                        raise Refusal(
                            ProblemType.CONFLICT,
                            f"attempt {row.attempt} of round {row.round} has another READY",
                        )
                    return
            if known and known[0].attempt > row.attempt:
                raise Refusal(
                    ProblemType.CONFLICT, f"attempt {known[0].attempt} has begun; it is the newest"
                )
            if row.attempt > MAX_READY_ATTEMPTS:
                raise Refusal(ProblemType.CONFLICT, f"at most {MAX_READY_ATTEMPTS} attempts")
            require_gathering(connection, row.round, row.agent)
            connection.execute(insert(readies).values(**dataclasses.asdict(row)))
            counters.add(connection, Counter.CHANGES)

    def waiting(self, round_number: int, *, seen_after: float) -> tuple[ReadyRow, ...]:
        """The READY messages that wait for a list, sorted by identity.

        Only of present members who hold a place; of each the newest, if it stands in no list yet.

        Args:
            round_number: The round.
            seen_after: Who was seen after this moment is present.
        """
        with self._database.reading() as connection:
            return _waiting(connection, round_number, seen_after)

    def form(
        self,
        wave: WaveRow,
        formed: Sequence[MaskedCellRow],
        members: Sequence[CellMemberRow],
        *,
        retry_of: bytes | None,
    ) -> None:
        """Journal a list with its cells.

        Args:
            wave: The list; number 1 moves the round on to GATHERING.
            formed: Its cells.
            members: Theirs, with the attempt of the READY that the cell holds.
            retry_of: The failed cell whose members these are.

        Raises:
            StaleWriteError: The round has moved on, or one of the members has sent another READY.
        """
        with self._database.writing() as connection:
            if wave.number == 1:
                require_phase(connection, wave.round, RoundPhase.OPEN)
                set_phase(connection, wave.round, RoundPhase.GATHERING, {})
            else:
                require_phase(connection, wave.round, RoundPhase.GATHERING)
            newest = dict(_newest_attempts(connection, wave.round))
            if any(newest.get(member.agent) != member.attempt for member in members):
                msg = f"a member of wave {wave.number} has sent another READY"
                raise StaleWriteError(msg)
            connection.execute(insert(waves).values(**dataclasses.asdict(wave)))
            connection.execute(insert(masked_cells), [cell_values(row) for row in formed])
            connection.execute(insert(cell_members), [dataclasses.asdict(row) for row in members])
            for member in members:
                connection.execute(
                    update(readies)
                    .where(
                        readies.c.round == wave.round,
                        readies.c.agent == member.agent,
                        readies.c.attempt == member.attempt,
                    )
                    .values(wave=wave.number)
                )
            if retry_of is not None:
                set_retried(connection, retry_of)
            counters.add(connection, Counter.CHANGES)

    def waits(self, round_number: int, agent: bytes, attempt: int) -> bool:
        """Whether a READY may still get a cell: the newest, in no list, while the round gathers."""
        with self._database.reading() as connection:
            newest = dict(_newest_attempts(connection, round_number)).get(agent)
            row = connection.execute(
                select(readies.c.wave).where(
                    readies.c.round == round_number,
                    readies.c.agent == agent,
                    readies.c.attempt == attempt,
                )
            ).first()
            if row is None or row.wave is not None or newest != attempt:
                return False
            phase = connection.execute(
                select(rounds.c.phase).where(rounds.c.number == round_number)
            ).scalar_one()
            if phase == RoundPhase.OPEN.value:
                return True
            return phase == RoundPhase.GATHERING.value and _may_retry(
                connection, round_number, agent
            )

    def wave(self, round_number: int, number: int) -> WaveRow:
        """A list by its number."""
        query = select(waves).where(waves.c.round == round_number, waves.c.number == number)
        with self._database.reading() as connection:
            return WaveRow(**connection.execute(query).one()._mapping)

    def n_waves(self, round_number: int) -> int:
        """How many lists a round has."""
        query = select(func.count()).where(waves.c.round == round_number)
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())


def require_gathering(connection: Connection, round_number: int, agent: bytes) -> None:
    """Refuse a READY that no list can take up.

    Raises:
        Refusal: `not-found`, `not-selected`, `round-closed` or `consumed`.
    """
    phase = connection.execute(
        select(rounds.c.phase).where(rounds.c.number == round_number)
    ).scalar_one_or_none()
    if phase is None:
        raise Refusal(ProblemType.NOT_FOUND, f"there is no round {round_number}")
    if has_confirmed(connection, round_number, agent):
        raise Refusal(
            ProblemType.CONSUMED, f"an update of this agent already counts in round {round_number}"
        )
    if phase == RoundPhase.OPEN.value:
        require_place(connection, round_number, agent)
        return
    if phase != RoundPhase.GATHERING.value or not _may_retry(connection, round_number, agent):
        raise Refusal(
            ProblemType.ROUND_CLOSED,
            f"round {round_number} is {phase} and takes no READY of this agent",
        )


def _may_retry(connection: Connection, round_number: int, agent: bytes) -> bool:
    """Whether an agent is a member of a failed cell that still waits for a second try."""
    query = (
        select(masked_cells.c.transcript)
        .join(cell_members, cell_members.c.transcript == masked_cells.c.transcript)
        .where(
            masked_cells.c.round == round_number,
            masked_cells.c.phase == CellPhase.FAILED.value,
            masked_cells.c.retried.is_(False),
            cell_members.c.agent == agent,
        )
    )
    return connection.execute(query).first() is not None


def _newest_attempts(connection: Connection, round_number: int) -> Sequence[tuple[bytes, int]]:
    query = (
        select(readies.c.agent, func.max(readies.c.attempt))
        .where(readies.c.round == round_number)
        .group_by(readies.c.agent)
    )
    return [(bytes(agent), int(attempt)) for agent, attempt in connection.execute(query)]


def _waiting(connection: Connection, round_number: int, seen_after: float) -> tuple[ReadyRow, ...]:
    newest = dict(_newest_attempts(connection, round_number))
    held = and_(
        selections.c.round == readies.c.round,
        selections.c.agent == readies.c.agent,
        selections.c.withdrawn_reason.is_(None),
    )
    query = (
        select(readies)
        .join(selections, held)
        .join(agents, agents.c.identity == readies.c.agent)
        .where(
            readies.c.round == round_number,
            readies.c.wave.is_(None),
            agents.c.revoked_at.is_(None),
            agents.c.last_seen >= seen_after,
        )
        .order_by(readies.c.agent)
    )
    found = [ReadyRow(**row._mapping) for row in connection.execute(query)]
    rows = [row for row in found if newest[bytes(row.agent)] == row.attempt]
    return tuple(sorted(rows, key=lambda row: row.agent))
