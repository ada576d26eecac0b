"""The agent's memory in SQLite: membership, chain, its part in each round, what left the machine.

Everything is written here before it is done, so a process that is killed continues where it was:
a finished update is stored with its signed header before its first byte leaves, and the same bytes
are sent again after a restart, never new ones under the same attempt.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_agent.errors import JournalError
from privacy.secagg.agent import AttemptState
from protocol.chain import Release, RoundManifest
from protocol.errors import ProtocolError
from protocol.helped import HelperUpload
from protocol.manifest import FederationManifest
from protocol.messages import Credential, UploadHeader
from protocol.phases import (
    AGENT_TRANSITIONS,
    AgentEvent,
    AgentPhase,
    advance,
    require_follows,
)
from protocol.signing import Signed
from protocol.wire import parse

SCHEMA_VERSION: Final = 2
_ENDS: Final = frozenset({AgentPhase.ABANDONED, AgentPhase.UPLOADED, AgentPhase.REVEALED})
_AFTER_UPLOAD: Final = frozenset({AgentPhase.UPLOADED, AgentPhase.CONFIRMED})
_SCHEMA: Final = """
CREATE TABLE membership (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    url TEXT NOT NULL,
    federation BLOB NOT NULL,
    credential BLOB,
    data TEXT NOT NULL,
    joined_at REAL NOT NULL,
    left_at REAL
) STRICT;
CREATE TABLE releases (
    number INTEGER PRIMARY KEY,
    signed BLOB NOT NULL
) STRICT;
CREATE TABLE parts (
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    phase TEXT NOT NULL,
    manifest BLOB NOT NULL,
    header BLOB,
    words_sha256 BLOB,
    helped BLOB,
    started_at REAL NOT NULL,
    ended_at REAL,
    note TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (round, attempt)
) STRICT;
CREATE TABLE attempts (
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    upload_begun INTEGER NOT NULL,
    state BLOB,
    PRIMARY KEY (round, attempt)
) STRICT;
CREATE TABLE sent (
    at REAL NOT NULL,
    host TEXT NOT NULL,
    what TEXT NOT NULL,
    round INTEGER,
    n_bytes INTEGER NOT NULL,
    sha256 BLOB NOT NULL
) STRICT;
CREATE TABLE control (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    paused INTEGER NOT NULL,
    activity TEXT NOT NULL,
    bytes_received INTEGER NOT NULL
) STRICT;
INSERT INTO control VALUES (1, 0, '', 0);
"""


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What the owner agreed to."""

    url: str
    federation: Signed[FederationManifest]
    credential: Signed[Credential] | None
    data: str
    joined_at: float
    left_at: float | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """This agent's part in a round."""

    round: int
    attempt: int
    phase: AgentPhase
    manifest: Signed[RoundManifest]
    header: Signed[UploadHeader] | None
    words_sha256: bytes | None
    """Of the encoded update that every masked attempt of this part sends."""
    helped: HelperUpload | None
    """The head of an update under a helper's mask."""
    started_at: float
    ended_at: float | None
    note: str

    @property
    def trained(self) -> bool:
        """Whether its training gave an update."""
        return not (self.header is None and self.words_sha256 is None and self.helped is None)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do in this round."""
        return self.ended_at is not None


@dataclass(frozen=True, kw_only=True)
class SentItem:
    """One body that left the machine."""

    at: float
    host: str
    what: str
    round: int | None
    n_bytes: int
    sha256: bytes


class Journal:
    """The journal of one home.

    Guarantees:
        1. What a method wrote survives a kill and a power cut (`synchronous = FULL`).
        2. A part moves only along `protocol.phases.AGENT_TRANSITIONS`.

    Args:
        path: The file; made when missing.

    Raises:
        JournalError: Not a journal, or of a newer version.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the journal."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA secure_delete = ON")
            self._migrate(path)
        except sqlite3.DatabaseError as error:
            msg = f"{path} is not a journal of the agent: {error}"
            raise JournalError(msg) from error

    def _migrate(self, path: Path) -> None:
        with self._transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                msg = (
                    f"{path} has version {version}; this agent knows {SCHEMA_VERSION}. "
                    "Use the agent that wrote it"
                )
                raise JournalError(msg)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _one(self, query: str, *values: Any) -> sqlite3.Row | None:  # noqa: ANN401 - SQL values
        row: sqlite3.Row | None = self._db.execute(query, values).fetchone()
        return row

    # Membership

    def join(
        self, *, url: str, federation: Signed[FederationManifest], data: str, now: float
    ) -> None:
        """Note what the owner agreed to, before the enrolment leaves the machine."""
        with self._transaction():
            self._db.execute("DELETE FROM membership")
            self._db.execute(
                "INSERT INTO membership VALUES (1, ?, ?, NULL, ?, ?, NULL)",
                (url, federation.canonical(), data, now),
            )

    def set_credential(self, credential: Signed[Credential]) -> None:
        """Keep the registrar's word."""
        with self._transaction():
            self._db.execute("UPDATE membership SET credential = ?", (credential.canonical(),))

    def set_data(self, data: str) -> None:
        """Use another file of records from now on."""
        with self._transaction():
            self._db.execute("UPDATE membership SET data = ?", (data,))

    def leave(self, now: float) -> None:
        """Note that the membership was revoked, and erase the secrets of masked attempts."""
        with self._transaction():
            self._db.execute("UPDATE membership SET left_at = ?", (now,))
            self._db.execute("UPDATE attempts SET state = NULL")

    def has_left(self) -> bool:
        """Whether the membership was revoked; quick, for the working process to ask often."""
        return self._one("SELECT 1 FROM membership WHERE left_at IS NOT NULL") is not None

    def membership(self) -> Membership | None:
        """What the owner agreed to, or None before the first `join`."""
        row = self._one("SELECT * FROM membership")
        if row is None:
            return None
        credential = row["credential"]
        return Membership(
            url=row["url"],
            federation=parse(Signed[FederationManifest], row["federation"]),
            credential=None if credential is None else parse(Signed[Credential], credential),
            data=row["data"],
            joined_at=row["joined_at"],
            left_at=row["left_at"],
        )

    # The chain of releases

    def add_release(self, number: int, signed: Signed[Release]) -> None:
        """Keep a verified release."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO releases VALUES (?, ?)", (number, signed.canonical())
            )

    def release(self, number: int) -> Release | None:
        """A verified release, or None."""
        row = self._one("SELECT signed FROM releases WHERE number = ?", number)
        return None if row is None else parse(Signed[Release], row["signed"]).body

    def newest_release(self) -> Release | None:
        """The end of the verified chain, or None before the first."""
        row = self._one("SELECT signed FROM releases ORDER BY number DESC LIMIT 1")
        return None if row is None else parse(Signed[Release], row["signed"]).body

    # Parts in rounds

    def begin_part(self, manifest: Signed[RoundManifest], *, now: float) -> Part:
        """Begin a round, or go on with the part that was begun and not ended.

        A round that was begun under another manifest starts a new attempt.
        """
        round_number = manifest.body.round
        with self._transaction():
            row = self._one(
                "SELECT * FROM parts WHERE round = ? ORDER BY attempt DESC LIMIT 1", round_number
            )
            if row is not None:
                part = _part(row)
                if not part.ended and part.manifest == manifest:
                    return part
            attempt = 1 if row is None else row["attempt"] + 1
            self._db.execute(
                "INSERT INTO parts (round, attempt, phase, manifest, started_at) "
                "VALUES (?, ?, ?, ?, ?)",
                (round_number, attempt, AgentPhase.TRAINING, manifest.canonical(), now),
            )
        found = self.part(round_number, attempt)
        if found is None:  # cannot be: inserted above, and one process holds the home
            msg = f"round {round_number} vanished from the journal"
            raise JournalError(msg)
        return found

    def part(self, round_number: int, attempt: int) -> Part | None:
        """One part, or None."""
        row = self._one(
            "SELECT * FROM parts WHERE round = ? AND attempt = ?", round_number, attempt
        )
        return None if row is None else _part(row)

    def parts(self) -> list[Part]:
        """All parts, oldest first."""
        rows = self._db.execute("SELECT * FROM parts ORDER BY round, attempt").fetchall()
        return [_part(row) for row in rows]

    def open_part(self) -> Part | None:
        """The part that is not ended, or None."""
        row = self._one(
            "SELECT * FROM parts WHERE ended_at IS NULL ORDER BY round DESC, attempt DESC LIMIT 1"
        )
        return None if row is None else _part(row)

    def last_ended_round(self) -> int:
        """The highest round with nothing left to do; 0 before the first."""
        row = self._one("SELECT max(round) AS last FROM parts WHERE ended_at IS NOT NULL")
        return 0 if row is None or row["last"] is None else int(row["last"])

    def move_part(
        self,
        part: Part,
        event: AgentEvent,
        *,
        now: float,
        header: Signed[UploadHeader] | None = None,
        words_sha256: bytes | None = None,
        helped: HelperUpload | None = None,
        note: str = "",
    ) -> Part:
        """Move a part to its next phase.

        `ABANDONED`, `UPLOADED` and `REVEALED` end it.

        Args:
            part: Which one; its phase is the journal's, though `part` may be older.
            event: What happened.
            now: Seconds since the Unix epoch.
            header: Kept with the part, if given.
            words_sha256: Kept with the part, if given.
            helped: Kept with the part, if given.
            note: For the owner.

        Raises:
            TransitionError: The phase does not allow the event; nothing was changed.
            JournalError: There is no such part.
        """
        with self._transaction():
            found = self.part(part.round, part.attempt)
            if found is None:
                msg = f"round {part.round}, attempt {part.attempt} is not in the journal"
                raise JournalError(msg)
            phase = advance(AGENT_TRANSITIONS, found.phase, event)
            ended = phase in _ENDS  # in a cell, UPLOADED comes with `save_attempt`, and is no end
            self._db.execute(
                "UPDATE parts SET phase = ?, header = coalesce(?, header), "
                "words_sha256 = coalesce(?, words_sha256), helped = coalesce(?, helped), "
                "ended_at = ?, note = ? "
                "WHERE round = ? AND attempt = ?",
                (
                    phase,
                    None if header is None else header.canonical(),
                    words_sha256,
                    None if helped is None else helped.canonical(),
                    now if ended else None,
                    note,
                    part.round,
                    part.attempt,
                ),
            )
            if ended:
                self._erase_attempts(part.round)
        return self.part(part.round, part.attempt) or part

    def abandon_part(self, part: Part, *, now: float, note: str) -> Part:
        """Give a part up, wherever it stands; one whose shares are revealed only ends.

        Args:
            part: Which one; its phase is the journal's.
            now: Seconds since the Unix epoch.
            note: For the owner.

        Raises:
            TransitionError: Its update was accepted in the open mode, or all of it is done.
        """
        found = self.part(part.round, part.attempt) or part
        if found.phase is AgentPhase.REVEALED and not found.ended:
            self.end_part(found, now=now, note=note)
            return self.part(part.round, part.attempt) or found
        in_cell = found.words_sha256 is not None and found.phase in _AFTER_UPLOAD
        event = AgentEvent.CELL_LOST if in_cell else AgentEvent.ABANDON
        return self.move_part(part, event, now=now, note=note)

    def end_part(self, part: Part, *, now: float, note: str) -> None:
        """Note that a part needs nothing more where it stands, and erase its attempts' secrets.

        Args:
            part: Revealed.
            now: Seconds since the Unix epoch.
            note: For the owner.
        """
        with self._transaction():
            self._erase_attempts(part.round)
            self._db.execute(
                "UPDATE parts SET ended_at = ?, note = ? WHERE round = ? AND attempt = ?",
                (now, note, part.round, part.attempt),
            )

    # Attempts at a masked round

    def attempt(self, round_number: int) -> AttemptState | None:
        """The newest attempt at a masked round that is not over, or None."""
        row = self._one(
            "SELECT state FROM attempts WHERE round = ? ORDER BY attempt DESC LIMIT 1",
            round_number,
        )
        if row is None or row["state"] is None:
            return None
        try:
            return parse(AttemptState, row["state"])
        except ProtocolError:  # its text would quote a secret
            msg = f"the attempt at round {round_number} in the journal is damaged"
            raise JournalError(msg) from None

    def n_attempts(self, round_number: int) -> int:
        """How many attempts a masked round has seen."""
        row = self._one("SELECT count(*) AS n FROM attempts WHERE round = ?", round_number)
        return 0 if row is None else int(row["n"])

    def upload_begun(self, round_number: int) -> bool:
        """Whether masked bytes of the round's update may have left in some attempt."""
        query = "SELECT 1 FROM attempts WHERE round = ? AND upload_begun"
        return self._one(query, round_number) is not None

    def save_attempt(self, part: Part, state: AttemptState) -> Part:
        """Keep an attempt, and with it where the part stands, before anything of it is sent.

        Raises:
            TransitionError: The part cannot stand there after where it stood; nothing was changed.
        """
        with self._transaction():
            found = self.part(part.round, part.attempt)
            if found is None:
                msg = f"round {part.round}, attempt {part.attempt} is not in the journal"
                raise JournalError(msg)
            if found.phase is not state.phase:
                require_follows(AGENT_TRANSITIONS, found.phase, state.phase)
            self._db.execute(
                "INSERT INTO attempts VALUES (?, ?, ?, ?) ON CONFLICT (round, attempt) DO UPDATE "
                "SET state = excluded.state, upload_begun = excluded.upload_begun",
                (
                    part.round,
                    state.ready.body.attempt,
                    state.upload is not None,
                    state.canonical(),
                ),
            )
            self._db.execute(
                "UPDATE parts SET phase = ? WHERE round = ? AND attempt = ?",
                (state.phase, part.round, part.attempt),
            )
        return self.part(part.round, part.attempt) or part

    def fail_attempt(self, part: Part) -> Part:
        """Take a part back to its finished update, and erase the attempt's secrets.

        Raises:
            TransitionError: The update counts already; nothing was changed.
        """
        with self._transaction():
            found = self.part(part.round, part.attempt)
            if found is None:
                msg = f"round {part.round}, attempt {part.attempt} is not in the journal"
                raise JournalError(msg)
            phase = advance(AGENT_TRANSITIONS, found.phase, AgentEvent.ATTEMPT_FAILED)
            self._erase_attempts(part.round)
            self._db.execute(
                "UPDATE parts SET phase = ? WHERE round = ? AND attempt = ?",
                (phase, part.round, part.attempt),
            )
        return self.part(part.round, part.attempt) or part

    def _erase_attempts(self, round_number: int) -> None:
        # `secure_delete` overwrites the pages; flash and the write-ahead log may keep traces.
        self._db.execute("UPDATE attempts SET state = NULL WHERE round = ?", (round_number,))

    # What left the machine

    def add_sent(self, item: SentItem) -> None:
        """Note a body before it leaves."""
        with self._transaction():
            self._db.execute(
                "INSERT INTO sent VALUES (?, ?, ?, ?, ?, ?)",
                (item.at, item.host, item.what, item.round, item.n_bytes, item.sha256),
            )

    def sent(self) -> list[SentItem]:
        """Everything that left the machine, oldest first."""
        rows = self._db.execute("SELECT * FROM sent ORDER BY rowid").fetchall()
        return [SentItem(**{key: row[key] for key in row.keys()}) for row in rows]  # noqa: SIM118 - Row

    def add_received(self, n_bytes: int) -> None:
        """Count bytes that came from the server."""
        with self._transaction():
            self._db.execute("UPDATE control SET bytes_received = bytes_received + ?", (n_bytes,))

    def bytes_received(self) -> int:
        """Bytes of bodies that came from the server so far."""
        row = self._one("SELECT bytes_received FROM control")
        return 0 if row is None else int(row["bytes_received"])

    # Control: other processes write, the working one reads

    def set_paused(self, *, paused: bool) -> None:
        """Ask the working process to pause or to go on."""
        with self._transaction():
            self._db.execute("UPDATE control SET paused = ?", (int(paused),))

    def paused(self) -> bool:
        """Whether the owner paused the agent."""
        row = self._one("SELECT paused FROM control")
        return bool(row and row["paused"])

    def set_activity(self, **activity: str | float) -> None:
        """Tell other processes what the working one does."""
        with self._transaction():
            self._db.execute("UPDATE control SET activity = ?", (json.dumps(activity),))

    def activity(self) -> dict[str, str | float]:
        """What the working process last told."""
        row = self._one("SELECT activity FROM control")
        text = row["activity"] if row else ""
        found: dict[str, str | float] = json.loads(text) if text else {}
        return found


def _part(row: sqlite3.Row) -> Part:
    header = row["header"]
    return Part(
        round=row["round"],
        attempt=row["attempt"],
        phase=AgentPhase(row["phase"]),
        manifest=parse(Signed[RoundManifest], row["manifest"]),
        header=None if header is None else parse(Signed[UploadHeader], header),
        words_sha256=row["words_sha256"],
        helped=None if row["helped"] is None else parse(HelperUpload, row["helped"]),
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        note=row["note"],
    )
