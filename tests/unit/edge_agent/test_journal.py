"""The agent's memory: what it wrote stays, and nothing moves out of turn."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.errors import JournalError
from edge_agent.journal import SCHEMA_VERSION, Journal, SentItem
from protocol.errors import TransitionError
from protocol.messages import Credential, UploadHeader
from protocol.phases import AgentEvent, AgentPhase
from protocol.signing import sign


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    found = Journal(path)
    yield found
    found.close()


@pytest.fixture
def federation(server_key, make_manifest):
    return sign(server_key, "federation", make_manifest()).signed


@pytest.fixture
def signed_round(server_key, make_round):
    def make(number: int = 1, **changes):
        return sign(server_key, "round", make_round(round=number, **changes)).signed

    return make


@pytest.fixture
def header(agent_key):
    return sign(
        agent_key,
        "upload",
        UploadHeader(
            federation=bytes(range(16)),
            round=1,
            attempt=1,
            agent=agent_key.identity,
            round_digest=bytes(32),
            layout=bytes(32),
            weight=1,
            body_sha256=bytes(32),
            body_n_bytes=8,
        ),
    ).signed


def test_a_new_journal_knows_nothing(journal: Journal) -> None:
    assert journal.membership() is None
    assert journal.newest_release() is None
    assert journal.release(0) is None
    assert journal.parts() == []
    assert journal.open_part() is None
    assert journal.part(1, 1) is None
    assert journal.last_ended_round() == 0
    assert journal.sent() == []
    assert journal.bytes_received() == 0
    assert journal.activity() == {}
    assert not journal.paused()
    assert not journal.has_left()


def test_guarantee_1_what_was_written_is_there_after_a_kill(
    path: Path, federation, signed_round, header, server_key, agent_key, make_release
) -> None:
    """Nothing is closed: another connection reads what the first one wrote."""
    first = Journal(path)
    first.join(url="https://h", federation=federation, data="/d", now=1.0)
    credential = Credential(
        federation=bytes(range(16)), agent=agent_key.identity, expires_at=2_000_000_000
    )
    first.set_credential(sign(server_key, "credential", credential).signed)
    release = make_release()
    first.add_release(0, sign(server_key, "release", release).signed)
    part = first.begin_part(signed_round(), now=2.0)
    first.move_part(part, AgentEvent.TRAINING_DONE, now=3.0, header=header)
    item = SentItem(at=4.0, host="h", what="x", round=1, n_bytes=5, sha256=bytes(32))
    first.add_sent(item)
    first.add_received(7)
    first.add_received(8)
    first.set_paused(paused=True)
    first.set_activity(kind="training", at=5.0)

    second = Journal(path)
    member = second.membership()
    assert member is not None
    assert (member.url, member.data, member.joined_at, member.left_at) == (
        "https://h",
        "/d",
        1.0,
        None,
    )
    assert member.federation == federation
    assert member.credential is not None
    assert member.credential.body == credential
    assert second.newest_release() == second.release(0) == release
    (part,) = second.parts()
    assert (part.round, part.attempt, part.phase) == (1, 1, AgentPhase.TRAINED)
    assert (part.header, part.started_at, part.ended) == (header, 2.0, False)
    assert second.sent() == [item]
    assert second.bytes_received() == 15
    assert second.paused()
    assert second.activity() == {"kind": "training", "at": 5.0}
    first.close()
    second.close()


def test_guarantee_1_writes_are_forced_to_the_disk(journal: Journal) -> None:
    assert journal._one("PRAGMA synchronous")[0] == 2  # type: ignore[index]
    assert journal._one("PRAGMA journal_mode")[0] == "wal"  # type: ignore[index]
    assert journal._one("PRAGMA secure_delete")[0] == 1  # type: ignore[index]


def test_a_process_that_dies_inside_a_write_leaves_the_state_before_it(path: Path) -> None:
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from edge_agent.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "journal.set_paused(paused=True)\n"
        "with journal._transaction():\n"
        "    journal._db.execute('UPDATE control SET paused = 0')\n"
        "    os._exit(9)\n"
    )
    import edge_agent

    folder = str(Path(edge_agent.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": folder}
    died = subprocess.run([sys.executable, "-c", program, str(path)], check=False, env=environment)
    assert died.returncode == 9
    journal = Journal(path)
    assert journal.paused()
    journal.close()


def test_a_failed_write_is_undone_whole(journal: Journal) -> None:
    def fail_inside() -> None:
        with journal._transaction():
            journal._db.execute("UPDATE control SET paused = 1")
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert not journal.paused()
    journal.set_paused(paused=True)
    assert journal.paused()


# Parts


def test_a_round_goes_from_training_to_uploaded(journal: Journal, signed_round, header) -> None:
    part = journal.begin_part(signed_round(), now=1.0)
    assert (part.phase, part.attempt, part.ended) == (AgentPhase.TRAINING, 1, False)
    part = journal.move_part(part, AgentEvent.TRAINING_DONE, now=2.0, header=header)
    assert journal.open_part() == part
    assert journal.last_ended_round() == 0
    part = journal.move_part(part, AgentEvent.UPLOAD_ACCEPTED, now=3.0, note="accepted")
    assert (part.phase, part.ended_at, part.note) == (AgentPhase.UPLOADED, 3.0, "accepted")
    assert part.header == header  # kept, though the last move brought none
    assert journal.open_part() is None
    assert journal.last_ended_round() == 1


def test_guarantee_2_a_part_moves_along_the_table_only(journal: Journal, signed_round) -> None:
    part = journal.begin_part(signed_round(), now=1.0)
    for event in AgentEvent:
        if event in {AgentEvent.TRAINING_DONE, AgentEvent.ABANDON}:
            continue
        with pytest.raises(TransitionError):
            journal.move_part(part, event, now=2.0, note="no")
    assert journal.part(1, 1) == part


def test_guarantee_2_a_part_that_is_out_of_date_moves_nothing(
    journal: Journal, signed_round, header
) -> None:
    old = journal.begin_part(signed_round(), now=1.0)
    trained = journal.move_part(old, AgentEvent.TRAINING_DONE, now=2.0, header=header)
    uploaded = journal.move_part(trained, AgentEvent.UPLOAD_ACCEPTED, now=3.0)
    for stale in (old, trained):
        for event in (AgentEvent.ABANDON, AgentEvent.TRAINING_DONE, AgentEvent.UPLOAD_ACCEPTED):
            with pytest.raises(TransitionError):
                journal.move_part(stale, event, now=4.0)
    assert journal.part(1, 1) == uploaded


def test_a_part_that_is_not_there_cannot_move(journal: Journal, signed_round, tmp_path) -> None:
    other = Journal(tmp_path / "other.sqlite")
    part = other.begin_part(signed_round(), now=1.0)
    other.close()
    with pytest.raises(JournalError, match="round 1, attempt 1 is not in the journal"):
        journal.move_part(part, AgentEvent.ABANDON, now=2.0)


def test_a_round_that_was_begun_goes_on_under_its_attempt(journal: Journal, signed_round) -> None:
    part = journal.begin_part(signed_round(), now=1.0)
    assert journal.begin_part(signed_round(), now=9.0) == part
    assert len(journal.parts()) == 1


def test_another_attempt_has_another_number(journal: Journal, signed_round) -> None:
    first = journal.begin_part(signed_round(), now=1.0)
    journal.move_part(first, AgentEvent.ABANDON, now=2.0, note="lost")
    again = journal.begin_part(signed_round(), now=3.0)
    assert (again.attempt, again.phase, again.header) == (2, AgentPhase.TRAINING, None)
    other = journal.begin_part(signed_round(cohort_size=9), now=4.0)
    assert other.attempt == 3
    assert journal.open_part() == other
    assert [part.attempt for part in journal.parts()] == [1, 2, 3]


def test_the_last_ended_round_is_the_highest(journal: Journal, signed_round) -> None:
    for number in (5, 2):
        part = journal.begin_part(signed_round(number), now=1.0)
        journal.move_part(part, AgentEvent.ABANDON, now=2.0)
    journal.begin_part(signed_round(9), now=3.0)
    assert journal.last_ended_round() == 5
    assert [part.round for part in journal.parts()] == [2, 5, 9]


# The chain, membership, control


def test_the_newest_release_is_the_highest_and_never_overwritten(
    journal: Journal, server_key, make_release
) -> None:
    first = make_release()
    second = make_release(after=first)
    for release in (second, first):
        journal.add_release(release.number, sign(server_key, "release", release).signed)
    forged = make_release(created_at=1.0)
    journal.add_release(0, sign(server_key, "release", forged).signed)
    assert journal.newest_release() == second
    assert journal.release(0) == first
    assert journal.release(2) is None


def test_joining_again_begins_without_a_credential(
    journal: Journal, federation, server_key, agent_key
) -> None:
    journal.join(url="https://a", federation=federation, data="/a", now=1.0)
    credential = Credential(
        federation=bytes(range(16)), agent=agent_key.identity, expires_at=2_000_000_000
    )
    journal.set_credential(sign(server_key, "credential", credential).signed)
    journal.leave(2.0)
    assert journal.has_left()
    journal.join(url="https://b", federation=federation, data="/b", now=3.0)
    member = journal.membership()
    assert member is not None
    assert (member.url, member.credential, member.left_at) == ("https://b", None, None)
    assert not journal.has_left()
    journal.set_data("/c")
    assert journal.membership().data == "/c"  # type: ignore[union-attr]


def test_two_processes_may_write_by_turns(journal: Journal, path: Path) -> None:
    other = Journal(path)
    for number in range(20):
        (journal if number % 2 else other).add_received(1)
    other.set_paused(paused=True)
    assert journal.paused()
    assert journal.bytes_received() == other.bytes_received() == 20
    other.close()


# Files that are no journal of this version


def test_a_journal_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    Journal(path).close()
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    raw.execute("UPDATE control SET paused = 1")
    raw.commit()
    raw.close()
    with pytest.raises(JournalError, match=f"has version {SCHEMA_VERSION + 1}.*agent that wrote"):
        Journal(path)
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION + 1,)
    assert raw.execute("SELECT paused FROM control").fetchone() == (1,)
    raw.close()


@pytest.mark.parametrize("data", [b"not a database, but a text of some length" * 20, b"\x00" * 999])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(JournalError, match="is not a journal"):
        Journal(path)
    assert path.read_bytes() == data


def test_a_folder_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(JournalError):
        Journal(tmp_path / "no" / "journal.sqlite")
