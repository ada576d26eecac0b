"""The cells of masked rounds, what their members send, and their sums."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import Connection, and_, exists, insert, select, update

from aggregator_server.errors import Refusal, StaleWriteError
from aggregator_server.store import counters
from aggregator_server.store.counters import Counter
from aggregator_server.store.database import Database
from aggregator_server.store.rounds import require_phase
from aggregator_server.store.rows import (
    CellMemberRow,
    CellMessageRow,
    CellRow,
    MaskedCellRow,
    MessageKind,
    UploadPhase,
    UploadProgress,
    UploadRow,
)
from aggregator_server.store.schema import (
    cell_members,
    cell_messages,
    cells,
    masked_cells,
    rounds,
    uploads,
)
from aggregator_server.store.uploads import add_cell, upload_of, uploads_of
from protocol.phases import CellPhase, RoundPhase
from protocol.problems import ProblemType
from protocol.wire import b64u_decode, b64u_encode

OVER = frozenset({CellPhase.UNMASKED, CellPhase.FAILED})
"""The phases of a cell that nothing leaves."""


class CellStore:
    """The tables of cells.

    Guarantees:
        1. A message is accepted only in the phases of its cell that the caller names, once.
        2. The survivors of a cell are exactly those whose upload is accepted when it moves on.
        3. A cell has one sum at most.
    """

    def __init__(self, database: Database) -> None:
        """Wrap a database."""
        self._database = database

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

    def give_up(self, transcript: bytes) -> None:
        """Note that a failed cell is not tried again."""
        with self._database.writing() as connection:
            set_retried(connection, transcript)
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


def set_retried(connection: Connection, transcript: bytes) -> None:
    """Note that nobody of a failed cell may try again."""
    _update(connection, transcript, {"retried": True})


def cell_values(row: MaskedCellRow) -> dict[str, object]:
    """The columns of a cell."""
    return {**dataclasses.asdict(row), "phase": row.phase.value}


def identities_of(text: str) -> tuple[bytes, ...]:
    """The identities of a journalled array."""
    return tuple(b64u_decode(name, n_bytes=32) for name in json.loads(text))


def _identities_json(identities: Sequence[bytes]) -> str:
    return json.dumps([b64u_encode(identity) for identity in identities])


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


def _update(connection: Connection, transcript: bytes, values: Mapping[str, object]) -> None:
    connection.execute(
        update(masked_cells).where(masked_cells.c.transcript == transcript).values(**values)
    )


def _cell(values: object) -> MaskedCellRow:
    row = dict(values)  # type: ignore[call-overload]  # a row mapping
    return MaskedCellRow(**{**row, "phase": CellPhase(row["phase"])})
