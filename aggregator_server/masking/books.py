"""The messages of live cells in memory: read from the journal, never written here."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aggregator_server.charter import MaskedTerms
from aggregator_server.phase import base_release
from aggregator_server.store.cells import identities_of
from aggregator_server.store.rows import CellMessageRow, MaskedCellRow, MessageKind
from aggregator_server.store.store import Store
from privacy.secagg.server import CellServer
from protocol.masked import Complaint, Confirm, MaskedHeader, Reveal, Roster, Shares
from protocol.signing import Signed
from protocol.wire import parse


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    book: CellServer | None = None
    last_message: int = 0


class Books:
    """The messages of live cells, as far as they have been read from the journal."""

    def __init__(self, store: Store, terms: MaskedTerms) -> None:
        self._store = store
        self._terms = terms
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}

    @contextmanager
    def of(self, row: MaskedCellRow) -> Iterator[CellServer]:
        """The book of a cell with all that is journalled; one holder at a time."""
        with self._lock:
            entry = self._entries.setdefault(row.transcript, _Entry())
        with entry.lock:
            yield self._read(entry, row)

    def forget(self, transcript: bytes) -> None:
        """Let go of a cell that is over."""
        with self._lock:
            self._entries.pop(transcript, None)

    def _read(self, entry: _Entry, row: MaskedCellRow) -> CellServer:
        if entry.book is None:
            plan = self._terms.turns.plan_at(base_release(self._store, row.round))
            entry.book = CellServer(
                parse(Signed[Roster], row.roster).body,
                body_n_bytes=plan.n_bytes,
                word_bits=plan.word_bits,
            )
        book = entry.book
        for message in self._store.cells.messages(row.transcript, after=entry.last_message):
            _add(book, message)
            entry.last_message = message.id
        if row.shared is not None:
            book.close_sharing(identities_of(row.shared))
            for upload in self._store.cells.uploads(row.transcript):
                if upload.agent not in book.uploads:
                    book.uploads[upload.agent] = parse(Signed[MaskedHeader], upload.header)
        if row.survivors is not None:
            book.close_uploading(identities_of(row.survivors))
        return book


def _add(book: CellServer, row: CellMessageRow) -> None:
    match row.kind:
        case MessageKind.SHARES:
            book.shares[row.agent] = parse(Shares, row.message)
        case MessageKind.COMPLAINT:
            book.complaints[row.agent, row.about] = parse(Signed[Complaint], row.message)
        case MessageKind.CONFIRM:
            book.confirms[row.agent] = parse(Confirm, row.message)
        case MessageKind.REVEAL:
            book.reveals[row.agent] = parse(Signed[Reveal], row.message)
