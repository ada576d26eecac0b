"""The store: one room for each group of tables, and the writes that span several."""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, delete, func, insert, inspect, select

from aggregator_server.errors import SchemaError, StaleWriteError
from aggregator_server.store import counters
from aggregator_server.store.agents import AgentStore
from aggregator_server.store.cells import CellStore
from aggregator_server.store.counters import Counter
from aggregator_server.store.database import Database
from aggregator_server.store.evaluations import EvaluationStore
from aggregator_server.store.incidents import IncidentStore
from aggregator_server.store.readies import ReadyStore
from aggregator_server.store.releases import (
    ReleaseStore,
    append,
    count_of_rounds,
    forget_all,
    newest_number,
)
from aggregator_server.store.rounds import TERMINAL, RoundStore, latest_round, set_phase
from aggregator_server.store.rows import BlobRow, Counts, ReleaseRow
from aggregator_server.store.schema import SCHEMA_VERSION, agents, meta, metadata
from aggregator_server.store.uploads import UploadStore
from protocol.phases import ROUND_TRANSITIONS, RoundEvent, RoundPhase, advance

_VERSION: Final = "schema_version"
_FEDERATION: Final = "federation"


class Store:
    """All that the server must not lose.

    Guarantees:
        1. What a method wrote survives `kill -9` from the moment it returns.
        2. A method that raises wrote nothing.

    Args:
        database: Where the tables are.
    """

    def __init__(self, database: Database) -> None:
        """Wrap a database; the tables are made by `found`."""
        self._database = database
        self.agents = AgentStore(database)
        self.rounds = RoundStore(database)
        self.uploads = UploadStore(database)
        self.cells = CellStore(database)
        self.readies = ReadyStore(database)
        self.evaluations = EvaluationStore(database)
        self.incidents = IncidentStore(database)
        self.releases = ReleaseStore(database)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def check_version(self) -> None:
        """Refuse a database that this version cannot read.

        Raises:
            SchemaError: It holds no federation, or was written by another version.
        """
        if not self.is_founded():
            msg = "the database holds no federation; run `sheepfold-server init` first"
            raise SchemaError(msg)
        with self._database.reading() as connection:
            text = _meta(connection, _VERSION)
        version = int(text) if text is not None and text.isdigit() else 0
        if version != SCHEMA_VERSION:
            msg = (
                f"the database has schema version {version}, this server knows {SCHEMA_VERSION}; "
                "use the version of sheepfold that wrote it, or a newer one"
            )
            raise SchemaError(msg)

    def found(self, signed_manifest: bytes, release: ReleaseRow, blobs: Sequence[BlobRow]) -> None:
        """Make the tables where missing, and journal a federation with its first release.

        A federation that nobody has joined yet is replaced.

        Args:
            signed_manifest: Canonical JSON of the `Signed[FederationManifest]`.
            release: Release 0.
            blobs: Its files, which are already stored.

        Raises:
            StaleWriteError: An agent has enrolled; the manifest is fixed.
        """
        with self._database.writing() as connection:
            metadata.create_all(connection)
            if connection.execute(select(agents.c.identity).limit(1)).first() is not None:
                msg = "an agent has enrolled; the manifest is fixed"
                raise StaleWriteError(msg)
            if _meta(connection, _VERSION) is None:
                counters.create_counters(connection)
            connection.execute(delete(meta))
            values = {_VERSION: str(SCHEMA_VERSION).encode(), _FEDERATION: signed_manifest}
            connection.execute(
                insert(meta), [{"key": key, "value": value} for key, value in values.items()]
            )
            forget_all(connection)
            append(connection, release, blobs)

    def is_founded(self) -> bool:
        """Whether the database already holds a federation."""
        with self._database.reading() as connection:
            return inspect(connection).has_table(meta.name)

    def signed_manifest(self) -> bytes:
        """Canonical JSON of the `Signed[FederationManifest]`.

        Raises:
            SchemaError: None is stored.
        """
        with self._database.reading() as connection:
            manifest = _meta(connection, _FEDERATION)
        if manifest is None:
            msg = "the database holds no federation manifest"
            raise SchemaError(msg)
        return manifest

    def publish(self, release: ReleaseRow, blobs: Sequence[BlobRow]) -> None:
        """Journal the release of a round and that the round is published, in one transaction.

        Raises:
            StaleWriteError: The round is no longer gated, or another release came in between.
        """
        with self._database.writing() as connection:
            last = latest_round(connection)
            if last is None or last.number != release.round or last.phase is not RoundPhase.GATED:
                msg = f"round {release.round} is no longer {RoundPhase.GATED.value}"
                raise StaleWriteError(msg)
            append(connection, release, blobs)
            phase = advance(ROUND_TRANSITIONS, last.phase, RoundEvent.RELEASE_JOURNALLED)
            set_phase(connection, last.number, phase, {})

    def roll_back(self, release: ReleaseRow, blobs: Sequence[BlobRow], *, reason: str) -> None:
        """Journal a release that no round made; a round under way fails, as its base is gone.

        Args:
            release: The next release.
            blobs: Its files.
            reason: Why the round under way failed.

        Raises:
            StaleWriteError: Another release came in between.
        """
        with self._database.writing() as connection:
            append(connection, release, blobs)
            last = latest_round(connection)
            if last is not None and last.phase not in TERMINAL:
                phase = advance(ROUND_TRANSITIONS, last.phase, RoundEvent.FAIL)
                set_phase(connection, last.number, phase, {"failure": reason})

    def changes(self) -> int:
        """A number that grows with every write that may give a waiting agent something to do."""
        with self._database.reading() as connection:
            return counters.read(connection, Counter.CHANGES)

    def counts(self, *, seen_after: float) -> Counts:
        """Counts over the whole federation.

        Args:
            seen_after: A member who was seen after this moment is present.
        """
        members = agents.c.revoked_at.is_(None)
        with self._database.reading() as connection:
            enrolled = connection.execute(select(func.count()).where(members)).scalar_one()
            present = connection.execute(
                select(func.count()).where(members, agents.c.last_seen >= seen_after)
            ).scalar_one()
            return Counts(
                n_enrolled=int(enrolled),
                n_present=int(present),
                newest_release=newest_number(connection),
                n_releases_of_rounds=count_of_rounds(connection),
                bytes_up=counters.read(connection, Counter.BYTES_UP),
                bytes_down=counters.read(connection, Counter.BYTES_DOWN),
            )


def _meta(connection: Connection, key: str) -> bytes | None:
    value = connection.execute(select(meta.c.value).where(meta.c.key == key)).scalar_one_or_none()
    return None if value is None else bytes(value)
