"""One suite for every database: SQLite always, PostgreSQL where SHEEPFOLD_TEST_POSTGRES names one.

The URL is of the form `postgresql://user@host/name`; each test works in a schema of its own.
"""

import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import create_engine, delete, insert, make_url, text
from sqlalchemy.exc import IntegrityError

from aggregator_server.errors import Refusal, SchemaError, StaleWriteError, StoreBusyError
from aggregator_server.store.database import Database
from aggregator_server.store.rows import (
    BlobRole,
    BlobRow,
    CellRow,
    EvaluationRow,
    IncidentKind,
    InviteRow,
    NewIncident,
    NewUpload,
    PartRow,
    ReleaseRow,
    RoundRow,
    SelectionRow,
    UploadPhase,
)
from aggregator_server.store.schema import release_blobs, releases, uploads
from aggregator_server.store.store import Store
from protocol.phases import CellPhase, RoundPhase
from protocol.problems import ProblemType

POSTGRES = os.environ.get("SHEEPFOLD_TEST_POSTGRES")
NOW = 1_800_000_000.25


def key(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


@pytest.fixture
def postgres_url() -> Iterator[str]:
    if POSTGRES is None:
        pytest.skip("SHEEPFOLD_TEST_POSTGRES names no database")
    schema = f"sheepfold_{secrets.token_hex(8)}"
    url = make_url(POSTGRES).set(drivername="postgresql+psycopg")
    admin = create_engine(url)
    with admin.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    yield url.update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(
        hide_password=False
    )
    with admin.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    admin.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'federation.db'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def open_store(url) -> Iterator[object]:
    stores: list[Store] = []

    def make() -> Store:
        stores.append(Store(Database(url)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store) -> Store:
    store = open_store()
    store.found(b"manifest", make_release(0), make_blobs(0))
    return store


def make_release(number: int, *, round_number: int | None = None) -> ReleaseRow:
    return ReleaseRow(
        number=number, signed=b"{}", digest=key(f"release {number}"), round=round_number
    )


def numbers(store: Store, *, after: int, limit: int, max_bytes: int) -> list[int]:
    rows = store.releases.page(after=after, limit=limit, max_bytes=max_bytes)
    return [row.number for row in rows]


def make_blobs(number: int) -> tuple[BlobRow, ...]:
    return tuple(
        BlobRow(role=role, sha256=key(f"{role} {number}"), n_bytes=2**33 + number)
        for role in BlobRole
    )


def make_round(number: int) -> RoundRow:
    return RoundRow(
        number=number,
        phase=RoundPhase.OPEN,
        manifest=f"manifest {number}".encode(),
        digest=key(f"round {number}"),
        failure=None,
        filter_report=None,
        passed=None,
    )


def make_selection(number: int, agent: bytes) -> SelectionRow:
    return SelectionRow(
        round=number,
        agent=agent,
        rank=key(agent.hex()),
        withdrawn_reason=None,
        withdrawal_digest=None,
    )


def make_upload(agent: bytes, *, attempt: int = 1, name: str = "body") -> NewUpload:
    return NewUpload(
        round=1,
        agent=agent,
        attempt=attempt,
        header=b"{}",
        digest=key(name),
        weight=3,
        n_bytes=2**31 - 1,
        started_at=NOW,
    )


def make_cell(upload_id: int, agent: bytes) -> CellRow:
    return CellRow(
        transcript=key(f"cell {agent.hex()}"),
        round=1,
        phase=CellPhase.UNMASKED,
        members_digest=key("members"),
        members="[]",
        upload=upload_id,
        n_members=1,
        weight_sum=3,
    )


AGENTS = [key(f"agent {i}") for i in range(4)]


def enrol(store: Store, *agents: bytes) -> None:
    for agent in agents:
        store.agents.enrol(agent, credential=b"{}", invite=None, now=NOW)


@pytest.fixture
def opened(store) -> Store:
    """Round 1 is open, with the first three of four members selected."""
    enrol(store, *AGENTS)
    store.rounds.open(
        make_round(1), release=0, ranks=[make_selection(1, agent) for agent in AGENTS[:3]]
    )
    return store


def accept(store: Store, agent: bytes, *, attempt: int = 1) -> int:
    upload = store.uploads.begin(make_upload(agent, attempt=attempt, name=agent.hex()))
    store.uploads.add_part(PartRow(upload=upload.id, n=0, sha256=key("part"), n_bytes=100))
    store.uploads.accept(upload.id, make_cell(upload.id, agent), now=NOW)
    return upload.id


def refused(problem: ProblemType):
    class Expect:
        def __enter__(self) -> None:
            return None

        def __exit__(self, kind, error, _traceback) -> bool:
            assert kind is Refusal, f"not refused: {error!r}"
            assert error.problem is problem
            return True

    return Expect()


class TestFounding:
    def test_a_founded_store_gives_its_manifest_and_release_back(self, store, open_store):
        again = open_store()
        again.check_version()
        assert again.signed_manifest() == b"manifest"
        assert again.releases.newest() == make_release(0)
        assert again.releases.blob_n_bytes(key("sent 0")) == 2**33
        assert again.releases.blob_n_bytes(key("other")) is None

    def test_an_empty_database_holds_no_federation(self, open_store):
        store = open_store()
        assert not store.is_founded()
        with pytest.raises(SchemaError, match="init"):
            store.check_version()

    def test_founding_anew_replaces_what_nobody_joined(self, store):
        other = replace(make_release(0), digest=key("other"))
        store.found(b"other", other, make_blobs(7))
        assert store.signed_manifest() == b"other"
        assert store.releases.newest() == other
        assert store.releases.blob_n_bytes(key("sent 0")) is None

    def test_founding_anew_is_refused_once_somebody_joined(self, store):
        enrol(store, AGENTS[0])
        with pytest.raises(StaleWriteError):
            store.found(b"other", make_release(0), make_blobs(7))
        assert store.signed_manifest() == b"manifest"


class TestAgents:
    def test_a_member_comes_back_as_journalled(self, store):
        store.agents.enrol(AGENTS[0], credential=b"word", invite=None, now=NOW)
        row = store.agents.get(AGENTS[0])
        assert (row.identity, row.credential, row.enrolled_at) == (AGENTS[0], b"word", NOW)
        assert store.agents.any_enrolled()
        assert store.agents.get(AGENTS[1]) is None

    def test_enrolling_a_member_again_keeps_the_first_credential(self, store):
        store.agents.enrol(AGENTS[0], credential=b"first", invite=None, now=NOW)
        row = store.agents.enrol(AGENTS[0], credential=b"second", invite=None, now=NOW + 1)
        assert row.credential == b"first"

    def test_an_invite_is_used_at_most_as_often_as_it_says_by_any_number_at_once(
        self, store, open_store
    ):
        store.agents.add_invite(
            InviteRow(id=key("invite"), code=bytes(16), created_at=NOW, n_uses=3, uses_left=3)
        )
        outcomes: list[str] = []

        def join(number: int) -> None:
            try:
                open_store().agents.enrol(
                    key(f"racer {number}"), credential=b"{}", invite=key("invite"), now=NOW
                )
                outcomes.append("in")
            except Refusal as error:
                outcomes.append(error.problem.value)

        threads = [threading.Thread(target=join, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["in"] * 3 + ["invite-refused"] * 5
        assert store.counts(seen_after=0).n_enrolled == 3
        invite = store.agents.invite(key("invite"))
        assert (invite.uses_left, invite.code) == (0, None)
        assert store.agents.n_uses_left() == 0

    def test_a_refused_enrolment_leaves_no_member(self, store):
        with refused(ProblemType.INVITE_REFUSED):
            store.agents.enrol(AGENTS[0], credential=b"{}", invite=key("none"), now=NOW)
        assert store.agents.get(AGENTS[0]) is None

    def test_presence_is_being_seen_of_late(self, store):
        enrol(store, *AGENTS)
        store.agents.saw({AGENTS[0]: NOW + 100, AGENTS[1]: NOW + 50}, bytes_down=2**40)
        store.agents.revoke(AGENTS[1], now=NOW)
        assert store.agents.present(seen_after=NOW + 20) == (AGENTS[0],)
        counts = store.counts(seen_after=NOW + 20)
        assert (counts.n_enrolled, counts.n_present, counts.bytes_down) == (3, 1, 2**40)

    def test_leaving_frees_the_place_and_ends_the_upload(self, opened):
        upload = opened.uploads.begin(make_upload(AGENTS[0]))
        opened.agents.revoke(AGENTS[0], now=NOW)
        opened.agents.revoke(AGENTS[0], now=NOW + 1)
        assert opened.agents.get(AGENTS[0]).revoked_at == NOW
        assert opened.rounds.progress(1).n_selected == 2
        assert opened.uploads.find(1, AGENTS[0], 1).phase is UploadPhase.ENDED
        assert [row.id for row in opened.uploads.deletable(keep_accepted=True)] == [upload.id]

    def test_leaving_after_acceptance_keeps_the_update(self, opened):
        accept(opened, AGENTS[0])
        opened.agents.revoke(AGENTS[0], now=NOW)
        assert opened.rounds.progress(1).n_accepted == 1
        assert len(opened.uploads.cells(1)) == 1


class TestUploads:
    def test_the_same_header_gets_the_stored_upload(self, opened):
        first = opened.uploads.begin(make_upload(AGENTS[0]))
        again = opened.uploads.begin(make_upload(AGENTS[0]))
        assert again == first
        assert first.n_bytes == 2**31 - 1

    def test_another_header_is_a_conflict(self, opened):
        opened.uploads.begin(make_upload(AGENTS[0]))
        with refused(ProblemType.CONFLICT):
            opened.uploads.begin(make_upload(AGENTS[0], name="other"))

    def test_a_new_attempt_replaces_an_incomplete_one(self, opened):
        first = opened.uploads.begin(make_upload(AGENTS[0]))
        opened.uploads.begin(make_upload(AGENTS[0], attempt=2))
        assert opened.uploads.find(1, AGENTS[0], 1).phase is UploadPhase.REPLACED
        with refused(ProblemType.CONFLICT):
            opened.uploads.add_part(PartRow(upload=first.id, n=0, sha256=key("p"), n_bytes=1))
        with refused(ProblemType.CONFLICT):
            opened.uploads.accept(first.id, make_cell(first.id, AGENTS[0]), now=NOW)

    def test_parts_are_journalled_once(self, opened):
        upload = opened.uploads.begin(make_upload(AGENTS[0]))
        part = PartRow(upload=upload.id, n=2, sha256=key("part"), n_bytes=4 * 2**20)
        opened.uploads.add_part(part)
        opened.uploads.add_part(part)
        assert opened.uploads.parts(upload.id) == (part,)
        assert opened.counts(seen_after=0).bytes_up == 4 * 2**20
        with refused(ProblemType.CONFLICT):
            opened.uploads.add_part(replace(part, sha256=key("other")))

    def test_a_reset_forgets_the_parts_and_tells_which(self, opened):
        upload = opened.uploads.begin(make_upload(AGENTS[0]))
        part = PartRow(upload=upload.id, n=0, sha256=key("part"), n_bytes=5)
        opened.uploads.add_part(part)
        assert opened.uploads.reset(upload.id) == (part,)
        assert opened.uploads.parts(upload.id) == ()

    def test_an_update_is_accepted_once_whatever_is_tried(self, opened):
        upload_id = accept(opened, AGENTS[0])
        again = opened.uploads.accept(upload_id, make_cell(upload_id, AGENTS[0]), now=NOW + 9)
        assert again.accepted_at == NOW
        with refused(ProblemType.CONSUMED):
            opened.uploads.begin(make_upload(AGENTS[0], attempt=2))
        assert opened.rounds.progress(1).n_accepted == 1
        assert len(opened.uploads.cells(1)) == 1

    def test_the_schema_itself_refuses_a_second_accepted_upload(self, opened):
        accept(opened, AGENTS[0])
        values = {
            "round": 1, "agent": AGENTS[0], "attempt": 9, "header": b"", "digest": key("x"),
            "weight": 1, "n_bytes": 1, "phase": "accepted", "has_bytes": True, "started_at": NOW,
        }  # fmt: skip
        with pytest.raises(IntegrityError), opened._database.writing() as connection:
            connection.execute(insert(uploads).values(**values))

    def test_racing_acceptances_of_one_upload_make_one_cell(self, opened, open_store):
        upload = opened.uploads.begin(make_upload(AGENTS[0]))
        barrier = threading.Barrier(6)

        def complete() -> None:
            store = open_store()
            barrier.wait()
            store.uploads.accept(upload.id, make_cell(upload.id, AGENTS[0]), now=NOW)

        threads = [threading.Thread(target=complete) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened.uploads.cells(1)) == 1

    def test_those_without_a_place_are_refused(self, opened):
        with refused(ProblemType.NOT_SELECTED):
            opened.uploads.begin(make_upload(AGENTS[3]))
        with refused(ProblemType.NOT_FOUND):
            opened.uploads.begin(replace(make_upload(AGENTS[0]), round=2))

    def test_a_closed_round_takes_nothing(self, opened):
        upload = opened.uploads.begin(make_upload(AGENTS[0]))
        opened.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.UNMASKED)
        for agent in AGENTS[:2]:
            with refused(ProblemType.ROUND_CLOSED):
                opened.uploads.begin(make_upload(agent, attempt=2))
        with refused(ProblemType.ROUND_CLOSED):
            opened.uploads.add_part(PartRow(upload=upload.id, n=0, sha256=key("p"), n_bytes=1))
        with refused(ProblemType.ROUND_CLOSED):
            opened.uploads.accept(upload.id, make_cell(upload.id, AGENTS[0]), now=NOW)
        assert opened.uploads.cells(1) == ()

    def test_cells_come_by_ascending_transcript(self, opened):
        for agent in AGENTS[:3]:
            accept(opened, agent)
        transcripts = [cell.transcript for cell in opened.uploads.cells(1)]
        assert transcripts == sorted(transcripts)
        assert all(cell.upload is not None for cell in opened.uploads.cells(1))

    def test_accepted_bytes_may_go_only_after_the_round(self, opened):
        upload_id = accept(opened, AGENTS[0])
        assert opened.uploads.deletable(keep_accepted=False) == ()
        opened.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.FAILED, failure="x")
        assert opened.uploads.deletable(keep_accepted=True) == ()
        assert [row.id for row in opened.uploads.deletable(keep_accepted=False)] == [upload_id]
        opened.uploads.deleted(upload_id)
        assert opened.uploads.deletable(keep_accepted=False) == ()
        assert opened.uploads.parts(upload_id) == ()
        assert opened.uploads.find(1, AGENTS[0], 1).phase is UploadPhase.ACCEPTED

    def test_a_refused_upload_gives_way_to_another_attempt(self, opened):
        upload = opened.uploads.begin(make_upload(AGENTS[0]))
        opened.uploads.refuse(upload.id)
        assert [row.id for row in opened.uploads.deletable(keep_accepted=True)] == [upload.id]
        assert opened.uploads.begin(make_upload(AGENTS[0], attempt=2)).phase is (
            UploadPhase.RECEIVING
        )


class TestRounds:
    def test_a_round_comes_back_as_journalled(self, opened):
        assert opened.rounds.latest() == make_round(1)
        assert opened.rounds.get(1) == make_round(1)
        assert opened.rounds.get(2) is None

    def test_round_numbers_follow_one_another_and_are_never_reused(self, opened):
        for number in (1, 2, 3):
            with pytest.raises(StaleWriteError):
                opened.rounds.open(
                    replace(make_round(number), digest=key("new")), release=0, ranks=[]
                )
        opened.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.FAILED, failure="x")
        with pytest.raises(StaleWriteError):
            opened.rounds.open(replace(make_round(1), digest=key("new")), release=0, ranks=[])
        opened.rounds.open(make_round(2), release=0, ranks=[])
        assert opened.rounds.get(1).digest == key("round 1")

    def test_a_round_opens_only_from_the_newest_release(self, store):
        store.roll_back(make_release(1), make_blobs(1), reason="test")
        with pytest.raises(StaleWriteError, match="moved on"):
            store.rounds.open(make_round(1), release=0, ranks=[])
        store.rounds.open(make_round(1), release=1, ranks=[])

    def test_racing_servers_open_one_round(self, store, open_store):
        enrol(store, *AGENTS)
        barrier = threading.Barrier(4)
        opened: list[int] = []

        def try_open(number: int) -> None:
            other = open_store()
            barrier.wait()
            try:
                other.rounds.open(
                    replace(make_round(1), digest=key(f"racer {number}")), release=0, ranks=[]
                )
                opened.append(number)
            except StaleWriteError:
                return

        threads = [threading.Thread(target=try_open, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 1
        assert store.rounds.get(1).digest == key(f"racer {opened[0]}")

    def test_a_phase_moves_only_from_where_it_was_seen(self, opened):
        with pytest.raises(StaleWriteError, match="no longer gated"):
            opened.rounds.move(1, seen=RoundPhase.GATED, to=RoundPhase.FAILED, failure="x")
        assert opened.rounds.get(1).phase is RoundPhase.OPEN

    def test_a_close_that_missed_an_upload_is_not_written(self, opened):
        accept(opened, AGENTS[0])
        with pytest.raises(StaleWriteError, match="another number of uploads"):
            opened.rounds.move(
                1, seen=RoundPhase.OPEN, to=RoundPhase.FAILED, n_accepted=0, failure="x"
            )
        assert opened.rounds.get(1).phase is RoundPhase.OPEN
        opened.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.UNMASKED, n_accepted=1)

    def test_what_a_phase_found_is_kept_by_those_after_it(self, opened):
        opened.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.UNMASKED)
        opened.rounds.move(1, seen=RoundPhase.UNMASKED, to=RoundPhase.FILTERED, filter_report="f")
        opened.rounds.move(1, seen=RoundPhase.FILTERED, to=RoundPhase.GATED, passed="v")
        row = opened.rounds.get(1)
        assert (row.filter_report, row.passed, row.failure) == ("f", "v", None)

    def test_candidates_are_present_and_were_never_selected(self, opened):
        assert opened.rounds.candidates(1, seen_after=NOW - 1) == (AGENTS[3],)
        assert opened.rounds.candidates(1, seen_after=NOW + 1) == ()
        opened.rounds.withdraw(1, AGENTS[0], reason="owner-stopped", digest=key("w"))
        assert opened.rounds.candidates(1, seen_after=NOW - 1) == (AGENTS[3],)
        opened.rounds.select(1, [make_selection(1, AGENTS[3])])
        assert opened.rounds.candidates(1, seen_after=NOW - 1) == ()

    def test_progress_counts_places_uploads_and_bytes(self, opened):
        accept(opened, AGENTS[0])
        upload = opened.uploads.begin(make_upload(AGENTS[1]))
        opened.uploads.add_part(PartRow(upload=upload.id, n=0, sha256=key("p"), n_bytes=7))
        opened.rounds.withdraw(1, AGENTS[2], reason="owner-stopped", digest=key("w"))
        progress = opened.rounds.progress(1)
        assert (progress.n_selected, progress.n_accepted, progress.n_open) == (2, 1, 1)
        assert progress.bytes_received == 2**31 - 1 + 7  # what was accepted arrived whole
        (receiving,) = progress.receiving
        assert (receiving.started_at, receiving.n_bytes_received) == (NOW, 7)

    def test_withdrawing_is_idempotent_by_its_digest(self, opened):
        opened.rounds.withdraw(1, AGENTS[0], reason="owner-stopped", digest=key("w"))
        opened.rounds.withdraw(1, AGENTS[0], reason="owner-stopped", digest=key("w"))
        with refused(ProblemType.CONFLICT):
            opened.rounds.withdraw(1, AGENTS[0], reason="out-of-memory", digest=key("x"))

    def test_the_view_of_an_agent_is_one_moment(self, opened):
        accept(opened, AGENTS[0])
        views = [opened.rounds.view(agent) for agent in AGENTS]
        assert [view.selected for view in views] == [True, True, True, False]
        assert [view.accepted for view in views] == [True, False, False, False]
        assert {view.newest_release for view in views} == {0}

    @pytest.mark.parametrize("loser", ["close", "accept"])
    def test_an_upload_that_races_with_the_close_is_in_the_sum_or_refused(
        self, opened, open_store, loser
    ):
        """Neither order lets an accepted upload miss its round."""
        upload = opened.uploads.begin(make_upload(AGENTS[0]))
        barrier = threading.Barrier(2)
        outcome: dict[str, str] = {}

        def close() -> None:
            store = open_store()
            barrier.wait()
            try:
                store.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.UNMASKED, n_accepted=0)
                outcome["close"] = "closed"
            except StaleWriteError:
                outcome["close"] = "stale"

        def complete() -> None:
            store = open_store()
            barrier.wait()
            try:
                store.uploads.accept(upload.id, make_cell(upload.id, AGENTS[0]), now=NOW)
                outcome["accept"] = "accepted"
            except Refusal:
                outcome["accept"] = "refused"

        order = [close, complete] if loser == "accept" else [complete, close]
        threads = [threading.Thread(target=target) for target in order]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcome in (
            {"close": "closed", "accept": "refused"},
            {"close": "stale", "accept": "accepted"},
        )
        assert len(opened.uploads.cells(1)) == (outcome["accept"] == "accepted")


class TestReleases:
    @pytest.fixture
    def gated(self, opened):
        opened.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.UNMASKED)
        opened.rounds.move(1, seen=RoundPhase.UNMASKED, to=RoundPhase.FILTERED)
        opened.rounds.move(1, seen=RoundPhase.FILTERED, to=RoundPhase.GATED)
        return opened

    def test_publishing_ends_the_round_with_its_release(self, gated):
        gated.publish(make_release(1, round_number=1), make_blobs(1))
        assert gated.rounds.get(1).phase is RoundPhase.PUBLISHED
        assert gated.releases.newest().number == 1
        assert gated.releases.n_of_rounds() == 1

    def test_a_round_publishes_once(self, gated):
        gated.publish(make_release(1, round_number=1), make_blobs(1))
        with pytest.raises(StaleWriteError, match="no longer gated"):
            gated.publish(make_release(2, round_number=1), make_blobs(2))
        assert gated.releases.newest().number == 1

    @pytest.mark.parametrize("number", [0, 2, 3])
    def test_a_release_number_leaves_no_gap_and_no_duplicate(self, gated, number):
        with pytest.raises(StaleWriteError, match="not the next one"):
            gated.publish(make_release(number, round_number=1), make_blobs(number))
        assert gated.rounds.get(1).phase is RoundPhase.GATED
        assert gated.releases.newest().number == 0
        assert gated.releases.blob_n_bytes(key(f"sent {number}")) in {None, 2**33}

    def test_a_rollback_fails_the_round_under_way_and_only_that(self, gated):
        gated.roll_back(make_release(1), make_blobs(0), reason="the operator said so")
        row = gated.rounds.get(1)
        assert (row.phase, row.failure) == (RoundPhase.FAILED, "the operator said so")
        gated.roll_back(make_release(2), make_blobs(0), reason="again")
        assert gated.rounds.get(1).failure == "the operator said so"
        assert gated.releases.n_of_rounds() == 0

    def test_pages_are_in_order(self, store):
        for number in range(1, 6):
            store.roll_back(make_release(number), make_blobs(number), reason="test")
        assert numbers(store, after=1, limit=3, max_bytes=100) == [2, 3, 4]
        assert numbers(store, after=5, limit=3, max_bytes=100) == []
        assert store.releases.get(3) == make_release(3)
        assert store.releases.get(9) is None

    @pytest.mark.parametrize(("max_bytes", "expected"), [(4, [2, 3]), (5, [2, 3]), (1, [2])])
    def test_a_page_has_no_more_bytes_than_asked_but_always_one_release(
        self, store, max_bytes, expected
    ):
        for number in range(1, 6):
            store.roll_back(make_release(number), make_blobs(number), reason="test")
        assert numbers(store, after=1, limit=9, max_bytes=max_bytes) == expected

    def test_the_blobs_of_all_releases_are_known(self, store):
        store.roll_back(make_release(1), make_blobs(1), reason="test")
        named = {blob.sha256 for number in (0, 1) for blob in make_blobs(number)}
        assert store.releases.blobs() == named


class TestTransactions:
    def test_a_write_that_raises_writes_nothing(self, store):
        class KilledError(BaseException):
            pass

        def half_done() -> None:
            with store._database.writing() as connection:
                connection.execute(delete(release_blobs))
                connection.execute(delete(releases))
                raise KilledError

        with pytest.raises(KilledError):
            half_done()
        assert store.releases.newest() == make_release(0)

    def test_changes_grow_with_what_gives_agents_something_to_do_and_nothing_else(self, opened):
        seen = [opened.changes()]

        def changed() -> bool:
            seen.append(opened.changes())
            return seen[-1] > seen[-2]

        opened.uploads.begin(make_upload(AGENTS[0]))
        assert not changed()
        accept(opened, AGENTS[1])
        assert not changed()  # or each of a thousand uploads would wake a thousand polls
        opened.rounds.withdraw(1, AGENTS[2], reason="owner-stopped", digest=key("w"))
        assert not changed()
        opened.rounds.select(1, [make_selection(1, AGENTS[3])])
        assert changed()
        opened.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.UNMASKED)
        assert not changed()
        opened.roll_back(make_release(1), make_blobs(1), reason="test")
        assert changed()

    def test_a_writer_that_waits_for_long_gives_up_and_readers_do_not_wait(
        self, opened, monkeypatch
    ):
        from aggregator_server.store import database as module

        monkeypatch.setattr(module, "_BUSY_TIMEOUT_S", 0.1)
        refused = []

        def write() -> None:
            try:
                enrol(opened, key("late"))
            except StoreBusyError:
                refused.append(opened.agents.get(AGENTS[0]) is not None)

        with opened._database.writing():
            thread = threading.Thread(target=write)
            thread.start()
            thread.join(10)
        assert refused == [True]
        enrol(opened, key("late"))


@pytest.mark.parametrize(
    "name", ["AdminShutdown", "LockNotAvailable", "ConnectionTimeout", "TooManyConnections"]
)
def test_a_fault_of_postgres_that_passes_is_busy(name):
    from sqlalchemy.exc import DBAPIError

    from aggregator_server.store.database import _translated

    psycopg = pytest.importorskip("psycopg")
    cause = getattr(psycopg.errors, name)("it says why\nand more")
    error = DBAPIError.instance("SELECT 1", {}, cause, psycopg.Error)
    with pytest.raises(StoreBusyError, match=r"does not answer \(it says why\)"), _translated():
        raise error


def test_no_free_connection_is_busy():
    from sqlalchemy.exc import TimeoutError as NoConnectionError

    from aggregator_server.store.database import _translated

    with pytest.raises(StoreBusyError, match="connections"), _translated():
        raise NoConnectionError


def test_a_locked_sqlite_database_is_busy_and_nothing_is_written(tmp_path, monkeypatch):
    import sqlite3

    from aggregator_server.store import database as module

    monkeypatch.setattr(module, "_BUSY_TIMEOUT_S", 0.1)
    path = tmp_path / "federation.db"
    store = Store(Database(f"sqlite:///{path}"))
    store.found(b"manifest", make_release(0), make_blobs(0))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusyError):
        enrol(store, AGENTS[0])
    assert store.agents.get(AGENTS[0]) is None  # a reader is not blocked
    other.execute("ROLLBACK")
    other.close()
    enrol(store, AGENTS[0])
    store.close()


def test_sqlite_is_durable_and_checks_its_references(tmp_path):
    store = Store(Database(f"sqlite:///{tmp_path / 'federation.db'}"))
    with store._database.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    store.close()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


class TestMembers:
    def test_members_are_listed_with_their_accepted_updates(self, opened):
        accept(opened, AGENTS[1])
        opened.uploads.begin(make_upload(AGENTS[2]))
        opened.agents.revoke(AGENTS[0], now=NOW + 5)
        members = {member.identity: member for member in opened.agents.members()}
        assert {agent: member.n_accepted for agent, member in members.items()} == {
            agent: int(agent == AGENTS[1]) for agent in members
        }
        assert (members[AGENTS[0]].revoked_at, members[AGENTS[0]].barred) == (NOW + 5, False)
        assert members[AGENTS[1]].revoked_at is None

    def test_one_who_is_barred_comes_back_by_a_newer_invite_alone(self, opened):
        opened.agents.revoke(AGENTS[0], now=NOW, bar=True)
        opened.agents.revoke(AGENTS[0], now=NOW + 9, bar=True)  # again changes nothing
        old, new = make_invite("old", at=NOW), make_invite("new", at=NOW + 1)
        for invite in (old, new):
            opened.agents.add_invite(invite)
        for invite in (None, old.id, key("unknown")):
            with pytest.raises(Refusal, match="made since") as caught:
                come_back(opened, invite)
            assert caught.value.problem is ProblemType.INVITE_REFUSED
        assert opened.agents.invite(old.id).uses_left == 1
        member = come_back(opened, new.id)
        assert (member.revoked_at, member.barred) == (None, False)

    def test_one_who_left_by_itself_can_be_barred(self, opened):
        opened.agents.revoke(AGENTS[0], now=NOW)
        opened.agents.revoke(AGENTS[0], now=NOW + 1, bar=True)
        assert opened.agents.get(AGENTS[0]).barred

    def test_one_who_left_by_itself_comes_back_freely(self, opened):
        opened.agents.revoke(AGENTS[0], now=NOW)
        assert come_back(opened, None).revoked_at is None


def make_invite(name: str, *, at: float) -> InviteRow:
    return InviteRow(id=key(name), code=bytes(16), created_at=at, n_uses=1, uses_left=1)


def come_back(store: Store, invite: bytes | None):
    return store.agents.enrol(AGENTS[0], credential=b"{}", invite=invite, now=NOW + 20)


def test_uploads_with_bytes_are_those_that_are_not_deleted(opened):
    first = opened.uploads.begin(make_upload(AGENTS[0]))
    second = opened.uploads.begin(make_upload(AGENTS[1]))
    opened.uploads.deleted(first.id)
    assert opened.uploads.with_bytes() == {second.id}


class TestEvaluations:
    @pytest.fixture
    def filtered(self, opened):
        opened.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.UNMASKED)
        opened.rounds.move(1, seen=RoundPhase.UNMASKED, to=RoundPhase.FILTERED)
        return opened

    def ask(self, store, *, attempt: int = 1) -> EvaluationRow:
        row = EvaluationRow(
            round=1,
            attempt=attempt,
            task=f"task {attempt}".encode(),
            candidates="[]",
            asked_at=NOW,
            has_blobs=True,
        )
        store.evaluations.ask(row)
        return row

    def test_attempts_come_back_as_they_were_asked(self, filtered):
        assert filtered.evaluations.of_round(1) == ()
        before = filtered.changes()
        rows = (self.ask(filtered), self.ask(filtered, attempt=2))
        assert filtered.evaluations.of_round(1) == rows
        assert filtered.changes() > before

    @pytest.mark.parametrize("phase", [RoundPhase.GATED, RoundPhase.FAILED])
    def test_nothing_is_asked_once_the_round_has_moved_on(self, filtered, phase):
        filtered.rounds.move(1, seen=RoundPhase.FILTERED, to=phase, failure="x")
        with pytest.raises(StaleWriteError):
            self.ask(filtered)
        assert filtered.evaluations.of_round(1) == ()

    def test_one_report_counts(self, filtered):
        self.ask(filtered)
        for _ in range(2):
            filtered.evaluations.answer(1, 1, report=b"report", digest=key("report"))
        with refused(ProblemType.CONFLICT):
            filtered.evaluations.answer(1, 1, report=b"other", digest=key("other"))
        (row,) = filtered.evaluations.of_round(1)
        assert (row.report, row.report_digest) == (b"report", key("report"))

    def test_a_report_comes_too_late_for_a_round_that_is_over(self, filtered):
        self.ask(filtered)
        filtered.rounds.move(1, seen=RoundPhase.FILTERED, to=RoundPhase.FAILED, failure="x")
        with refused(ProblemType.ROUND_CLOSED):
            filtered.evaluations.answer(1, 1, report=b"report", digest=key("report"))
        assert filtered.evaluations.of_round(1)[0].report is None

    def test_files_may_go_once_the_round_is_over(self, filtered):
        row = self.ask(filtered)
        assert filtered.evaluations.with_blobs() == ((row, False),)
        filtered.rounds.move(1, seen=RoundPhase.FILTERED, to=RoundPhase.FAILED, failure="x")
        assert filtered.evaluations.with_blobs() == ((row, True),)
        filtered.evaluations.forget_blobs(1, 1)
        assert filtered.evaluations.with_blobs() == ()

    def test_an_incident_is_journalled_with_the_move_or_not_at_all(self, filtered):
        incident = NewIncident(kind=IncidentKind.GATE_REFUSED, text="why", at=NOW, round=1)
        with pytest.raises(StaleWriteError):
            filtered.rounds.move(
                1, seen=RoundPhase.OPEN, to=RoundPhase.FAILED, failure="x", incident=incident
            )
        assert filtered.incidents.all() == ()
        filtered.rounds.move(
            1, seen=RoundPhase.FILTERED, to=RoundPhase.FAILED, failure="x", incident=incident
        )
        (row,) = filtered.incidents.all()
        assert (row.kind, row.text, row.at, row.round) == (incident.kind, "why", NOW, 1)
