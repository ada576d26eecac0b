"""What the operator should know of: written once, kept for good."""

import dataclasses

from sqlalchemy import Connection, insert, select

from aggregator_server.store.database import Database
from aggregator_server.store.rows import IncidentKind, IncidentRow, NewIncident
from aggregator_server.store.schema import incidents


class IncidentStore:
    """The table of incidents; each is journalled with what it is about."""

    def __init__(self, database: Database) -> None:
        """Wrap a database."""
        self._database = database

    def all(self) -> tuple[IncidentRow, ...]:
        """All incidents, oldest first."""
        query = select(incidents).order_by(incidents.c.id)
        with self._database.reading() as connection:
            return tuple(
                IncidentRow(**{**row._mapping, "kind": IncidentKind(row.kind)})
                for row in connection.execute(query)
            )


def add_incident(connection: Connection, incident: NewIncident) -> None:
    """Journal an incident, inside the caller's transaction."""
    values = dataclasses.asdict(incident)
    connection.execute(insert(incidents).values({**values, "kind": incident.kind.value}))
