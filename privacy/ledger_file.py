"""The file of the ledger: append-only tables in SQLite, for several processes, mode 0600.

What a row means is for `privacy.ledger` to say. This module opens the file or makes it, refuses
what is not a ledger or is damaged, and keeps every change in a transaction that survives a kill
and a power cut.
"""

import os
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from privacy.errors import LedgerError

SCHEMA_VERSION: Final = 1
APPLICATION_ID: Final = 0x53485044  # "SHPD" in the header of the file
KEY_BYTES: Final = 32
_RETRY_S: Final = 0.01

# Table -> when a row that is to be added would take the place of another. SQLite's `REPLACE`
# deletes without asking the triggers on DELETE, so it is stopped before it begins.
_TABLES: Final = {
    "secrets": "one = NEW.one",
    "records": "number = NEW.number OR digest = NEW.digest",
    "data_sets": "number = NEW.number OR id = NEW.id",
    "events": (
        "number = NEW.number OR (agent = NEW.agent AND federation = NEW.federation "
        "AND round = NEW.round AND attempt = NEW.attempt)"
    ),
    "budgets": "number = NEW.number",
}
_SCHEMA: Final = """
CREATE TABLE secrets (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    key BLOB NOT NULL
) STRICT;
CREATE TABLE records (
    number INTEGER PRIMARY KEY CHECK (number > 0),
    digest BLOB NOT NULL UNIQUE CHECK (length(digest) = 32)
) STRICT;
CREATE TABLE data_sets (
    number INTEGER PRIMARY KEY CHECK (number > 0),
    id BLOB NOT NULL UNIQUE CHECK (length(id) = 32),
    members BLOB NOT NULL,
    at REAL NOT NULL
) STRICT;
CREATE TABLE events (
    number INTEGER PRIMARY KEY CHECK (number > 0),
    agent BLOB NOT NULL,
    federation BLOB NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    data_set INTEGER NOT NULL,
    noise_multiplier REAL NOT NULL,
    sampling_probability REAL NOT NULL,
    n_steps INTEGER NOT NULL CHECK (n_steps >= 0),
    at REAL NOT NULL,
    epsilon REAL NOT NULL,
    delta REAL NOT NULL,
    UNIQUE (agent, federation, round, attempt)
) STRICT;
CREATE TABLE budgets (
    number INTEGER PRIMARY KEY CHECK (number > 0),
    epsilon REAL NOT NULL,
    delta REAL NOT NULL,
    at REAL NOT NULL
) STRICT;
"""
_GUARDS: Final = """
CREATE TRIGGER {table}_stay BEFORE UPDATE ON {table}
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END
CREATE TRIGGER {table}_remain BEFORE DELETE ON {table}
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END
CREATE TRIGGER {table}_are_not_replaced BEFORE INSERT ON {table}
WHEN EXISTS (SELECT 1 FROM {table} WHERE {taken})
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END
"""

RecordNumbers = NDArray[np.int64]
"""Numbers of records, ascending, none twice."""


class LedgerFile:
    """An open ledger.

    Guarantees:
        1. What a transaction wrote survives a kill and a power cut.
        2. No row is ever changed or removed: the file refuses SQL that would.

    Args:
        path: The file; made when missing, with its folders.
        busy_timeout_s: How long to wait while another process writes.

    Raises:
        LedgerError: Not a ledger, damaged, of a newer version, locked for too long, or it cannot be
            written. Every method may raise it.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float) -> None:
        """Open or make the file."""
        self.path = path.resolve()
        try:
            _make_private(self.path)
        except OSError as error:
            msg = f"the ledger {self.path} cannot be made or kept private: {error}"
            raise LedgerError(msg) from error
        with _explained(self.path):
            self.db = sqlite3.connect(self.path, isolation_level=None, timeout=busy_timeout_s)
            self.db.row_factory = sqlite3.Row
        try:
            self._inode = _inode(self.path)
            self.key = self._prepare(busy_timeout_s)
            """Of the records' digests."""
        except BaseException:
            self.db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def _prepare(self, busy_timeout_s: float) -> bytes:
        """Make what is missing, check the rest, and return the key."""
        with self.snapshot():
            is_new = self._version() == 0  # before anything is changed in a file of somebody else's
        with _explained(self.path):
            self._use_write_ahead_log(busy_timeout_s)
            self.db.execute("PRAGMA synchronous = FULL")
            if not is_new:
                (found,) = self.db.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    msg = f"the ledger {self.path} {_REASONS[sqlite3.SQLITE_CORRUPT]} ({found})"
                    raise LedgerError(msg)
        with self.transaction():
            if self._version() == 0:
                self._make_tables()
            (key,) = self.db.execute("SELECT key FROM secrets").fetchone()
        return bytes(key)

    def _use_write_ahead_log(self, busy_timeout_s: float) -> None:
        # SQLite does not wait here by itself when two processes make the ledger at once.
        give_up_at = time.monotonic() + busy_timeout_s
        while True:
            try:
                self.db.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                    raise
                time.sleep(_RETRY_S)
            else:
                return

    def _version(self) -> int:
        (application,) = self.db.execute("PRAGMA application_id").fetchone()
        (version,) = self.db.execute("PRAGMA user_version").fetchone()
        (n_things,) = self.db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if (application, version, n_things) == (0, 0, 0):
            return 0
        if application != APPLICATION_ID:
            msg = f"{self.path} is another program's SQLite file, not a ledger of privacy"
            raise LedgerError(msg)
        if version != SCHEMA_VERSION:
            msg = (
                f"the ledger {self.path} has version {version}; this agent knows "
                f"{SCHEMA_VERSION}. Use the agent that wrote it"
            )
            raise LedgerError(msg)
        return int(version)

    def _make_tables(self) -> None:
        for statement in _SCHEMA.split(";"):
            self.db.execute(statement)
        for table, taken in _TABLES.items():
            for guard in _GUARDS.split("CREATE ")[1:]:
                self.db.execute("CREATE " + guard.format(table=table, taken=taken))
        self.db.execute("INSERT INTO secrets VALUES (1, ?)", (os.urandom(KEY_BYTES),))
        self.db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self.db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
        """All that is written while the context is open, or nothing.

        Args:
            begin: SQLite's word for it.

        Raises:
            LedgerError: The file is gone, or SQLite refuses.
        """
        if _inode(self.path) != self._inode:  # else what is written would vanish with the old file
            msg = f"the ledger {self.path} was moved or deleted while in use; open it again"
            raise LedgerError(msg)
        with _explained(self.path):
            self.db.execute(begin)
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:  # SQLite undoes it itself after some errors
                    self.db.execute("ROLLBACK")
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read while the context is open is of one moment."""
        with self.transaction("BEGIN"):
            yield

    def rows(self, query: str) -> list[sqlite3.Row]:
        """All rows of a query without values."""
        return self.db.execute(query).fetchall()

    def one(self, query: str, *values: Any) -> sqlite3.Row | None:  # noqa: ANN401 - SQL values
        """The first row of a query, or None."""
        row: sqlite3.Row | None = self.db.execute(query, values).fetchone()
        return row


def packed(numbers: RecordNumbers) -> bytes:
    """Numbers of records in a few bytes where they follow each other, as new records do."""
    return zlib.compress(np.diff(numbers, prepend=0).astype("<u4").tobytes())


def unpacked(members: bytes) -> RecordNumbers:
    """The numbers that `packed` was given.

    Args:
        members: Its bytes.

    Raises:
        LedgerError: They are damaged.
    """
    try:
        gaps = np.frombuffer(zlib.decompress(members), "<u4")
    except (zlib.error, ValueError) as error:
        msg = f"the ledger is damaged: a data set's list of records cannot be read ({error})"
        raise LedgerError(msg) from error
    return np.cumsum(gaps, dtype=np.int64)


def _make_private(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        # Only a file that nobody has yet: closing another descriptor of an SQLite file would drop
        # the locks that this process holds on it.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    if path.is_file():
        path.chmod(0o600)


def _inode(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return found.st_dev, found.st_ino


_REASONS: Final = {
    sqlite3.SQLITE_BUSY: "is in use by another process that does not finish; is one hanging?",
    sqlite3.SQLITE_NOTADB: "is not a ledger of privacy",
    sqlite3.SQLITE_CORRUPT: "is damaged; a fresh one, or an older copy, forgets what was spent",
    sqlite3.SQLITE_READONLY: "cannot be written",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_IOERR: "cannot be read or written",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full",
}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)  # missing where sqlite3 itself complains
        reason = _REASONS.get(-1 if code is None else code & 0xFF, "refused what was asked")
        msg = f"the ledger {path} {reason} ({error})"
        raise LedgerError(msg) from error
