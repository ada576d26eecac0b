"""Releases and the blobs they name."""

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, delete, func, insert, select

from aggregator_server.errors import StaleWriteError
from aggregator_server.store import counters
from aggregator_server.store.counters import Counter
from aggregator_server.store.database import Database
from aggregator_server.store.rows import HIDDEN_ROLES, BlobRole, BlobRow, ReleaseRow
from aggregator_server.store.schema import release_blobs, releases


class ReleaseStore:
    """The table of releases: numbers follow one another without a gap."""

    def __init__(self, database: Database) -> None:
        """Wrap a database."""
        self._database = database

    def newest(self) -> ReleaseRow | None:
        """The release with the highest number; None before the federation is founded."""
        query = select(releases).order_by(releases.c.number.desc()).limit(1)
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            return None if row is None else ReleaseRow(**row._mapping)

    def get(self, number: int) -> ReleaseRow | None:
        """A release by number."""
        with self._database.reading() as connection:
            row = connection.execute(select(releases).where(releases.c.number == number)).first()
            return None if row is None else ReleaseRow(**row._mapping)

    def page(self, *, after: int, limit: int, max_bytes: int) -> tuple[ReleaseRow, ...]:
        """The releases after a number, ascending.

        Args:
            after: -1 for all.
            limit: At most so many.
            max_bytes: And no more than together have so many bytes, but always one.
        """
        following = (
            select(releases.c.number, func.length(releases.c.signed).label("n_bytes"))
            .where(releases.c.number > after)
            .order_by(releases.c.number)
            .limit(limit)
        )
        with self._database.reading() as connection:
            last, n_bytes = after, 0
            for row in connection.execute(following):
                n_bytes += row.n_bytes
                if n_bytes > max_bytes and last > after:
                    break
                last = row.number
            query = (
                select(releases)
                .where(releases.c.number > after, releases.c.number <= last)
                .order_by(releases.c.number)
            )
            return tuple(ReleaseRow(**row._mapping) for row in connection.execute(query))

    def n_of_rounds(self) -> int:
        """How many releases were made by rounds."""
        with self._database.reading() as connection:
            return count_of_rounds(connection)

    def blobs(self) -> frozenset[bytes]:
        """The digests of all blobs that releases name."""
        with self._database.reading() as connection:
            return frozenset(connection.execute(select(release_blobs.c.sha256)).scalars())

    def blob_of(self, number: int, role: BlobRole) -> BlobRow | None:
        """The blob that a release has in a role; None if it has none."""
        query = select(release_blobs).where(
            release_blobs.c.release == number, release_blobs.c.role == role.value
        )
        with self._database.reading() as connection:
            row = connection.execute(query).first()
        return None if row is None else BlobRow(role=role, sha256=row.sha256, n_bytes=row.n_bytes)

    def blob_n_bytes(self, sha256: bytes) -> int | None:
        """The size of a blob that a release shows; None for any other."""
        query = (
            select(release_blobs.c.n_bytes)
            .where(
                release_blobs.c.sha256 == sha256,
                release_blobs.c.role.not_in(sorted(role.value for role in HIDDEN_ROLES)),
            )
            .limit(1)
        )
        with self._database.reading() as connection:
            n_bytes = connection.execute(query).scalar_one_or_none()
            return None if n_bytes is None else int(n_bytes)


def newest_number(connection: Connection) -> int:
    """The highest release number, inside the caller's transaction; -1 when there is none."""
    number = connection.execute(select(func.max(releases.c.number))).scalar_one()
    return -1 if number is None else int(number)


def count_of_rounds(connection: Connection) -> int:
    """How many releases were made by rounds, inside the caller's transaction."""
    query = select(func.count()).where(releases.c.round.is_not(None))
    return int(connection.execute(query).scalar_one())


def append(connection: Connection, release: ReleaseRow, blobs: Sequence[BlobRow]) -> None:
    """Append a release, inside the caller's transaction.

    Raises:
        StaleWriteError: Its number is not the next one.
    """
    expected = newest_number(connection) + 1
    if release.number != expected:
        msg = f"release {release.number} is not the next one; that is {expected}"
        raise StaleWriteError(msg)
    connection.execute(
        insert(releases).values(
            number=release.number,
            signed=release.signed,
            digest=release.digest,
            round=release.round,
        )
    )
    connection.execute(insert(release_blobs), list(_blob_values(release.number, blobs)))
    counters.add(connection, Counter.CHANGES)


def forget_all(connection: Connection) -> None:
    """Delete all releases, inside the transaction that founds the federation anew."""
    connection.execute(delete(release_blobs))
    connection.execute(delete(releases))


def _blob_values(number: int, blobs: Iterable[BlobRow]) -> Iterable[dict[str, object]]:
    for blob in blobs:
        yield {
            "release": number,
            "role": blob.role.value,
            "sha256": blob.sha256,
            "n_bytes": blob.n_bytes,
        }
