"""Uploads, their parts and the cells they become."""

import dataclasses
from collections.abc import Iterator

from sqlalchemy import Connection, and_, delete, exists, func, insert, or_, select, update

from aggregator_server.errors import Refusal
from aggregator_server.store import counters
from aggregator_server.store.counters import Counter
from aggregator_server.store.database import Database
from aggregator_server.store.rows import (
    CellRow,
    NewUpload,
    PartRow,
    UploadPhase,
    UploadProgress,
    UploadRow,
)
from aggregator_server.store.schema import (
    cells,
    masked_cells,
    parts,
    rounds,
    selections,
    uploads,
)
from protocol.phases import CellPhase, RoundPhase
from protocol.problems import ProblemType

_TERMINAL = (str(RoundPhase.PUBLISHED), str(RoundPhase.FAILED))


class UploadStore:
    """The tables of uploads, parts and cells.

    Guarantees:
        1. At most one upload of an agent is accepted in a round.
        2. An upload is accepted only while its round is open, in one transaction with its cell.
    """

    def __init__(self, database: Database) -> None:
        """Wrap a database."""
        self._database = database

    def find(self, round_number: int, agent: bytes, attempt: int) -> UploadRow | None:
        """An upload by its idempotency key."""
        with self._database.reading() as connection:
            return _find(connection, round_number, agent, attempt)

    def begin(self, new: NewUpload) -> UploadRow:
        """Journal the head of an upload; an earlier, incomplete attempt ends here.

        Args:
            new: The upload, whose signature and contents the caller has checked.

        Returns:
            The upload; the stored one when the same head was journalled before.

        Raises:
            Refusal: Another head for this attempt (`conflict`), an older attempt than the newest
                (`conflict`), no such round, a closed round, no place in it, an update already
                accepted (`consumed`), or a masked cell that takes no uploads (`stage-closed`).
        """
        with self._database.writing() as connection:
            known = _find(connection, new.round, new.agent, new.attempt)
            if known is not None:
                if known.digest != new.digest:
                    raise Refusal(
                        ProblemType.CONFLICT,
                        f"attempt {new.attempt} of round {new.round} has another header; "
                        "raise the attempt for a new one",
                    )
                return known
            if new.transcript is None:
                require_open(connection, new.round)
                require_place(connection, new.round, new.agent)
            else:
                require_uploading(connection, new.transcript)
            _require_newest(connection, new)
            connection.execute(
                update(uploads)
                .where(
                    uploads.c.round == new.round,
                    uploads.c.agent == new.agent,
                    uploads.c.phase == UploadPhase.RECEIVING.value,
                )
                .values(phase=UploadPhase.REPLACED.value)
            )
            connection.execute(
                insert(uploads).values(
                    round=new.round,
                    agent=new.agent,
                    attempt=new.attempt,
                    transcript=new.transcript,
                    header=new.header,
                    digest=new.digest,
                    weight=new.weight,
                    n_bytes=new.n_bytes,
                    phase=UploadPhase.RECEIVING.value,
                    has_bytes=True,
                    started_at=new.started_at,
                )
            )
            row = _find(connection, new.round, new.agent, new.attempt)
            if row is None:  # cannot be: it was inserted in this very transaction
                raise Refusal(ProblemType.INTERNAL, "the upload was not journalled")
            return row

    def parts(self, upload: int) -> tuple[PartRow, ...]:
        """The journalled parts of an upload, ascending."""
        with self._database.reading() as connection:
            return _parts(connection, upload)

    def add_part(self, part: PartRow) -> UploadRow:
        """Journal a part whose bytes are on disk.

        Returns:
            The upload; unchanged when the same part was journalled before.

        Raises:
            Refusal: Another body for this part (`conflict`), or the upload takes no more parts.
        """
        with self._database.writing() as connection:
            upload = _by_id(connection, part.upload)
            known = connection.execute(
                select(parts.c.sha256).where(parts.c.upload == part.upload, parts.c.n == part.n)
            ).first()
            if known is not None:
                if bytes(known.sha256) != part.sha256:
                    raise Refusal(
                        ProblemType.CONFLICT,
                        f"part {part.n} of attempt {upload.attempt} has another body",
                    )
                return upload
            require_receiving(connection, upload)
            connection.execute(
                insert(parts).values(
                    upload=part.upload, n=part.n, sha256=part.sha256, n_bytes=part.n_bytes
                )
            )
            counters.add(connection, Counter.BYTES_UP, part.n_bytes)
            return upload

    def accept(self, upload: int, cell: CellRow | None, *, now: float) -> UploadRow:
        """Accept an upload whose body was verified, with its cell of one.

        Args:
            upload: Which one.
            cell: None for a masked update, whose cell is summed later.
            now: Seconds since the Unix epoch.

        Returns:
            The accepted upload; the stored one when it was accepted before.

        Raises:
            Refusal: The round has closed, the upload ended, or another one was accepted.
        """
        with self._database.writing() as connection:
            row = _by_id(connection, upload)
            if row.phase is UploadPhase.ACCEPTED:
                return row
            require_receiving(connection, row)
            if row.transcript is None:
                require_place(connection, row.round, row.agent)
            connection.execute(
                update(uploads)
                .where(uploads.c.id == upload)
                .values(phase=UploadPhase.ACCEPTED.value, accepted_at=now)
            )
            if cell is not None:
                add_cell(connection, cell)
            return _by_id(connection, upload)

    def refuse(self, upload: int) -> None:
        """End a complete upload that cannot be used; its bytes are to be deleted."""
        with self._database.writing() as connection:
            connection.execute(
                update(uploads)
                .where(uploads.c.id == upload, uploads.c.phase == UploadPhase.RECEIVING.value)
                .values(phase=UploadPhase.REFUSED.value)
            )

    def reset(self, upload: int) -> tuple[PartRow, ...]:
        """Forget the parts of an upload under way, so that they are sent again.

        Returns:
            The parts that are now to be deleted.
        """
        with self._database.writing() as connection:
            if _by_id(connection, upload).phase is not UploadPhase.RECEIVING:
                return ()
            forgotten = _parts(connection, upload)
            connection.execute(delete(parts).where(parts.c.upload == upload))
            return forgotten

    def cells(self, round_number: int) -> tuple[CellRow, ...]:
        """The unmasked cells of a round, by ascending transcript."""
        query = (
            select(cells)
            .where(cells.c.round == round_number, cells.c.phase == CellPhase.UNMASKED.value)
            .order_by(cells.c.transcript)
        )
        with self._database.reading() as connection:
            return tuple(_cell(row._mapping) for row in connection.execute(query))

    def accepted(self, round_number: int) -> tuple[UploadRow, ...]:
        """The accepted uploads of a round, by ascending identity."""
        query = (
            select(uploads)
            .where(uploads.c.round == round_number, uploads.c.phase == UploadPhase.ACCEPTED.value)
            .order_by(uploads.c.agent)
        )
        with self._database.reading() as connection:
            rows = [upload_of(row._mapping) for row in connection.execute(query)]
        return tuple(sorted(rows, key=lambda row: row.agent))

    def get(self, upload: int) -> UploadRow:
        """An upload by its number."""
        with self._database.reading() as connection:
            return _by_id(connection, upload)

    def deletable(self, *, keep_accepted: bool) -> tuple[UploadRow, ...]:
        """The uploads whose bytes nobody needs any more.

        Args:
            keep_accepted: Whether accepted updates are kept after their round.
        """
        over = exists().where(rounds.c.number == uploads.c.round, rounds.c.phase.in_(_TERMINAL))
        dead = uploads.c.phase.in_(
            [
                phase.value
                for phase in (UploadPhase.REPLACED, UploadPhase.REFUSED, UploadPhase.ENDED)
            ]
        )
        used = and_(uploads.c.phase == UploadPhase.ACCEPTED.value, over)
        # A masked vector serves its cell's sum and nothing else, so it is never kept.
        summed = exists().where(
            masked_cells.c.transcript == uploads.c.transcript,
            masked_cells.c.phase.in_([CellPhase.UNMASKED.value, CellPhase.FAILED.value]),
        )
        served = and_(uploads.c.weight == 0, or_(summed, over))
        which = or_(dead, served) if keep_accepted else or_(dead, served, used)
        query = select(uploads).where(uploads.c.has_bytes.is_(True), which).order_by(uploads.c.id)
        with self._database.reading() as connection:
            return tuple(upload_of(row._mapping) for row in connection.execute(query))

    def with_bytes(self) -> frozenset[int]:
        """The uploads whose bytes are not deleted yet."""
        query = select(uploads.c.id).where(uploads.c.has_bytes.is_(True))
        with self._database.reading() as connection:
            return frozenset(connection.execute(query).scalars())

    def deleted(self, upload: int) -> None:
        """Journal that the bytes of an upload are gone."""
        with self._database.writing() as connection:
            connection.execute(delete(parts).where(parts.c.upload == upload))
            connection.execute(
                update(uploads).where(uploads.c.id == upload).values(has_bytes=False)
            )


def require_open(connection: Connection, round_number: int) -> None:
    """Refuse when a round is not known or does not take uploads.

    Raises:
        Refusal: `not-found` or `round-closed`.
    """
    phase = connection.execute(
        select(rounds.c.phase).where(rounds.c.number == round_number)
    ).scalar_one_or_none()
    if phase is None:
        raise Refusal(ProblemType.NOT_FOUND, f"there is no round {round_number}")
    if phase != RoundPhase.OPEN.value:
        raise Refusal(
            ProblemType.ROUND_CLOSED, f"round {round_number} is {phase}; poll for the next task"
        )


def require_place(connection: Connection, round_number: int, agent: bytes) -> None:
    """Refuse an agent that holds no place in a round, or whose update was accepted.

    Raises:
        Refusal: `not-selected` or `consumed`.
    """
    row = connection.execute(
        select(selections.c.withdrawn_reason).where(
            selections.c.round == round_number, selections.c.agent == agent
        )
    ).first()
    if row is None:
        raise Refusal(ProblemType.NOT_SELECTED, f"not selected in round {round_number}")
    if has_accepted(connection, round_number, agent):
        raise Refusal(
            ProblemType.CONSUMED, f"round {round_number} already has an update of this agent"
        )
    if row.withdrawn_reason is not None:
        raise Refusal(
            ProblemType.NOT_SELECTED, f"withdrawn from round {round_number}: {row.withdrawn_reason}"
        )


def require_receiving(connection: Connection, upload: UploadRow) -> None:
    """Refuse an upload that takes no more bytes.

    Raises:
        Refusal: For what it has become.
    """
    refuse_ended(upload)
    if upload.phase is UploadPhase.ACCEPTED:
        raise Refusal(
            ProblemType.CONSUMED, f"attempt {upload.attempt} of round {upload.round} is complete"
        )
    if upload.transcript is None:
        require_open(connection, upload.round)
    else:
        require_uploading(connection, upload.transcript)


def require_uploading(connection: Connection, transcript: bytes) -> None:
    """Refuse a masked update that its cell no longer takes.

    Raises:
        Refusal: `round-closed` or `stage-closed`.
    """
    phase, round_phase = connection.execute(
        select(masked_cells.c.phase, rounds.c.phase)
        .join(rounds, rounds.c.number == masked_cells.c.round)
        .where(masked_cells.c.transcript == transcript)
    ).one()
    if round_phase != RoundPhase.GATHERING.value:
        raise Refusal(ProblemType.ROUND_CLOSED, f"the cell's round is {round_phase}")
    if phase != CellPhase.UPLOADING.value:
        raise Refusal(ProblemType.STAGE_CLOSED, f"the cell is {phase} and takes no uploads")


def add_cell(connection: Connection, cell: CellRow) -> None:
    """Journal a cell whose sum is known, inside the caller's transaction."""
    values = {
        **dataclasses.asdict(cell),
        "phase": cell.phase.value,
        "has_sum": cell.sum_sha256 is not None,
    }
    connection.execute(insert(cells).values(**values))


def refuse_ended(upload: UploadRow) -> None:
    """Refuse an upload that ended without being accepted.

    Raises:
        Refusal: `not-finite`, `round-closed` or `conflict`.
    """
    where = f"attempt {upload.attempt} of round {upload.round}"
    if upload.phase is UploadPhase.REFUSED:
        raise Refusal(ProblemType.NOT_FINITE, f"{where} has values that are not finite")
    if upload.phase is UploadPhase.ENDED:
        problem = (
            ProblemType.ROUND_CLOSED if upload.transcript is None else ProblemType.STAGE_CLOSED
        )
        raise Refusal(problem, f"{where} was incomplete when it ended")
    if upload.phase is UploadPhase.REPLACED:
        raise Refusal(ProblemType.CONFLICT, f"{where} was replaced by a newer attempt")


def has_accepted(connection: Connection, round_number: int, agent: bytes) -> bool:
    """Whether an update of an agent was accepted in a round."""
    query = select(uploads.c.id).where(
        uploads.c.round == round_number,
        uploads.c.agent == agent,
        uploads.c.phase == UploadPhase.ACCEPTED.value,
    )
    return connection.execute(query).first() is not None


def end_uploads(connection: Connection, round_number: int, agent: bytes | None = None) -> None:
    """End the incomplete uploads of a round, or of one agent; their bytes are to be deleted."""
    where = [uploads.c.round == round_number, uploads.c.phase == UploadPhase.RECEIVING.value]
    if agent is not None:
        where.append(uploads.c.agent == agent)
    connection.execute(update(uploads).where(*where).values(phase=UploadPhase.ENDED.value))


def free_places(connection: Connection, agent: bytes, *, reason: str) -> None:
    """Free the place of an agent in the open round, unless its update was accepted."""
    open_rounds = select(rounds.c.number).where(rounds.c.phase == RoundPhase.OPEN.value)
    for number in connection.execute(open_rounds).scalars().all():
        if has_accepted(connection, number, agent):
            continue
        connection.execute(
            update(selections)
            .where(
                selections.c.round == number,
                selections.c.agent == agent,
                selections.c.withdrawn_reason.is_(None),
            )
            .values(withdrawn_reason=reason)
        )
        end_uploads(connection, number, agent)


def uploads_of(
    connection: Connection, round_number: int
) -> Iterator[tuple[bytes, UploadPhase, UploadProgress]]:
    """The uploads of a round: whose, where it stands, how far it has come.

    Parts are looked up for what is still on its way alone: this is asked every second.
    """
    arriving = and_(parts.c.upload == uploads.c.id, uploads.c.phase == UploadPhase.RECEIVING.value)
    shown = (uploads.c.agent, uploads.c.phase, uploads.c.started_at, uploads.c.n_bytes)
    query = (
        select(*shown, func.coalesce(func.sum(parts.c.n_bytes), 0).label("n_received"))
        .outerjoin(parts, arriving)
        .where(uploads.c.round == round_number)
        .group_by(uploads.c.id, *shown)
    )
    for row in connection.execute(query):
        phase = UploadPhase(row.phase)
        accepted = phase is UploadPhase.ACCEPTED
        progress = UploadProgress(
            started_at=row.started_at,
            n_bytes=row.n_bytes,
            n_bytes_received=row.n_bytes if accepted else int(row.n_received),
        )
        yield bytes(row.agent), phase, progress


def _require_newest(connection: Connection, new: NewUpload) -> None:
    newest = connection.execute(
        select(func.max(uploads.c.attempt)).where(
            uploads.c.round == new.round, uploads.c.agent == new.agent
        )
    ).scalar_one()
    if newest is not None and newest > new.attempt:
        raise Refusal(
            ProblemType.CONFLICT, f"attempt {newest} has begun; attempt {new.attempt} is over"
        )


def _find(
    connection: Connection, round_number: int, agent: bytes, attempt: int
) -> UploadRow | None:
    query = select(uploads).where(
        uploads.c.round == round_number, uploads.c.agent == agent, uploads.c.attempt == attempt
    )
    row = connection.execute(query).first()
    return None if row is None else upload_of(row._mapping)


def _by_id(connection: Connection, upload: int) -> UploadRow:
    return upload_of(
        connection.execute(select(uploads).where(uploads.c.id == upload)).one()._mapping
    )


def _parts(connection: Connection, upload: int) -> tuple[PartRow, ...]:
    query = select(parts).where(parts.c.upload == upload).order_by(parts.c.n)
    return tuple(PartRow(**row._mapping) for row in connection.execute(query))


def upload_of(values: object) -> UploadRow:
    """An upload from a row of its table."""
    row = dict(values)  # type: ignore[call-overload]  # a row mapping
    return UploadRow(**{**row, "phase": UploadPhase(row["phase"])})


def _cell(values: object) -> CellRow:
    row = dict(values)  # type: ignore[call-overload]  # a row mapping
    del row["has_sum"]  # of the bytes, not of the cell
    return CellRow(**{**row, "phase": CellPhase(row["phase"])})
