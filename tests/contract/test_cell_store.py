"""The contract of `CellStore` and `ReadyStore` over every database, as `test_store` has others."""

import importlib.util
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from aggregator_server.errors import Refusal, StaleWriteError
from aggregator_server.store.cells import identities_of
from aggregator_server.store.rows import (
    CellMemberRow,
    CellRow,
    MaskedCellRow,
    MessageKind,
    NewUpload,
    PartRow,
    ReadyRow,
    UploadPhase,
    WaveRow,
)
from aggregator_server.store.store import Store
from protocol.limits import MAX_READY_ATTEMPTS
from protocol.phases import CellPhase, RoundPhase
from protocol.problems import ProblemType


def _suite() -> Any:
    # By its path: there is no tests package.
    path = Path(__file__).with_name("test_store.py")
    spec = importlib.util.spec_from_file_location("store_suite", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


suite = _suite()
postgres_url, url, open_store, store = (
    suite.postgres_url,
    suite.url,
    suite.open_store,
    suite.store,
)
key, refused, NOW = suite.key, suite.refused, suite.NOW
AGENTS = sorted(suite.AGENTS)
FIRST, SECOND, FAILED = key("first cell"), key("second cell"), b"signed failure"


def make_ready(agent: bytes, *, attempt: int = 1, name: str = "") -> ReadyRow:
    text = f"ready of {agent.hex()} {attempt} {name}"
    return ReadyRow(
        round=1, agent=agent, attempt=attempt, message=text.encode(), digest=key(text), wave=None
    )


def make_cell(transcript: bytes = FIRST, *, wave: int = 1, number: int = 0) -> MaskedCellRow:
    return MaskedCellRow(
        transcript=transcript,
        round=1,
        wave=wave,
        number=number,
        phase=CellPhase.SHARING,
        roster=b"roster",
        stage_at=NOW,
        shared=None,
        survivors=None,
        failed=None,
        retried=False,
    )


def make_members(
    *agents: bytes, transcript: bytes = FIRST, attempt: int = 1
) -> list[CellMemberRow]:
    return [
        CellMemberRow(transcript=transcript, agent=agent, round=1, attempt=attempt)
        for agent in agents
    ]


def make_wave(number: int = 1) -> WaveRow:
    return WaveRow(round=1, number=number, message=f"list {number}".encode())


def make_sum(transcript: bytes = FIRST) -> CellRow:
    return CellRow(
        transcript=transcript,
        round=1,
        phase=CellPhase.UNMASKED,
        members_digest=key("members"),
        members="[]",
        upload=None,
        n_members=3,
        weight_sum=2**40,
        sum_sha256=key("sum"),
    )


def say(
    where: Store,
    agent: bytes,
    kind: MessageKind,
    *,
    text: str = "",
    transcript: bytes = FIRST,
    about: bytes = b"",
    phases: set[CellPhase] | None = None,
) -> None:
    message = f"{kind} of {agent.hex()} {text}".encode()
    where.cells.add_message(
        transcript,
        agent,
        kind,
        about=about,
        message=message,
        digest=key(message),
        phases=set(CellPhase) if phases is None else phases,
    )


def upload(where: Store, agent: bytes, *, transcript: bytes = FIRST, attempt: int = 1) -> int:
    """A masked upload that has begun."""
    row = where.uploads.begin(
        NewUpload(
            round=1,
            agent=agent,
            attempt=attempt,
            header=b"{}",
            digest=key(f"upload {agent.hex()} {attempt}"),
            weight=0,
            n_bytes=100,
            started_at=NOW,
            transcript=transcript,
        )
    )
    return row.id


def accepted(where: Store, agent: bytes, *, transcript: bytes = FIRST, attempt: int = 1) -> int:
    number = upload(where, agent, transcript=transcript, attempt=attempt)
    where.uploads.add_part(PartRow(upload=number, n=0, sha256=key("part"), n_bytes=100))
    where.uploads.accept(number, None, now=NOW)
    return number


def at_once(*calls: Callable[[], None]) -> list[type[Exception] | None]:
    """What each call raised when all are made at the same time."""
    barrier = threading.Barrier(len(calls))
    raised: list[type[Exception] | None] = [None] * len(calls)

    def run(place: int, call: Callable[[], None]) -> None:
        barrier.wait()
        try:
            call()
        except (Refusal, StaleWriteError, IntegrityError) as error:
            raised[place] = type(error)

    threads = [threading.Thread(target=run, args=(n, call)) for n, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.fixture
def gathering(store) -> Store:
    """Round 1 is open; all four members hold a place and have sent READY."""
    suite.enrol(store, *AGENTS)
    store.rounds.open(
        suite.make_round(1),
        release=0,
        ranks=[suite.make_selection(1, agent) for agent in AGENTS],
    )
    for agent in AGENTS:
        store.readies.add(make_ready(agent))
    return store


@pytest.fixture
def formed(gathering) -> Store:
    """One cell of the first three members, in SHARING; the fourth was left over."""
    gathering.readies.form(make_wave(), [make_cell()], make_members(*AGENTS[:3]), retry_of=None)
    return gathering


@pytest.fixture
def go(formed) -> Callable[[CellPhase], Store]:
    """Moves the cell to a phase, with all three members there."""

    def to(phase: CellPhase) -> Store:
        cells = formed.cells
        steps = [
            (CellPhase.UPLOADING, {"shared": AGENTS[:3]}),
            (CellPhase.CONFIRMING, {"survivors": AGENTS[:3]}),
            (CellPhase.REVEALING, {}),
        ]
        for following, fixed in steps:
            seen = cells.get(FIRST).phase
            if seen is phase:
                break
            if following is CellPhase.CONFIRMING:
                for agent in AGENTS[:3]:
                    accepted(formed, agent)
            cells.move(FIRST, seen=seen, to=following, now=NOW, **fixed)
        return formed

    return to


def waiting(where: Store, *, seen_after: float = NOW - 1) -> list[tuple[bytes, int]]:
    rows = where.readies.waiting(1, seen_after=seen_after)
    return [(row.agent, row.attempt) for row in rows]


class TestReady:
    def test_it_waits_as_it_was_journalled_by_ascending_identity(self, gathering):
        rows = gathering.readies.waiting(1, seen_after=NOW - 1)
        assert list(rows) == [make_ready(agent) for agent in AGENTS]

    def test_sent_again_it_changes_nothing(self, gathering):
        before = gathering.changes()
        gathering.readies.add(make_ready(AGENTS[0]))
        assert gathering.changes() == before
        assert len(waiting(gathering)) == 4

    def test_guarantee_1_the_one_of_the_highest_attempt_counts(self, gathering):
        gathering.readies.add(make_ready(AGENTS[0], attempt=3))
        assert (AGENTS[0], 3) in waiting(gathering)
        assert len(waiting(gathering)) == 4
        assert gathering.readies.waits(1, AGENTS[0], 3)
        assert not gathering.readies.waits(1, AGENTS[0], 1)

    def test_guarantee_1_an_older_one_is_not_back_once_the_newer_is_in_a_list(self, gathering):
        gathering.readies.add(make_ready(AGENTS[0], attempt=2))
        members = [*make_members(AGENTS[0], attempt=2), *make_members(*AGENTS[1:3])]
        gathering.readies.form(make_wave(), [make_cell()], members, retry_of=None)
        assert waiting(gathering) == [(AGENTS[3], 1)]

    def test_another_one_for_the_attempt_or_an_older_attempt_conflicts(self, gathering):
        gathering.readies.add(make_ready(AGENTS[0], attempt=3))
        for attempt in (1, 3):
            with refused(ProblemType.CONFLICT):
                gathering.readies.add(make_ready(AGENTS[0], attempt=attempt, name="other"))
        with refused(ProblemType.CONFLICT):
            gathering.readies.add(make_ready(AGENTS[0], attempt=2))
        gathering.readies.add(make_ready(AGENTS[0], attempt=1))  # known, of long ago

    def test_more_attempts_than_allowed_conflict(self, gathering):
        gathering.readies.add(make_ready(AGENTS[0], attempt=MAX_READY_ATTEMPTS))
        with refused(ProblemType.CONFLICT):
            gathering.readies.add(make_ready(AGENTS[0], attempt=MAX_READY_ATTEMPTS + 1))

    def test_of_no_round_it_is_not_found(self, store):
        suite.enrol(store, AGENTS[0])
        with refused(ProblemType.NOT_FOUND):
            store.readies.add(make_ready(AGENTS[0]))

    def test_without_a_place_it_is_refused(self, gathering):
        gathering.rounds.withdraw(1, AGENTS[0], reason="owner-stopped", digest=key("w"))
        with refused(ProblemType.NOT_SELECTED):
            gathering.readies.add(make_ready(AGENTS[0], attempt=2))
        stranger = key("stranger")
        suite.enrol(gathering, stranger)
        with refused(ProblemType.NOT_SELECTED):
            gathering.readies.add(make_ready(stranger))

    def test_of_a_round_that_no_longer_gathers_it_is_refused(self, gathering):
        gathering.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.FAILED, failure="x")
        with refused(ProblemType.ROUND_CLOSED):
            gathering.readies.add(make_ready(AGENTS[0], attempt=2))
        assert not gathering.readies.waits(1, AGENTS[0], 1)

    def test_while_cells_work_only_members_of_a_failed_one_send_another(self, formed):
        for agent in (AGENTS[0], AGENTS[3]):
            with refused(ProblemType.ROUND_CLOSED):
                formed.readies.add(make_ready(agent, attempt=2))
        assert not formed.readies.waits(1, AGENTS[3], 1)
        formed.cells.fail(FIRST, seen=CellPhase.SHARING, failed=FAILED, retried=False, now=NOW)
        formed.readies.add(make_ready(AGENTS[0], attempt=2))
        assert formed.readies.waits(1, AGENTS[0], 2)
        with refused(ProblemType.ROUND_CLOSED):
            formed.readies.add(make_ready(AGENTS[3], attempt=2))
        formed.cells.give_up(FIRST)
        assert not formed.readies.waits(1, AGENTS[0], 2)
        with refused(ProblemType.ROUND_CLOSED):
            formed.readies.add(make_ready(AGENTS[1], attempt=2))

    def test_the_absent_the_revoked_and_those_who_withdrew_do_not_wait(self, gathering):
        gathering.agents.saw({AGENTS[1]: NOW + 50, AGENTS[2]: NOW + 50}, bytes_down=0)
        assert waiting(gathering, seen_after=NOW + 10) == [(AGENTS[1], 1), (AGENTS[2], 1)]
        gathering.agents.revoke(AGENTS[1], now=NOW)
        gathering.rounds.withdraw(1, AGENTS[2], reason="owner-stopped", digest=key("w"))
        assert waiting(gathering) == [(AGENTS[0], 1), (AGENTS[3], 1)]

    def test_progress_counts_those_who_hold_a_place_and_are_ready(self, gathering):
        gathering.readies.add(make_ready(AGENTS[0], attempt=2))
        gathering.rounds.withdraw(1, AGENTS[1], reason="owner-stopped", digest=key("w"))
        progress = gathering.rounds.progress(1)
        assert (progress.n_selected, progress.n_ready) == (3, 3)

    def test_two_at_once_for_one_attempt_are_one(self, gathering, open_store):
        stores = [open_store() for _ in range(4)]
        raised = at_once(
            *(
                lambda n=n, s=s: s.readies.add(make_ready(AGENTS[0], attempt=2, name=f"racer {n}"))
                for n, s in enumerate(stores)
            )
        )
        assert sorted(raised, key=str).count(None) == 1
        assert raised.count(Refusal) == 3


class TestForming:
    def test_guarantee_2_a_list_its_cells_and_its_members_are_journalled_together(self, formed):
        cells = formed.cells
        assert formed.rounds.get(1).phase is RoundPhase.GATHERING
        assert (formed.readies.wave(1, 1), formed.readies.n_waves(1)) == (make_wave(), 1)
        assert cells.get(FIRST) == make_cell()
        assert cells.of_round(1) == (make_cell(),)
        assert sorted(cells.members(FIRST), key=lambda row: row.agent) == make_members(*AGENTS[:3])
        assert cells.member(FIRST, AGENTS[1]) == make_members(AGENTS[1])[0]
        assert cells.member(FIRST, AGENTS[3]) is None
        assert cells.of_attempt(1, AGENTS[0], 1) == make_cell()
        assert cells.of_attempt(1, AGENTS[0], 2) is None
        assert cells.of_attempt(1, AGENTS[3], 1) is None
        assert waiting(formed) == [(AGENTS[3], 1)]

    def test_cells_come_in_the_order_in_which_they_were_formed(self, gathering):
        rows = [make_cell(key(f"cell {n}"), number=n) for n in range(4)]
        members = [
            member
            for row, agent in zip(rows, AGENTS, strict=True)
            for member in make_members(agent, transcript=row.transcript)
        ]
        gathering.readies.form(make_wave(), rows, members, retry_of=None)
        assert gathering.cells.of_round(1) == tuple(rows)

    def test_another_ready_of_a_member_makes_it_stale_and_nothing_is_written(self, gathering):
        gathering.readies.add(make_ready(AGENTS[1], attempt=2))
        with pytest.raises(StaleWriteError, match="another READY"):
            gathering.readies.form(
                make_wave(), [make_cell()], make_members(*AGENTS[:3]), retry_of=None
            )
        assert gathering.rounds.get(1).phase is RoundPhase.OPEN
        assert gathering.cells.get(FIRST) is None
        assert gathering.readies.n_waves(1) == 0
        assert len(waiting(gathering)) == 4

    def test_a_round_that_has_moved_on_makes_it_stale(self, gathering):
        with pytest.raises(StaleWriteError):  # a second wave needs a first one
            gathering.readies.form(
                make_wave(2), [make_cell(wave=2)], make_members(*AGENTS[:3]), retry_of=None
            )
        gathering.rounds.move(1, seen=RoundPhase.OPEN, to=RoundPhase.FAILED, failure="x")
        for number in (1, 2):
            with pytest.raises(StaleWriteError):
                gathering.readies.form(
                    make_wave(number), [make_cell()], make_members(*AGENTS[:3]), retry_of=None
                )
        assert gathering.cells.get(FIRST) is None

    def test_guarantee_2_a_ready_stands_in_no_second_list(self, formed):
        again = make_members(AGENTS[0], AGENTS[3], transcript=SECOND)
        with pytest.raises(IntegrityError):
            formed.readies.form(make_wave(2), [make_cell(SECOND, wave=2)], again, retry_of=None)
        assert formed.cells.get(SECOND) is None
        assert formed.readies.n_waves(1) == 1
        assert waiting(formed) == [(AGENTS[3], 1)]

    def test_two_servers_at_once_form_one_list(self, gathering, open_store):
        def form(where: Store, name: str) -> None:
            where.readies.form(
                make_wave(),
                [make_cell(key(name))],
                make_members(*AGENTS, transcript=key(name)),
                retry_of=None,
            )

        stores = [open_store() for _ in range(3)]
        raised = at_once(*(lambda n=n, s=s: form(s, f"racer {n}") for n, s in enumerate(stores)))
        assert raised.count(None) == 1
        assert raised.count(StaleWriteError) == 2
        assert len(gathering.cells.of_round(1)) == 1

    def test_a_ready_that_races_with_its_list_is_in_it_or_makes_it_stale(
        self, gathering, open_store
    ):
        one, two = open_store(), open_store()
        raised = at_once(
            lambda: one.readies.form(
                make_wave(), [make_cell()], make_members(*AGENTS), retry_of=None
            ),
            lambda: two.readies.add(make_ready(AGENTS[0], attempt=2)),
        )
        assert raised in ([None, Refusal], [StaleWriteError, None])
        row = gathering.cells.of_attempt(1, AGENTS[0], 1)
        assert (row is None) == (raised[0] is StaleWriteError)

    def test_a_second_try_is_noted_with_the_cell_that_failed(self, formed):
        formed.cells.fail(FIRST, seen=CellPhase.SHARING, failed=FAILED, retried=False, now=NOW + 5)
        for agent in AGENTS[:3]:
            formed.readies.add(make_ready(agent, attempt=2))
        formed.readies.form(
            make_wave(2),
            [make_cell(SECOND, wave=2)],
            make_members(*AGENTS[:3], transcript=SECOND, attempt=2),
            retry_of=FIRST,
        )
        first, second = formed.cells.of_round(1)
        assert first == replace(
            make_cell(), phase=CellPhase.FAILED, failed=FAILED, retried=True, stage_at=NOW + 5
        )
        assert (second.transcript, second.wave, second.retried) == (SECOND, 2, False)
        assert formed.cells.of_attempt(1, AGENTS[0], 2).transcript == SECOND
        assert formed.readies.n_waves(1) == 2


class TestMessages:
    def test_they_come_back_oldest_first_and_after_a_given_one(self, formed):
        for agent in (AGENTS[2], AGENTS[0], AGENTS[1]):
            say(formed, agent, MessageKind.SHARES)
        rows = formed.cells.messages(FIRST)
        assert [row.agent for row in rows] == [AGENTS[2], AGENTS[0], AGENTS[1]]
        assert [row.id for row in rows] == sorted(row.id for row in rows)
        assert formed.cells.messages(FIRST, after=rows[1].id) == rows[2:]
        assert formed.cells.messages(SECOND) == ()
        assert (rows[0].kind, rows[0].about) == (MessageKind.SHARES, b"")

    def test_guarantee_3_the_same_again_changes_nothing_in_whatever_phase(self, formed):
        say(formed, AGENTS[0], MessageKind.SHARES, phases={CellPhase.SHARING})
        say(formed, AGENTS[0], MessageKind.SHARES, phases={CellPhase.SHARING})
        formed.cells.fail(FIRST, seen=CellPhase.SHARING, failed=FAILED, retried=True, now=NOW)
        say(formed, AGENTS[0], MessageKind.SHARES, phases={CellPhase.SHARING})
        say(formed, AGENTS[0], MessageKind.SHARES, phases=set())
        assert len(formed.cells.messages(FIRST)) == 1

    def test_guarantee_3_another_of_the_kind_conflicts(self, formed):
        say(formed, AGENTS[0], MessageKind.SHARES)
        with refused(ProblemType.CONFLICT):
            say(formed, AGENTS[0], MessageKind.SHARES, text="other")
        say(formed, AGENTS[0], MessageKind.CONFIRM)
        say(formed, AGENTS[1], MessageKind.SHARES)
        assert len(formed.cells.messages(FIRST)) == 3

    def test_complaints_are_told_apart_by_whom_they_are_about(self, formed):
        for accused in AGENTS[1:3]:
            say(formed, AGENTS[0], MessageKind.COMPLAINT, about=accused)
        with refused(ProblemType.CONFLICT):
            say(formed, AGENTS[0], MessageKind.COMPLAINT, about=AGENTS[1], text="other")
        assert [row.about for row in formed.cells.messages(FIRST)] == AGENTS[1:3]

    @pytest.mark.parametrize("phases", [set(), {CellPhase.UPLOADING, CellPhase.REVEALING}])
    def test_guarantee_3_in_another_phase_than_the_callers_it_is_refused(self, formed, phases):
        with refused(ProblemType.STAGE_CLOSED):
            say(formed, AGENTS[0], MessageKind.CONFIRM, phases=phases)
        assert formed.cells.messages(FIRST) == ()

    def test_of_no_cell_it_is_not_found(self, formed):
        with refused(ProblemType.NOT_FOUND):
            say(formed, AGENTS[0], MessageKind.SHARES, transcript=SECOND)

    def test_once_the_round_has_moved_on_it_is_refused(self, formed):
        formed.rounds.move(1, seen=RoundPhase.GATHERING, to=RoundPhase.FAILED, failure="x")
        with refused(ProblemType.ROUND_CLOSED):
            say(formed, AGENTS[0], MessageKind.SHARES)

    def test_two_different_ones_at_once_are_one(self, formed, open_store):
        stores = [open_store() for _ in range(4)]
        raised = at_once(
            *(
                lambda n=n, s=s: say(s, AGENTS[0], MessageKind.REVEAL, text=f"racer {n}")
                for n, s in enumerate(stores)
            )
        )
        assert raised.count(None) == 1
        assert raised.count(Refusal) == 3
        assert len(formed.cells.messages(FIRST)) == 1

    def test_one_that_races_with_the_end_of_its_stage_is_in_it_or_refused(self, formed, open_store):
        one, two = open_store(), open_store()
        raised = at_once(
            lambda: one.cells.move(
                FIRST, seen=CellPhase.SHARING, to=CellPhase.UPLOADING, now=NOW, shared=AGENTS[:3]
            ),
            lambda: say(two, AGENTS[0], MessageKind.SHARES, phases={CellPhase.SHARING}),
        )
        assert raised[0] is None
        assert len(formed.cells.messages(FIRST)) == (raised[1] is None)


class TestStages:
    def test_a_stage_is_journalled_with_when_it_began_and_who_is_in_it(self, formed):
        formed.cells.move(
            FIRST,
            seen=CellPhase.SHARING,
            to=CellPhase.UPLOADING,
            now=NOW + 7,
            shared=AGENTS[:3],
        )
        row = formed.cells.get(FIRST)
        assert (row.phase, row.stage_at) == (CellPhase.UPLOADING, NOW + 7)
        assert identities_of(row.shared) == tuple(AGENTS[:3])
        assert row.survivors is None

    def test_a_phase_that_has_changed_makes_it_stale(self, formed):
        formed.cells.move(
            FIRST, seen=CellPhase.SHARING, to=CellPhase.UPLOADING, now=NOW, shared=AGENTS[:3]
        )
        row = formed.cells.get(FIRST)
        with pytest.raises(StaleWriteError, match="no longer sharing"):
            formed.cells.move(
                FIRST, seen=CellPhase.SHARING, to=CellPhase.UPLOADING, now=NOW + 9, shared=[]
            )
        with pytest.raises(StaleWriteError, match="no longer sharing"):
            formed.cells.fail(FIRST, seen=CellPhase.SHARING, failed=FAILED, retried=True, now=NOW)
        with pytest.raises(StaleWriteError, match="no longer revealing"):
            formed.cells.finish(make_sum())
        assert formed.cells.get(FIRST) == row
        with pytest.raises(StaleWriteError):
            formed.cells.move(SECOND, seen=CellPhase.SHARING, to=CellPhase.FAILED, now=NOW)

    def test_a_round_that_is_over_makes_every_step_stale(self, formed):
        formed.roll_back(suite.make_release(1), suite.make_blobs(1), reason="test")
        for step in (
            lambda: formed.cells.move(
                FIRST, seen=CellPhase.SHARING, to=CellPhase.UPLOADING, now=NOW, shared=[]
            ),
            lambda: formed.cells.fail(
                FIRST, seen=CellPhase.SHARING, failed=FAILED, retried=True, now=NOW
            ),
        ):
            with pytest.raises(StaleWriteError, match="round 1 is failed"):
                step()
        assert formed.cells.get(FIRST) == make_cell()

    def test_survivors_are_exactly_those_whose_upload_is_accepted(self, go):
        store = go(CellPhase.UPLOADING)
        accepted(store, AGENTS[1])
        accepted(store, AGENTS[0])
        under_way = upload(store, AGENTS[2])
        for wrong in ([AGENTS[0]], AGENTS[:3], []):
            with pytest.raises(StaleWriteError, match="another upload was accepted"):
                store.cells.move(
                    FIRST,
                    seen=CellPhase.UPLOADING,
                    to=CellPhase.CONFIRMING,
                    now=NOW,
                    survivors=wrong,
                )
        assert store.uploads.get(under_way).phase is UploadPhase.RECEIVING
        store.cells.move(
            FIRST,
            seen=CellPhase.UPLOADING,
            to=CellPhase.CONFIRMING,
            now=NOW,
            survivors=AGENTS[:2],
        )
        assert identities_of(store.cells.get(FIRST).survivors) == tuple(AGENTS[:2])
        assert store.uploads.get(under_way).phase is UploadPhase.ENDED
        assert [row.agent for row in store.cells.uploads(FIRST)] == AGENTS[:2]
        assert [row.id for row in store.uploads.deletable(keep_accepted=False)] == [under_way]

    def test_an_upload_that_races_with_the_survivors_is_one_of_them_or_refused(
        self, go, open_store
    ):
        store = go(CellPhase.UPLOADING)
        for agent in AGENTS[:2]:
            accepted(store, agent)
        late = upload(store, AGENTS[2])
        store.uploads.add_part(PartRow(upload=late, n=0, sha256=key("part"), n_bytes=100))
        one, two = open_store(), open_store()
        raised = at_once(
            lambda: one.cells.move(
                FIRST,
                seen=CellPhase.UPLOADING,
                to=CellPhase.CONFIRMING,
                now=NOW,
                survivors=AGENTS[:2],
            ),
            lambda: two.uploads.accept(late, None, now=NOW),
        )
        assert raised in ([None, Refusal], [StaleWriteError, None])
        n_accepted = len(store.cells.uploads(FIRST))
        assert n_accepted == (2 if raised[0] is None else 3)

    def test_a_masked_upload_is_taken_only_while_its_cell_takes_them(self, formed):
        with refused(ProblemType.STAGE_CLOSED):
            upload(formed, AGENTS[0])
        formed.cells.move(
            FIRST, seen=CellPhase.SHARING, to=CellPhase.UPLOADING, now=NOW, shared=AGENTS[:3]
        )
        number = upload(formed, AGENTS[0])
        formed.roll_back(suite.make_release(1), suite.make_blobs(1), reason="test")
        with refused(ProblemType.STAGE_CLOSED):
            formed.uploads.add_part(PartRow(upload=number, n=0, sha256=key("p"), n_bytes=100))
        with refused(ProblemType.ROUND_CLOSED):
            upload(formed, AGENTS[1])

    def test_an_upload_under_way_is_told_with_how_far_it_has_come(self, go):
        store = go(CellPhase.UPLOADING)
        accepted(store, AGENTS[0])
        number = upload(store, AGENTS[1])
        store.uploads.add_part(PartRow(upload=number, n=0, sha256=key("p"), n_bytes=40))
        (progress,) = store.cells.receiving(FIRST, 1)
        assert (progress.started_at, progress.n_bytes, progress.n_bytes_received) == (NOW, 100, 40)
        assert store.cells.receiving(SECOND, 1) == ()

    @pytest.mark.parametrize(
        "phase", [CellPhase.SHARING, CellPhase.UPLOADING, CellPhase.CONFIRMING, CellPhase.REVEALING]
    )
    def test_a_failure_ends_every_upload_of_the_cell(self, go, phase):
        store = go(phase)
        if phase is CellPhase.UPLOADING:
            accepted(store, AGENTS[0])
            upload(store, AGENTS[1])
        before = {row.id for row in store.cells.uploads(FIRST)}
        store.cells.fail(FIRST, seen=phase, failed=FAILED, retried=False, now=NOW + 3)
        row = store.cells.get(FIRST)
        assert (row.phase, row.failed, row.retried, row.stage_at) == (
            CellPhase.FAILED,
            FAILED,
            False,
            NOW + 3,
        )
        assert store.cells.uploads(FIRST) == ()
        assert store.cells.receiving(FIRST, 1) == ()
        deletable = {row.id for row in store.uploads.deletable(keep_accepted=True)}
        assert deletable >= before
        with pytest.raises(StaleWriteError):
            store.cells.fail(FIRST, seen=phase, failed=b"other", retried=True, now=NOW)

    def test_the_second_try_of_an_upload_may_be_accepted_once_more(self, go):
        store = go(CellPhase.UPLOADING)
        accepted(store, AGENTS[0])
        store.cells.fail(FIRST, seen=CellPhase.UPLOADING, failed=FAILED, retried=False, now=NOW)
        store.readies.add(make_ready(AGENTS[0], attempt=2))
        store.readies.form(
            make_wave(2),
            [make_cell(SECOND, wave=2)],
            make_members(AGENTS[0], transcript=SECOND, attempt=2),
            retry_of=FIRST,
        )
        store.cells.move(
            SECOND, seen=CellPhase.SHARING, to=CellPhase.UPLOADING, now=NOW, shared=AGENTS[:1]
        )
        accepted(store, AGENTS[0], transcript=SECOND, attempt=2)
        assert [row.attempt for row in store.cells.uploads(SECOND)] == [2]
        assert store.cells.uploads(FIRST) == ()


class TestSums:
    def test_a_sum_is_journalled_once_with_the_end_of_its_cell(self, go):
        store = go(CellPhase.REVEALING)
        store.cells.finish(make_sum())
        assert store.uploads.cells(1) == (make_sum(),)
        assert store.cells.get(FIRST).phase is CellPhase.UNMASKED
        with pytest.raises(StaleWriteError):
            store.cells.finish(make_sum())
        assert store.uploads.cells(1) == (make_sum(),)

    def test_two_servers_at_once_journal_one_sum(self, go, open_store):
        store = go(CellPhase.REVEALING)
        stores = [open_store() for _ in range(3)]
        raised = at_once(*(lambda s=s: s.cells.finish(make_sum()) for s in stores))
        assert raised.count(None) == 1
        assert raised.count(StaleWriteError) == 2
        assert store.uploads.cells(1) == (make_sum(),)

    def test_a_cell_that_failed_gets_no_sum(self, go):
        store = go(CellPhase.REVEALING)
        store.cells.fail(FIRST, seen=CellPhase.REVEALING, failed=FAILED, retried=True, now=NOW)
        with pytest.raises(StaleWriteError):
            store.cells.finish(make_sum())
        assert store.uploads.cells(1) == ()

    def test_its_vectors_are_deletable_and_itself_once_the_round_is_over(self, go):
        store = go(CellPhase.REVEALING)
        assert store.uploads.deletable(keep_accepted=True) == ()
        store.cells.finish(make_sum())
        assert len(store.uploads.deletable(keep_accepted=True)) == 3
        assert store.cells.deletable_sums() == ()
        store.rounds.move(1, seen=RoundPhase.GATHERING, to=RoundPhase.UNMASKED)
        assert store.cells.deletable_sums() == ()
        store.rounds.move(1, seen=RoundPhase.UNMASKED, to=RoundPhase.FAILED, failure="x")
        assert store.cells.deletable_sums() == (FIRST,)
        store.cells.sum_deleted(FIRST)
        assert store.cells.deletable_sums() == ()
        assert store.uploads.cells(1) == (make_sum(),)


class TestConfirmations:
    def test_guarantee_4_who_confirmed_is_in_no_other_cell_of_the_round(self, go):
        store = go(CellPhase.CONFIRMING)
        for agent in AGENTS[:2]:
            say(store, agent, MessageKind.CONFIRM)
        say(store, AGENTS[2], MessageKind.SHARES)
        assert store.cells.confirmers(FIRST) == frozenset(AGENTS[:2])
        store.cells.fail(FIRST, seen=CellPhase.CONFIRMING, failed=FAILED, retried=False, now=NOW)
        for agent in AGENTS[:2]:
            with refused(ProblemType.CONSUMED):
                store.readies.add(make_ready(agent, attempt=2))
        store.readies.add(make_ready(AGENTS[2], attempt=2))
        # A word that comes after FAILED changes nothing.
        with refused(ProblemType.STAGE_CLOSED):
            say(store, AGENTS[2], MessageKind.CONFIRM, phases={CellPhase.CONFIRMING})
        assert waiting(store) == [(AGENTS[2], 2), (AGENTS[3], 1)]

    def test_guarantee_4_a_list_of_who_has_confirmed_meanwhile_is_not_written(self, go):
        store = go(CellPhase.CONFIRMING)
        say(store, AGENTS[0], MessageKind.CONFIRM)
        store.cells.fail(FIRST, seen=CellPhase.CONFIRMING, failed=FAILED, retried=False, now=NOW)
        with pytest.raises((StaleWriteError, IntegrityError)):
            store.readies.form(
                make_wave(2),
                [make_cell(SECOND, wave=2)],
                make_members(AGENTS[0], transcript=SECOND, attempt=1),
                retry_of=FIRST,
            )
        assert store.cells.get(SECOND) is None
        assert not store.cells.get(FIRST).retried

    def test_a_ready_and_a_word_at_once_never_both_count(self, go, open_store):
        store = go(CellPhase.CONFIRMING)
        one, two = open_store(), open_store()
        raised = at_once(
            lambda: one.cells.fail(
                FIRST, seen=CellPhase.CONFIRMING, failed=FAILED, retried=False, now=NOW
            ),
            lambda: say(two, AGENTS[0], MessageKind.CONFIRM, phases={CellPhase.CONFIRMING}),
        )
        assert raised[0] is None
        if raised[1] is None:
            with refused(ProblemType.CONSUMED):
                store.readies.add(make_ready(AGENTS[0], attempt=2))
        else:
            store.readies.add(make_ready(AGENTS[0], attempt=2))


def test_changes_grow_with_what_gives_members_something_to_do(gathering):
    seen = [gathering.changes()]

    def changed() -> bool:
        seen.append(gathering.changes())
        return seen[-1] > seen[-2]

    gathering.readies.form(make_wave(), [make_cell()], make_members(*AGENTS[:3]), retry_of=None)
    assert changed()
    say(gathering, AGENTS[0], MessageKind.SHARES)
    assert not changed()  # the clockwork looks by itself; the cell has not moved
    gathering.cells.move(
        FIRST, seen=CellPhase.SHARING, to=CellPhase.UPLOADING, now=NOW, shared=AGENTS[:3]
    )
    assert changed()
    accepted(gathering, AGENTS[0])
    assert not changed()
    gathering.cells.fail(FIRST, seen=CellPhase.UPLOADING, failed=FAILED, retried=False, now=NOW)
    assert changed()
    gathering.cells.give_up(FIRST)
    assert changed()


def test_a_new_store_reads_what_another_wrote(formed, open_store):
    say(formed, AGENTS[0], MessageKind.SHARES)
    again = open_store()
    assert again.cells.of_round(1) == formed.cells.of_round(1)
    assert again.cells.messages(FIRST) == formed.cells.messages(FIRST)
    assert waiting(again) == waiting(formed)
