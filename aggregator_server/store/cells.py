"""READY messages, the cells that they become, and what the members of a cell send."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import Connection, and_, exists, func, insert, select, update

from aggregator_server.errors import Refusal, StaleWriteError
from aggregator_server.store import counters
from aggregator_server.store.counters import Counter
from aggregator_server.store.database import Database
from aggregator_server.store.rounds import require_phase, set_phase
from aggregator_server.store.rows import (
    CellMemberRow,
    CellMessageRow,
    CellRow,
    MaskedCellRow,
    MessageKind,
    ReadyRow,
    UploadPhase,
    UploadProgress,
    UploadRow,
    WaveRow,
)
from aggregator_server.store.schema import (
    agents,
    cell_members,
    cell_messages,
    cells,
    masked_cells,
    readies,
    rounds,
    selections,
    uploads,
    waves,
)
from aggregator_server.store.uploads import add_cell, require_place, upload_of, uploads_of
from protocol.limits import MAX_READY_ATTEMPTS
from protocol.phases import CellPhase, RoundPhase
from protocol.problems import ProblemType
from protocol.wire import b64u_decode, b64u_encode

OVER = frozenset({CellPhase.UNMASKED, CellPhase.FAILED})
"""The phases of a cell that nothing leaves."""


class CellStore:
    """The tables of masked rounds.

    Guarantees:
        1. An identity has one READY that counts, the one of its highest attempt.
        2. A READY stands in one list, and a list's cells are journalled with it.
        3. A message is accepted only in the phases of its cell that the caller names, once.
        4. Nobody whose CONFIRM was journalled is in another cell of the round.
    """

    def __init__(self, database: Database) -> None:
        """Wrap a database."""
        self._database = database

    # READY

    def add_ready(self, row: ReadyRow) -> None:
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
            connection.execute(insert(masked_cells), [_cell_values(row) for row in formed])
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
                _set_retried(connection, retry_of)
            counters.add(connection, Counter.CHANGES)

    def give_up(self, transcript: bytes) -> None:
        """Note that a failed cell is not tried again."""
        with self._database.writing() as connection:
            _set_retried(connection, transcript)
            counters.add(connection, Counter.CHANGES)

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

    # Cells

    def get(self, transcript: bytes) -> MaskedCellRow | None:
        """A cell by its transcript."""
        with self._database.reading() as connection:
            return _get(connection, transcript)

    def of_round(self, round_number: int) -> tuple[MaskedCellRow, ...]:
        """The cells of a round, in the order in which they were formed."""
        query = (
            select(masked_cells)
            .where(masked_cells.c.round == round_number)
            .order_by(masked_cells.c.wave, masked_cells.c.number)
        )
        with self._database.reading() as connection:
            return tuple(_cell(row._mapping) for row in connection.execute(query))

    def of_attempt(self, round_number: int, agent: bytes, attempt: int) -> MaskedCellRow | None:
        """The cell of a READY; None while it has none."""
        where = (
            cell_members.c.round == round_number,
            cell_members.c.agent == agent,
            cell_members.c.attempt == attempt,
        )
        query = (
            select(masked_cells)
            .join(cell_members, cell_members.c.transcript == masked_cells.c.transcript)
            .where(*where)
        )
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            return None if row is None else _cell(row._mapping)

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

    def member(self, transcript: bytes, agent: bytes) -> CellMemberRow | None:
        """A member of a cell, or None."""
        query = select(cell_members).where(
            cell_members.c.transcript == transcript, cell_members.c.agent == agent
        )
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            return None if row is None else CellMemberRow(**row._mapping)

    def members(self, transcript: bytes) -> tuple[CellMemberRow, ...]:
        """The members of a cell."""
        query = select(cell_members).where(cell_members.c.transcript == transcript)
        with self._database.reading() as connection:
            return tuple(CellMemberRow(**row._mapping) for row in connection.execute(query))

    def add_message(
        self,
        transcript: bytes,
        agent: bytes,
        kind: MessageKind,
        *,
        about: bytes = b"",
        message: bytes,
        digest: bytes,
        phases: Collection[CellPhase],
    ) -> None:
        """Journal a member's message; again changes nothing.

        Args:
            transcript: The cell.
            agent: Who sends it.
            kind: What it is.
            about: The dealer that a complaint is about.
            message: Its bytes.
            digest: Of the whole message.
            phases: In which the cell takes it.

        Raises:
            Refusal: Another message of this kind was journalled (`conflict`), the cell has gone on
                (`stage-closed`), or the round has (`round-closed`).
        """
        with self._database.writing() as connection:
            known = connection.execute(
                select(cell_messages.c.digest).where(
                    cell_messages.c.transcript == transcript,
                    cell_messages.c.agent == agent,
                    cell_messages.c.kind == kind.value,
                    cell_messages.c.about == about,
                )
            ).first()
            if known is not None:
                if bytes(known.digest) != digest:
                    raise Refusal(ProblemType.CONFLICT, f"another {kind.value} message came before")
                return
            require_stage(connection, transcript, phases)
            connection.execute(
                insert(cell_messages).values(
                    transcript=transcript,
                    agent=agent,
                    kind=kind.value,
                    about=about,
                    message=message,
                    digest=digest,
                )
            )

    def messages(self, transcript: bytes, *, after: int = 0) -> tuple[CellMessageRow, ...]:
        """The messages of a cell that were journalled after one, oldest first."""
        query = (
            select(cell_messages)
            .where(cell_messages.c.transcript == transcript, cell_messages.c.id > after)
            .order_by(cell_messages.c.id)
        )
        with self._database.reading() as connection:
            return tuple(
                CellMessageRow(**{**row._mapping, "kind": MessageKind(row.kind)})
                for row in connection.execute(query)
            )

    def uploads(self, transcript: bytes) -> tuple[UploadRow, ...]:
        """The accepted uploads of a cell, by ascending identity."""
        query = (
            select(uploads)
            .where(
                uploads.c.transcript == transcript,
                uploads.c.phase == UploadPhase.ACCEPTED.value,
            )
            .order_by(uploads.c.agent)
        )
        with self._database.reading() as connection:
            return tuple(upload_of(row._mapping) for row in connection.execute(query))

    def confirmers(self, transcript: bytes) -> frozenset[bytes]:
        """The members of a cell who signed CONFIRM."""
        query = select(cell_messages.c.agent).where(
            cell_messages.c.transcript == transcript,
            cell_messages.c.kind == MessageKind.CONFIRM.value,
        )
        with self._database.reading() as connection:
            return frozenset(bytes(agent) for agent in connection.execute(query).scalars())

    def receiving(self, transcript: bytes, round_number: int) -> tuple[UploadProgress, ...]:
        """The uploads of a cell that are under way."""
        with self._database.reading() as connection:
            under_way = {
                bytes(agent)
                for agent in connection.execute(
                    select(uploads.c.agent).where(
                        uploads.c.transcript == transcript,
                        uploads.c.phase == UploadPhase.RECEIVING.value,
                    )
                ).scalars()
            }
            return tuple(
                progress
                for agent, phase, progress in uploads_of(connection, round_number)
                if phase is UploadPhase.RECEIVING and agent in under_way
            )

    def move(
        self,
        transcript: bytes,
        *,
        seen: CellPhase,
        to: CellPhase,
        now: float,
        shared: Sequence[bytes] | None = None,
        survivors: Sequence[bytes] | None = None,
    ) -> None:
        """Journal the next stage of a cell.

        Args:
            transcript: The cell.
            seen: The phase that the caller saw.
            to: The phase that follows by the transition table.
            now: When the stage begins.
            shared: U2, when sharing ends.
            survivors: U3, when uploading ends: exactly those whose upload is accepted now.

        Raises:
            StaleWriteError: The phase has changed, or another upload was accepted meanwhile.
        """
        values: dict[str, object] = {"phase": to.value, "stage_at": now}
        with self._database.writing() as connection:
            _require_cell_phase(connection, transcript, seen)
            if shared is not None:
                values["shared"] = _identities_json(shared)
            if survivors is not None:
                query = select(uploads.c.agent).where(
                    uploads.c.transcript == transcript,
                    uploads.c.phase == UploadPhase.ACCEPTED.value,
                )
                found = {bytes(agent) for agent in connection.execute(query).scalars()}
                if found != set(survivors):
                    msg = "another upload was accepted meanwhile"
                    raise StaleWriteError(msg)
                values["survivors"] = _identities_json(survivors)
                _end_uploads(connection, transcript, UploadPhase.RECEIVING)
            _update(connection, transcript, values)
            counters.add(connection, Counter.CHANGES)

    def fail(
        self,
        transcript: bytes,
        *,
        seen: CellPhase,
        failed: bytes,
        retried: bool,
        now: float,
    ) -> None:
        """Journal that a cell failed; its vectors are to be deleted.

        Args:
            transcript: The cell.
            seen: The phase that the caller saw.
            failed: Canonical JSON of the `Signed[Failed]`.
            retried: True where nobody may try again.
            now: From when on the members' new READY messages are waited for.

        Raises:
            StaleWriteError: The phase has changed.
        """
        with self._database.writing() as connection:
            _require_cell_phase(connection, transcript, seen)
            _end_uploads(connection, transcript, UploadPhase.RECEIVING, UploadPhase.ACCEPTED)
            values = {
                "phase": CellPhase.FAILED.value,
                "failed": failed,
                "retried": retried,
                "stage_at": now,
            }
            _update(connection, transcript, values)
            counters.add(connection, Counter.CHANGES)

    def finish(self, row: CellRow) -> None:
        """Journal the sum of a cell, whose bytes are stored.

        Raises:
            StaleWriteError: The cell is no longer revealing.
        """
        with self._database.writing() as connection:
            _require_cell_phase(connection, row.transcript, CellPhase.REVEALING)
            add_cell(connection, row)
            _update(connection, row.transcript, {"phase": CellPhase.UNMASKED.value})
            counters.add(connection, Counter.CHANGES)

    def add_sums(self, round_number: int, rows: Sequence[CellRow]) -> None:
        """Journal the sums of a round under helper masks, all of them or none; again changes none.

        Raises:
            StaleWriteError: The round has moved on.
        """
        with self._database.writing() as connection:
            require_phase(connection, round_number, RoundPhase.GATHERING)
            known = select(cells.c.transcript).where(cells.c.round == round_number)
            there = {bytes(found) for found in connection.execute(known).scalars()}
            for row in rows:
                if row.transcript not in there:
                    add_cell(connection, row)

    def deletable_sums(self) -> tuple[bytes, ...]:
        """The cells whose sum nobody needs any more: their round is over."""
        over = exists().where(
            and_(
                rounds.c.number == cells.c.round,
                rounds.c.phase.in_([RoundPhase.PUBLISHED.value, RoundPhase.FAILED.value]),
            )
        )
        query = select(cells.c.transcript).where(cells.c.has_sum.is_(True), over)
        with self._database.reading() as connection:
            return tuple(bytes(value) for value in connection.execute(query).scalars())

    def sum_deleted(self, transcript: bytes) -> None:
        """Journal that the bytes of a sum are gone."""
        with self._database.writing() as connection:
            connection.execute(
                update(cells).where(cells.c.transcript == transcript).values(has_sum=False)
            )


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


def require_stage(connection: Connection, transcript: bytes, phases: Collection[CellPhase]) -> None:
    """Refuse what a cell no longer takes.

    Raises:
        Refusal: `not-found`, `round-closed` or `stage-closed`.
    """
    row = _get(connection, transcript)
    if row is None:
        raise Refusal(ProblemType.NOT_FOUND, "there is no such cell")
    phase = connection.execute(
        select(rounds.c.phase).where(rounds.c.number == row.round)
    ).scalar_one()
    if phase != RoundPhase.GATHERING.value:
        raise Refusal(ProblemType.ROUND_CLOSED, f"round {row.round} is {phase}")
    if row.phase not in phases:
        raise Refusal(ProblemType.STAGE_CLOSED, f"the cell is {row.phase.value}")


def has_confirmed(connection: Connection, round_number: int, agent: bytes) -> bool:
    """Whether an agent signed CONFIRM in a round: its update is consumed."""
    query = (
        select(cell_messages.c.id)
        .join(masked_cells, masked_cells.c.transcript == cell_messages.c.transcript)
        .where(
            masked_cells.c.round == round_number,
            cell_messages.c.agent == agent,
            cell_messages.c.kind == MessageKind.CONFIRM.value,
        )
    )
    return connection.execute(query).first() is not None


def identities_of(text: str) -> tuple[bytes, ...]:
    """The identities of a journalled array."""
    return tuple(b64u_decode(name, n_bytes=32) for name in json.loads(text))


def _identities_json(identities: Sequence[bytes]) -> str:
    return json.dumps([b64u_encode(identity) for identity in identities])


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


def _get(connection: Connection, transcript: bytes) -> MaskedCellRow | None:
    query = select(masked_cells).where(masked_cells.c.transcript == transcript)
    row = connection.execute(query).first()
    return None if row is None else _cell(row._mapping)


def _require_cell_phase(connection: Connection, transcript: bytes, seen: CellPhase) -> None:
    row = _get(connection, transcript)
    if row is None or row.phase is not seen:
        msg = f"the cell is no longer {seen.value}"
        raise StaleWriteError(msg)
    require_phase(connection, row.round, RoundPhase.GATHERING)


def _end_uploads(connection: Connection, transcript: bytes, *phases: UploadPhase) -> None:
    connection.execute(
        update(uploads)
        .where(
            uploads.c.transcript == transcript,
            uploads.c.phase.in_([phase.value for phase in phases]),
        )
        .values(phase=UploadPhase.ENDED.value)
    )


def _set_retried(connection: Connection, transcript: bytes) -> None:
    _update(connection, transcript, {"retried": True})


def _update(connection: Connection, transcript: bytes, values: Mapping[str, object]) -> None:
    connection.execute(
        update(masked_cells).where(masked_cells.c.transcript == transcript).values(**values)
    )


def _cell(values: object) -> MaskedCellRow:
    row = dict(values)  # type: ignore[call-overload]  # a row mapping
    return MaskedCellRow(**{**row, "phase": CellPhase(row["phase"])})


def _cell_values(row: MaskedCellRow) -> dict[str, object]:
    return {**dataclasses.asdict(row), "phase": row.phase.value}
