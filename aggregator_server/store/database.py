"""One database, SQLite or PostgreSQL, behind two verbs: `reading` and `writing`.

Guarantees:
    1. A `writing` block is one transaction: all of it is on disk when it returns, or none of it.
    2. Writers of all processes stand in one queue (`BEGIN IMMEDIATE`, or an advisory lock), so
       what a writer reads cannot change before it commits. This is the lock between closing a
       round and accepting an upload.
    3. A `reading` block sees one moment.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as NoConnectionError

from aggregator_server.errors import ConfigError, NoSpaceError, StoreBusyError

_BUSY_TIMEOUT_S: Final = 30.0
_CONNECT_TIMEOUT_S: Final = 10
_WRITE: Final = "sheepfold_write"
_DISK_FULL_SQLSTATES: Final = {"53100"}
_LOCK: Final = text("SELECT pg_advisory_xact_lock(hashtextextended(current_schema()::text, 7337))")


class Database:
    """Connections to one database.

    Args:
        url: `sqlite:///PATH` or `postgresql://…`; a password in it never appears in a message.

    Raises:
        ConfigError: Another kind of database, or not a URL.
    """

    def __init__(self, url: str) -> None:
        """Prepare to connect; nothing is opened yet."""
        try:
            parsed = make_url(url)
            kind = parsed.get_backend_name()
            if kind == "sqlite":
                engine = _sqlite_engine(url)
            elif kind == "postgresql":
                engine = _postgres_engine(parsed)
            else:
                msg = f"database {kind!r}: use sqlite:///PATH or postgresql://…"
                raise ConfigError(msg)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            msg = "database_url is not a URL that this server understands (sqlite or postgresql)"
            raise ConfigError(msg) from error
        self.engine = engine
        self._postgres = kind == "postgresql"
        snapshot: dict[str, Any] = {"isolation_level": "REPEATABLE READ"} if self._postgres else {}
        self._readers = engine.execution_options(**snapshot)
        self._writers = engine.execution_options(**{_WRITE: True})
        self._queue = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A read-only transaction that sees one moment.

        Raises:
            StoreBusyError: The database does not answer.
        """
        with _translated(), self._readers.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that no other writer overlaps; it commits at the end, or not at all.

        Raises:
            NoSpaceError: The disk is full; nothing was written.
            StoreBusyError: The database does not answer, or is locked for long.
        """
        # Waiting here, and not inside the database, takes no connection away from readers.
        if not self._queue.acquire(timeout=_BUSY_TIMEOUT_S):
            msg = "other writes have kept the database busy for long; nothing was stored"
            raise StoreBusyError(msg)
        try:
            with _translated(), self._writers.begin() as connection:
                if self._postgres:
                    connection.execute(_LOCK)
                yield connection
        finally:
            self._queue.release()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _postgres_engine(url: URL) -> Engine:
    timeout = (
        {}
        if "connect_timeout" in url.query
        else {"connect_args": {"connect_timeout": _CONNECT_TIMEOUT_S}}
    )
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        hide_parameters=True,
        pool_pre_ping=True,  # connections that a restart of the database has cut
        **timeout,
    )

    def on_connect(connection: Any, _record: object) -> None:  # noqa: ANN401 - any driver's own
        connection.autocommit = True
        connection.execute(f"SET lock_timeout = '{_BUSY_TIMEOUT_S:.0f}s'")
        connection.autocommit = False

    event.listen(engine, "connect", on_connect)
    return engine


def _sqlite_engine(url: str) -> Engine:
    engine = create_engine(url, connect_args={"timeout": _BUSY_TIMEOUT_S}, hide_parameters=True)

    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself; on_begin does
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    def on_begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    return engine


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        cause = error.orig
        if (
            getattr(cause, "sqlite_errorname", "") == "SQLITE_FULL"
            or getattr(cause, "sqlstate", None) in _DISK_FULL_SQLSTATES
        ):
            msg = "the database's disk is full; nothing was stored"
            raise NoSpaceError(msg) from error
        # SQLAlchemy's classes: a driver's own are subclasses with names of their own.
        if isinstance(error, (OperationalError, InterfaceError)):
            reason = str(cause).partition("\n")[0]
            msg = f"the database does not answer ({reason}); nothing was stored"
            raise StoreBusyError(msg) from error
        raise
    except NoConnectionError as error:
        msg = "all connections to the database are in use; nothing was stored"
        raise StoreBusyError(msg) from error
