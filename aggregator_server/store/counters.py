"""Counters that outlive a restart."""

from enum import StrEnum

from sqlalchemy import Connection, insert, select, update

from aggregator_server.store.schema import counters


class Counter(StrEnum):
    """What is counted."""

    BYTES_UP = "bytes-up"
    BYTES_DOWN = "bytes-down"
    CHANGES = "changes"
    """Raised with every write that may give an agent that waits something to do."""


def create_counters(connection: Connection) -> None:
    """Begin all counters at zero."""
    connection.execute(insert(counters), [{"name": str(name), "value": 0} for name in Counter])


def add(connection: Connection, counter: Counter, n: int = 1) -> None:
    """Add `n` to a counter, inside the caller's transaction."""
    connection.execute(
        update(counters).where(counters.c.name == str(counter)).values(value=counters.c.value + n)
    )


def read(connection: Connection, counter: Counter) -> int:
    """The value of a counter."""
    query = select(counters.c.value).where(counters.c.name == str(counter))
    return int(connection.execute(query).scalar_one())
