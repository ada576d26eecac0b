"""Masked rounds by themselves: killed anywhere, refused anywhere, and what the journal keeps.

The transport is a double, which carries every message as JSON to a server that the test plays
(`make_host` of this folder's fixtures); the other members of a cell are real.
"""

import contextlib
import io
import json
import sqlite3
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent import cli
from edge_agent import masked as masked_module
from edge_agent.errors import JournalError, RefusedError, TrainingError
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from edge_agent.masked import MaskedRounds
from edge_agent.member import Member, OwnersCell
from edge_agent.membership import n_accepted, record_outgoing
from edge_agent.transport import Transport, Upload
from privacy.fixed_point import with_checks
from privacy.masking import Mask, MaskAdder
from privacy.secagg.agent import AttemptState, SecAggAgent
from privacy.updates import PlainUpdate
from protocol.blocks import AggregationBlock, CellMasking, Weighting
from protocol.checks import Check
from protocol.layout import VectorLayout
from protocol.limits import MIB
from protocol.masked import (
    MISSING_SHARE,
    BundleNews,
    CellNews,
    Complaint,
    Confirm,
    EndedNews,
    MaskedHeader,
    NoNews,
    Ready,
    Reveal,
    Shares,
)
from protocol.messages import Acknowledged, UploadStatus
from protocol.phases import AgentPhase
from protocol.privacy import AgentPrivacy
from protocol.problems import ProblemType, problem_document
from protocol.signing import Signed, Signer, sign
from protocol.wire import b64u_encode, parse, sha256

WEIGHT = 7
ROUND = 1
ALL = ["ready", "shares", "upload", "part", "complete", "confirm", "reveal"]
Story = Callable[["World"], None]


class KillError(BaseException):
    """Stands for kill -9: nothing after it runs."""


class FakeTransport:
    """By the names of `Transport`; every message goes through its JSON."""

    def __init__(self, world: "World") -> None:
        self.world, self.host = world, world.host

    def _carry(self, kind: str, key: object, body: bytes, take: Callable[[], Any]) -> Any:
        self.world.point(f"before {kind} leaves")
        self.world.sent.append((kind, key, body))
        self.world.calls.append(kind)
        try:
            answer = take()
        except self.world.refusal as error:
            document = problem_document(error.problem, detail="told so", server_time=1.0)
            raise RefusedError(document) from None
        self.world.point(f"after {kind} left")
        return answer

    def _kept(self) -> AttemptState:
        """Guarantee 1: what leaves is in the journal already."""
        state = self.world.journal.attempt(ROUND)
        assert state is not None
        return state

    def ready(self, ready: Signed[Ready]) -> Acknowledged:
        assert self._kept().ready == ready
        body = ready.canonical()
        return self._carry(
            "ready",
            ready.body.attempt,
            body,
            lambda: self.host.take_ready(parse(Signed[Ready], body)),
        )

    def cell_news(
        self, *, round_number: int, attempt: int, phase: AgentPhase, wait_s: float
    ) -> CellNews:
        assert round_number == ROUND
        self.world.calls.append("news")
        self.world.point(f"before news for {phase.value}")
        return parse(CellNews, self.host.news(attempt, phase).canonical())

    def shares(self, shares: Shares, *, round_number: int) -> Acknowledged:
        assert self._kept().shares == shares
        body, key = shares.canonical(), shares.header.body.transcript
        return self._carry("shares", key, body, lambda: self.host.take_shares(parse(Shares, body)))

    def complain(self, complaint: Signed[Complaint], *, round_number: int) -> Acknowledged:
        assert complaint in self._kept().complaints
        body, key = complaint.canonical(), complaint.body.dealer.body.agent
        return self._carry(
            "complaint",
            key,
            body,
            lambda: self.host.take_complaint(parse(Signed[Complaint], body)),
        )

    def begin_masked_upload(
        self, header: Signed[MaskedHeader], *, round_number: int
    ) -> UploadStatus:
        assert self._kept().upload == header
        body, key = header.canonical(), header.body.transcript
        return self._carry(
            "upload", key, body, lambda: self.host.begin_upload(parse(Signed[MaskedHeader], body))
        )

    def put_part(self, upload: Upload, part: int, data: bytes) -> UploadStatus:
        assert len(data) == upload.head.part_n_bytes(part)
        self.world.remember(upload.attempt)
        return self._carry(
            "part",
            (upload.attempt, part),
            data,
            lambda: self.host.put_part(upload.attempt, part, data),
        )

    def complete(self, upload: Upload) -> UploadStatus:
        return self._carry(
            "complete", upload.attempt, b"", lambda: self.host.complete(upload.attempt)
        )

    def confirm(self, confirm: Confirm, *, round_number: int) -> Acknowledged:
        assert self._kept().confirm == confirm
        body = confirm.canonical()
        return self._carry(
            "confirm",
            confirm.transcript,
            body,
            lambda: self.host.take_confirm(parse(Confirm, body)),
        )

    def reveal(self, reveal: Signed[Reveal], *, round_number: int) -> Acknowledged:
        assert self._kept().reveal == reveal
        body, key = reveal.canonical(), reveal.body.transcript
        return self._carry(
            "reveal", key, body, lambda: self.host.take_reveal(parse(Signed[Reveal], body))
        )


@dataclass
class World:
    """A played server, and one agent's masked rounds, which may be killed and started again."""

    host: Any
    home: AgentHome
    key: Signer
    clock: Any
    refusal: type[Exception]
    owners: OwnersCell = field(default_factory=OwnersCell)
    fuse: int | None = None
    """At which point from now on the process is killed."""
    points: list[str] = field(default_factory=list)
    sent: list[tuple[str, object, bytes]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    told: list[tuple[str, str]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    states: dict[int, AttemptState] = field(default_factory=dict)
    """Attempts as they stood when their masked update began to leave."""
    words: dict[int, bytes] = field(default_factory=dict)
    """The words file at those times."""
    make_transport: Callable[["World"], Any] = FakeTransport

    def __post_init__(self) -> None:
        self.home.create()
        n_values = self.host.plan.layout.n_values
        self.vector = np.random.default_rng(9).normal(0.0, 0.1, n_values).astype(np.float32)
        self.journal = Journal(self.home.journal_path)
        self.journal.join(url="https://h", federation=self.host.federation, data="x", now=1.0)
        self.journal.set_credential(self.host.credential(self.key.identity))

    def point(self, name: str) -> None:
        """Somewhere that a kill may come."""
        self.points.append(name)
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise KillError

    def remember(self, attempt: int) -> None:
        state = self.journal.attempt(ROUND)
        assert state is not None
        self.states[attempt] = state
        self.words[attempt] = self.home.encoded_update(ROUND, 1).read_bytes()

    def start(self) -> MaskedRounds:
        """A new process on the same home."""
        self.journal.close()
        self.journal = Journal(self.home.journal_path)
        membership = self.journal.membership()
        assert membership is not None
        return MaskedRounds(
            member=Member(
                home=self.home,
                journal=self.journal,
                membership=membership,
                signer=self.key,
                owners_cell=self.owners,
            ),
            masking=self.host.masking,
            turns=self.host.turns,
            transport=self.make_transport(self),
            clock=self.clock,
            say=lambda kind, text: self.told.append((kind, text)),
            wait=self.waits.append,
        )

    def step(self, rounds: MaskedRounds) -> bool:
        """One turn of an agent's loop; False when there is nothing left to do in the round."""
        part = self.journal.open_part()
        if part is None:
            if self.journal.parts():
                return False
            part = self.journal.begin_part(self.host.signed_round, now=1.0)
        if part.trained:
            rounds.turn(part)
        else:
            rounds.keep(part, PlainUpdate(vector=self.vector, weight=WEIGHT))
        return True

    def work(self) -> None:
        """A process from its start until the round is over."""
        rounds = self.start()
        for _ in range(60):
            if not self.step(rounds):
                return
        pytest.fail("the round does not end")

    def work_until(self, phase: AgentPhase) -> MaskedRounds:
        """A process that has come to a phase, and has journalled it."""
        rounds = self.start()
        for _ in range(60):
            self.step(rounds)
            if self.phases()[-1] is phase:
                return rounds
        pytest.fail(f"it never came to {phase.value}")

    def phases(self) -> list[AgentPhase]:
        return [part.phase for part in self.journal.parts()]

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.sent]

    def notes(self) -> list[str]:
        return [part.note for part in self.journal.parts()]


@pytest.fixture
def make_world(
    make_host: Callable[..., Any],
    refusal_error: type[Exception],
    agent_key: Signer,
    clock: Any,
    tmp_path: Path,
) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**changes: Any) -> World:
        host = make_host(**changes)
        home = AgentHome(tmp_path / f"home-{len(worlds)}")
        world = World(host, home, agent_key, clock, refusal_error)
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        world.journal.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.fixture
def kill_at_writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[World], None]:
    """Makes a point before and after each write to the journal, and each file that comes, goes."""
    worlds: list[World] = []

    def around(owner: Any, name: str, what: Callable[..., str | None]) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            label = what(*args)
            if label is None or not worlds:
                return real(*args, **kwargs)
            worlds[-1].point(f"before {label}")
            answer = real(*args, **kwargs)
            worlds[-1].point(f"after {label}")
            return answer

        monkeypatch.setattr(owner, name, wrapped)

    for name in ("move_part", "save_attempt", "fail_attempt", "end_part"):
        around(Journal, name, lambda *_, name=name: f"journal.{name}")
    own = (".words", ".masked", ".words.partial", ".masked.partial")
    around(
        Path,
        "replace",
        lambda path, _: f"{path.name} takes its name" if path.name.endswith(own) else None,
    )
    around(
        Path,
        "unlink",
        lambda path, **_: f"{path.name} is removed" if path.name.endswith(own) else None,
    )
    return worlds.append


@pytest.fixture
def n_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each encoding of an update."""
    found: list[int] = []
    real = masked_module.encode

    def encode(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(masked_module, "encode", encode)
    return found


def masking(**changes: Any) -> CellMasking:
    values = {"max_change": 1.0, "clip_norm": 20.0, "cell_target": 5, "ready_delay_s": 0.0}
    return CellMasking(**{**values, **changes})


def masked_words(world: World, attempt: int) -> Any:
    """What an attempt masked, from its vector and its own secrets; check words included."""
    state, host = world.states[attempt], world.host
    plan = SecAggAgent(world.key, host.policy, state).mask_plan()
    found = host.cells[attempt].body().copy()
    masks = [Mask(seed=mask.seed, sign=-1 if mask.sign == 1 else 1) for mask in plan.masks]
    MaskAdder(masks, word_bits=host.plan.word_bits).add(found)
    kept = np.frombuffer(world.words[attempt], host.plan.dtype)
    expected = with_checks(kept, plan.checks, host.plan, 0, host.plan.n_words)
    return found, expected


def assert_nothing_was_made_twice(world: World) -> None:
    """For each message one body, for one transcript; both attempts mask the same words."""
    made: dict[tuple[str, object], set[bytes]] = {}
    for kind, key, body in world.sent:
        made.setdefault((kind, key), set()).add(body)
    assert {key: len(bodies) for key, bodies in made.items() if len(bodies) > 1} == {}
    for attempt in world.states:
        found, expected = masked_words(world, attempt)
        assert np.array_equal(found, expected), f"attempt {attempt} masks other words"
    assert len(set(world.words.values())) <= 1


def assert_the_sum_is_exact(world: World) -> None:
    cell, words = world.host.cell, np.frombuffer(next(iter(world.words.values())), "<u2")
    others = [cell.payloads[name] for name in cell.book.uploads if name != cell.me]
    assert np.array_equal(cell.sum(), sum(others, start=words.copy()))


# Stories: what the server does, and how the round must end whatever kills the agent


def honest(world: World) -> None:
    """Everything goes well."""


def with_a_complaint(world: World) -> None:
    """A member seals garbage for this agent."""

    def deal(cell: Any, agent: SecAggAgent) -> Shares:
        shares = agent.receive_roster(cell.listed, cell.roster)
        if agent is not cell.others[0]:
            return shares
        body = shares.header.body
        texts = list(shares.ciphertexts)
        texts[cell.book.cell.place(body.agent, cell.me)] = bytes(82)
        digests = tuple(sha256(text) for text in texts)
        false = type(body)(**{**dict(body), "ciphertexts": digests})
        garbled = Shares(
            header=sign(agent._signer, "shares", false).signed, ciphertexts=tuple(texts)
        )
        agent.state = agent.state.model_copy(update={"shares": garbled})
        return garbled

    world.host.deal = deal


def failing(phase: AgentPhase, *attempts: int) -> Story:
    """The cell of these attempts fails when the agent stands at a phase."""

    def tell(world: World) -> None:
        world.host.says[phase] = lambda cell: (
            cell.failed() if cell.ready.body.attempt in attempts else cell.honest_news(phase)
        )

    return tell


def two_parts(world: World) -> None:
    """The vector has several parts, and one is lost on the way."""
    world.host.refuses["complete"] = [ProblemType.INCOMPLETE]


STORIES: dict[str, tuple[Story, list[str], AgentPhase]] = {
    "honest": (honest, ALL, AgentPhase.REVEALED),
    "complaint": (
        with_a_complaint,
        [*ALL[:2], "complaint", *ALL[2:]],
        AgentPhase.REVEALED,
    ),
    "failed-before-shares": (
        failing(AgentPhase.READY, 1),
        [*ALL[:1], *ALL],
        AgentPhase.REVEALED,
    ),
    "failed-before-upload": (
        failing(AgentPhase.SHARED, 1),
        [*ALL[:2], *ALL],
        AgentPhase.REVEALED,
    ),
    "failed-after-upload": (
        failing(AgentPhase.UPLOADED, 1),
        [*ALL[:5], *ALL],
        AgentPhase.REVEALED,
    ),
    "failed-twice-after-upload": (
        failing(AgentPhase.UPLOADED, 1, 2),
        [*ALL[:5], *ALL[:5]],
        AgentPhase.ABANDONED,
    ),
    "failed-after-confirm": (
        failing(AgentPhase.CONFIRMED, 1),
        ALL[:6],
        AgentPhase.ABANDONED,
    ),
    "a-second-try-to-upload": (
        two_parts,
        [*ALL[:5], "upload", "complete", *ALL[5:]],
        AgentPhase.REVEALED,
    ),
}


@pytest.mark.parametrize("story", STORIES)
def test_a_round_takes_these_steps(
    make_world: Callable[..., World], n_encoded: list[int], story: str
) -> None:
    tell, kinds, end = STORIES[story]
    world = make_world()
    tell(world)
    world.work()
    assert world.kinds() == kinds
    assert world.phases() == [end]
    assert len(n_encoded) == 1
    assert_nothing_was_made_twice(world)
    if end is AgentPhase.REVEALED:
        assert_the_sum_is_exact(world)
    assert world.home.update_files() == []
    assert world.journal.attempt(ROUND) is None


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize(
    "story",
    [
        pytest.param("honest", marks=pytest.mark.slow),  # "complaint" has all of its steps
        "complaint",
        pytest.param("failed-before-shares", marks=pytest.mark.slow),
        "failed-before-upload",
        "failed-after-upload",
        "failed-twice-after-upload",
        "failed-after-confirm",
        pytest.param("a-second-try-to-upload", marks=pytest.mark.slow),
    ],
)
def test_guarantees_1_and_2_killed_anywhere_it_repeats_what_it_made_and_makes_nothing_else(
    make_world: Callable[..., World],
    kill_at_writes: Callable[[World], None],
    n_encoded: list[int],
    story: str,
    half: int,
) -> None:
    """Before and after every write and every message, one world for each such point."""
    tell, kinds, end = STORIES[story]
    whole = make_world()
    kill_at_writes(whole)
    tell(whole)
    whole.work()
    assert len(whole.points) > 20
    for index, name in list(enumerate(whole.points))[half::2]:
        where = f"killed {name} ({index})"
        n_encoded.clear()
        world = make_world()
        kill_at_writes(world)
        tell(world)
        world.fuse = index
        with pytest.raises(KillError):
            world.work()
        (part,) = world.journal.parts()
        world.work()
        assert world.phases() == [end], where
        assert set(world.kinds()) == set(kinds), where
        assert world.host.cells.keys() == whole.host.cells.keys(), where
        assert len(n_encoded) == (1 if part.trained else 2), where
        assert_nothing_was_made_twice(world)
        if end is AgentPhase.REVEALED:
            assert_the_sum_is_exact(world)
        assert world.journal.attempt(ROUND) is None, where
        if not part.ended:  # else they go with the next update
            assert world.home.update_files() == [], where
        world.journal.close()


def test_what_a_kill_left_behind_goes_with_the_next_update(world: World) -> None:
    """Killed after the end was journalled, before the files were removed."""
    for path in (world.home.encoded_update(0, 1), world.home.masked_update(0, 2)):
        path.write_bytes(b"an old update")
    world.work()
    assert world.home.update_files() == []


@pytest.mark.parametrize("story", ["honest", "failed-after-upload"])
def test_killed_again_and_again_it_comes_to_its_end(
    make_world: Callable[..., World], kill_at_writes: Callable[[World], None], story: str
) -> None:
    tell, _, end = STORIES[story]
    world = make_world()
    kill_at_writes(world)
    tell(world)
    for n_points in range(1, 40):
        world.fuse = n_points
        with contextlib.suppress(KillError):
            world.work()
            break
    assert world.phases() == [end]
    assert_nothing_was_made_twice(world)
    assert_the_sum_is_exact(world)


def test_killed_between_parts_only_the_missing_ones_follow(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.limits.PART_BYTES", 32)
    monkeypatch.setattr(masked_module, "PART_BYTES", 32)
    world = make_world()
    n_parts = -(-world.host.plan.n_bytes // 32)
    assert n_parts > 3
    real = world.host.put_part

    def put_part(attempt: int, part: int, data: bytes) -> UploadStatus:
        answer = real(attempt, part, data)
        if part == 1 and world.fuse is None and "confirm" not in world.calls:
            world.fuse = 0
        return answer

    world.host.put_part = put_part
    with pytest.raises(KillError):
        world.work()
    assert world.kinds().count("part") == 2
    world.host.put_part = real
    world.work()
    assert [key for kind, key, _ in world.sent if kind == "part"] == [
        (1, index) for index in range(n_parts)
    ]
    assert_the_sum_is_exact(world)


# The words


def test_guarantee_2_the_words_are_made_once_and_are_those_of_the_update(world: World) -> None:
    rounds = world.start()
    assert world.step(rounds)
    (part,) = world.journal.parts()
    data = world.home.encoded_update(ROUND, 1).read_bytes()
    assert part.words_sha256 == sha256(data)
    words = np.frombuffer(data, world.host.plan.dtype)
    assert words[-3:].tolist() == [WEIGHT, 1, 0]
    step = world.host.plan.layout.slots[0].step
    share = WEIGHT / world.host.plan.max_weight
    found = words[:-3].view(np.int16) * step
    assert np.abs(found - world.vector * share).max() <= step


@pytest.mark.parametrize("how", ["changed", "shortened", "removed"])
def test_a_words_file_that_is_no_longer_the_one_that_was_made_is_refused(
    world: World, how: str
) -> None:
    """Other words under a second set of masks would leak; so would a disk that makes them up."""
    rounds = world.work_until(AgentPhase.SHARED)
    path = world.home.encoded_update(ROUND, 1)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    match how:
        case "changed":
            path.write_bytes(data)
        case "shortened":
            path.write_bytes(data[:-2])
        case _:
            path.unlink()
    assert world.step(rounds)  # shares, and the bundle
    with pytest.raises(JournalError, match="round 1"):
        world.step(rounds)
    assert world.kinds() == ["ready", "shares"]


def test_a_words_file_that_is_lost_does_not_hold_the_agent_for_good(world: World) -> None:
    """The cell goes on without it and the round ends: then the agent must be free for the next."""
    rounds = world.work_until(AgentPhase.SHARED)
    world.home.encoded_update(ROUND, 1).unlink()
    assert world.step(rounds)
    with pytest.raises(JournalError):
        world.step(rounds)
    world.host.says[AgentPhase.SHARED] = lambda cell: EndedNews(counted=False)
    world.host.refuses["shares"] = [ProblemType.ROUND_CLOSED]
    world.host.refuses["upload"] = [ProblemType.ROUND_CLOSED]
    world.work()
    assert world.phases() == [AgentPhase.ABANDONED]
    assert world.kinds().count("part") == 0


def test_check_15_an_update_that_is_not_finite_never_leaves(world: World) -> None:
    for value in (np.nan, np.inf, -np.inf):
        world.vector[3] = value
        with pytest.raises(TrainingError, match="not finite"):
            world.work()
        assert world.phases() == [AgentPhase.TRAINING]
    assert world.sent == []
    assert world.home.update_files() == []


def test_check_15_an_update_is_clipped_before_it_leaves(world: World) -> None:
    """Whatever training gave, its norm is the agreed one at most."""
    world.vector[:] = 1e30
    world.work()
    words = np.frombuffer(world.words[1], "<u2")
    plan = world.host.plan
    values = words[:-3].view(np.int16) * np.float64(plan.layout.slots[0].step)
    rounding = np.sqrt(sum(slot.n_values * slot.step**2 for slot in plan.layout.slots))
    assert np.linalg.norm(values) <= WEIGHT / plan.max_weight * plan.clip_norm + rounding
    assert words[-1] == 1


def test_check_18_an_update_that_is_zero_never_leaves(world: World) -> None:
    world.vector[:] = 0.0
    with pytest.raises(TrainingError):
        world.work()
    assert world.sent == []
    assert world.home.update_files() == []


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_what_is_wrong_with_an_update_is_told_by_its_check(world: World, value: float) -> None:
    world.vector[:] = value
    check = "[check 15, not-finite]" if np.isnan(value) else "[check 18, unmoved]"
    with pytest.raises(TrainingError) as refused:
        world.work()
    assert check in str(refused.value)


# Retries


def test_failed_before_upload_is_tried_again_with_fresh_keys(world: World) -> None:
    failing(AgentPhase.SHARED, 1, 2, 3)(world)
    world.work()
    readies = [parse(Signed[Ready], body).body for kind, _, body in world.sent if kind == "ready"]
    assert [ready.attempt for ready in readies] == [1, 2, 3, 4]
    keys = {key for ready in readies for key in (ready.sealing_key, ready.masking_key)}
    assert len(keys) == 8
    assert len({ready.nonce for ready in readies}) == 4
    headers = [parse(Shares, body).header.body for kind, _, body in world.sent if kind == "shares"]
    assert len({header.commitment for header in headers}) == 4
    assert world.phases() == [AgentPhase.REVEALED]


def test_failed_after_upload_is_tried_again_once(world: World) -> None:
    """Retries before the upload do not count: here one before the first, one before the second."""
    host = world.host
    failing_at = {1: AgentPhase.SHARED, 2: AgentPhase.UPLOADED, 3: AgentPhase.SHARED}

    def say(phase: AgentPhase) -> Callable[[Any], Any]:
        return lambda cell: (
            cell.failed()
            if failing_at.get(cell.ready.body.attempt, AgentPhase.UPLOADED) is phase
            else cell.honest_news(phase)
        )

    for phase in (AgentPhase.SHARED, AgentPhase.UPLOADED):
        host.says[phase] = say(phase)
    world.work()
    assert sorted(host.cells) == [1, 2, 3, 4]
    assert sorted(world.states) == [2, 4]
    assert world.phases() == [AgentPhase.ABANDONED]
    assert "its cell failed" in world.notes()[0]
    assert_nothing_was_made_twice(world)


def test_an_update_with_noise_is_uploaded_once_and_never_again(
    make_world: Callable[..., World],
) -> None:
    """P2: the same noise in two sums would be averaged out. Failures before count as ever."""
    world = make_world(
        masking=CellMasking(
            word_bits=32, max_change=1.0, clip_norm=1.0, cell_target=5, ready_delay_s=0.0
        ),
        privacy=AgentPrivacy(
            epsilon=8.0, delta=1e-5, clip_norm=1.0, steps_per_clip=2**16, share_variance=1e6
        ),
        aggregation=AggregationBlock(weighting=Weighting.UNIFORM),
    )
    failing_at = {1: AgentPhase.SHARED, 2: AgentPhase.UPLOADED}

    def say(phase: AgentPhase) -> Callable[[Any], Any]:
        return lambda cell: (
            cell.failed()
            if failing_at.get(cell.ready.body.attempt) is phase
            else cell.honest_news(phase)
        )

    for phase in (AgentPhase.SHARED, AgentPhase.UPLOADED):
        world.host.says[phase] = say(phase)
    world.work()
    assert sorted(world.host.cells) == [1, 2]
    assert world.phases() == [AgentPhase.ABANDONED]
    assert Check.NO_RETRY.sentence in world.notes()[0]


def test_an_upload_that_was_only_announced_counts_as_one(world: World) -> None:
    """Bytes of it may have left: after that there is one more attempt with an upload, no third."""
    host = world.host
    host.refuses["part"] = [ProblemType.STAGE_CLOSED] * 9

    def say(cell: Any) -> Any:
        return (
            cell.failed() if "upload" in world.calls[-4:] else cell.honest_news(AgentPhase.SHARED)
        )

    host.says[AgentPhase.SHARED] = say
    world.work()
    assert world.kinds() == ["ready", "shares", "upload", "part"] * 2
    assert world.phases() == [AgentPhase.ABANDONED]


def test_guarantee_4_failed_after_confirm_is_never_tried_again(world: World) -> None:
    failing(AgentPhase.CONFIRMED, 1)(world)
    world.work()
    assert world.kinds() == ALL[:6]
    assert world.phases() == [AgentPhase.ABANDONED]
    assert world.journal.n_attempts(ROUND) == 1
    world.work()
    assert world.kinds() == ALL[:6]


def test_a_failure_that_allows_no_retry_ends_the_part(world: World) -> None:
    world.host.says[AgentPhase.SHARED] = lambda cell: cell.failed(may_retry=False)
    world.work()
    assert world.kinds() == ["ready", "shares"]
    assert world.phases() == [AgentPhase.ABANDONED]


# The end


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    "phase",
    [AgentPhase.READY, AgentPhase.SHARED, AgentPhase.UPLOADED, AgentPhase.CONFIRMED],
)
def test_ended_at_any_phase_ends_the_part_and_nothing_more_leaves(
    world: World, phase: AgentPhase, counted: bool
) -> None:
    world.host.says[phase] = lambda cell: EndedNews(counted=counted)
    world.work()
    n_sent = {AgentPhase.READY: 1, AgentPhase.SHARED: 2, AgentPhase.UPLOADED: 5}.get(phase, 6)
    assert world.kinds() == ALL[:n_sent]
    (part,) = world.journal.parts()
    assert part.ended
    if phase is AgentPhase.CONFIRMED and counted:
        assert part.phase is AgentPhase.REVEALED
        assert n_accepted(world.journal) == 1
    assert world.journal.attempt(ROUND) is None
    assert world.home.update_files() == []
    world.work()
    assert world.kinds() == ALL[:n_sent]


def test_who_comes_back_when_the_sum_is_known_is_told_that_its_update_is_in_it(
    world: World,
) -> None:
    """Vanished after UPLOAD, it is still summed: `leave` must count it among what cannot return."""
    world.host.says[AgentPhase.UPLOADED] = lambda cell: EndedNews(counted=True)
    world.work()
    assert "without this agent" not in world.notes()[0]
    assert n_accepted(world.journal) == 1


# The cell goes on without a message


@pytest.mark.parametrize("problem", [ProblemType.STAGE_CLOSED, ProblemType.ROUND_CLOSED])
@pytest.mark.parametrize(
    ("kind", "phase"),
    [
        ("ready", AgentPhase.READY),
        ("shares", AgentPhase.SHARED),
        ("upload", AgentPhase.SHARED),
        ("part", AgentPhase.SHARED),
        ("complete", AgentPhase.SHARED),
        ("confirm", AgentPhase.CONFIRMED),
    ],
)
def test_a_message_that_comes_too_late_leads_to_a_question_and_not_to_a_crash(
    world: World, kind: str, phase: AgentPhase, problem: ProblemType
) -> None:
    world.host.refuses[kind] = [problem]

    def gone_on(cell: Any) -> Any:
        late = kind in world.calls
        return EndedNews(counted=False) if late else cell.honest_news(phase)

    world.host.says[phase] = gone_on
    world.work()
    at = world.calls.index(kind)
    assert world.calls[at : at + 2] == [kind, "news"]
    assert world.phases() == [AgentPhase.ABANDONED]
    assert world.kinds().count(kind) == 1


@pytest.mark.parametrize("problem", [ProblemType.STAGE_CLOSED, ProblemType.ROUND_CLOSED])
def test_a_complaint_that_comes_too_late_does_not_stop_the_upload(
    world: World, problem: ProblemType
) -> None:
    with_a_complaint(world)
    world.host.refuses["complaint"] = [problem]
    world.work()
    assert world.phases() == [AgentPhase.REVEALED]
    assert_the_sum_is_exact(world)


@pytest.mark.parametrize("problem", [ProblemType.STAGE_CLOSED, ProblemType.ROUND_CLOSED])
def test_a_reveal_that_comes_too_late_ends_the_part(world: World, problem: ProblemType) -> None:
    world.host.refuses["reveal"] = [problem]
    world.work()
    assert world.phases() == [AgentPhase.REVEALED]
    assert world.journal.open_part() is None


def test_who_is_asked_to_wait_waits_as_long_as_told_and_says_nothing_twice(world: World) -> None:
    host = world.host
    left = 3

    def wait(cell: Any) -> Any:
        nonlocal left
        left -= 1
        return NoNews(retry_after_s=2.5) if left >= 0 else cell.honest_news(AgentPhase.READY)

    host.says[AgentPhase.READY] = wait
    world.work()
    assert world.waits == [2.5] * 3
    assert world.kinds() == ALL


# Complaints


def test_garbage_from_a_dealer_is_complained_of_and_the_round_goes_on(world: World) -> None:
    with_a_complaint(world)
    world.work()
    (complaint,) = (
        parse(Signed[Complaint], body).body for kind, _, body in world.sent if kind == "complaint"
    )
    cell = world.host.cell
    dealer = cell.others[0]._signer.identity
    assert complaint.dealer.body.agent == dealer
    assert complaint.ciphertext == bytes(82)
    assert [kind for kind, _ in world.told].count("complaint") == 1
    (reveal,) = (
        parse(Signed[Reveal], body).body for kind, _, body in world.sent if kind == "reveal"
    )
    assert dict(reveal.self_shares)[dealer] == MISSING_SHARE
    assert [share for _, share in reveal.self_shares].count(MISSING_SHARE) == 1
    assert_the_sum_is_exact(world)


# Secrets


def _secrets(state: AttemptState) -> list[bytes]:
    given = [share for item in state.received for share in (item.self_share, item.mask_share)]
    assert given
    return [state.self_seed, state.sealing_private_key, state.masking_private_key, *given]


def _found(home: AgentHome, secrets: list[bytes]) -> list[bytes]:
    """Which secrets stand in any file of the journal, raw or as base64url."""
    kept = b"".join(path.read_bytes() for path in home.root.glob("journal.sqlite*"))
    return [s for s in secrets if s in kept or b64u_encode(s).encode() in kept]


@pytest.mark.parametrize(
    "story", ["honest", "failed-after-upload", "failed-twice-after-upload", "failed-after-confirm"]
)
def test_check_8_secrets_are_gone_from_the_journal_when_an_attempt_is_over(
    make_world: Callable[..., World], story: str
) -> None:
    """Once the journal was closed: `secure_delete` overwrites pages, and the write-ahead log goes.

    The limit: a process that is killed leaves the log with its traces until the next start closes
    it, and flash storage may keep what was overwritten.
    """
    world = make_world()
    STORIES[story][0](world)
    world.work()
    world.journal.close()
    assert world.states
    for state in world.states.values():
        assert _found(world.home, _secrets(state)) == []


def test_the_search_for_secrets_finds_them_while_an_attempt_lives(world: World) -> None:
    world.work_until(AgentPhase.UPLOADED)
    world.journal.close()
    secrets = _secrets(world.states[1])
    assert _found(world.home, secrets) == secrets
    with contextlib.closing(sqlite3.connect(world.home.journal_path)) as database:
        assert database.execute("SELECT count(*) FROM attempts").fetchone() == (1,)


def test_check_8_secrets_of_a_failed_attempt_are_gone_while_the_next_one_lives(
    world: World,
) -> None:
    failing(AgentPhase.UPLOADED, 1)(world)
    rounds = world.work_until(AgentPhase.UPLOADED)
    world.step(rounds)
    assert world.journal.attempt(ROUND).ready.body.attempt == 2
    world.journal.close()
    assert _found(world.home, _secrets(world.states[1])) == []


def test_what_the_owner_is_told_holds_no_secret(world: World) -> None:
    with_a_complaint(world)
    world.work()
    text = repr(world.told) + repr(world.journal.parts()) + repr(world.states[1])
    for secret in _secrets(world.states[1]):
        if secret != MISSING_SHARE:
            assert secret.hex() not in text
            assert b64u_encode(secret) not in text
            assert repr(secret) not in text


# The delay before READY


@pytest.mark.parametrize(
    ("drawn", "waited"), [(lambda n: 0, 0.0), (lambda n: n - 1, 10.0), (lambda n: n // 2, 5.0)]
)
def test_ready_leaves_after_a_delay_between_nothing_and_the_agreed_one(
    make_world: Callable[..., World],
    monkeypatch: pytest.MonkeyPatch,
    drawn: Callable[[int], int],
    waited: float,
) -> None:
    monkeypatch.setattr("edge_agent.masked.secrets.randbelow", drawn)
    world = make_world(masking=masking(ready_delay_s=10.0))
    failing(AgentPhase.UPLOADED, 1)(world)
    n_sent = []
    real = world.waits.append
    rounds = world.start()
    rounds._wait = lambda duration_s: (real(duration_s), n_sent.append(len(world.sent)))
    while world.step(rounds):
        pass
    assert world.waits == [pytest.approx(waited)]  # once: a retry's time tells nothing of training
    assert n_sent == [0]


def test_the_delay_before_ready_is_drawn_anew_each_time(make_world: Callable[..., World]) -> None:
    waits = []
    for _ in range(30):
        world = make_world(masking=masking(ready_delay_s=10.0))
        rounds = world.start()
        world.step(rounds)
        world.step(rounds)
        waits += world.waits
        world.journal.close()
    assert len(waits) == 30
    assert all(0.0 <= wait <= 10.0 for wait in waits)
    assert len(set(waits)) > 20
    assert min(waits) < 5.0 < max(waits)


def test_no_delay_is_waited_for_where_none_was_agreed(world: World) -> None:
    world.work()
    assert world.waits == []


# What the owner sees of it


def test_sent_lists_every_body_of_a_masked_round(
    make_world: Callable[..., World],
    serve: Callable[[Any], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = make_world()
    url = serve(world.host)

    def transport(of: World) -> Transport:
        found = Transport(
            url,
            clock=of.clock,
            signer=of.key,
            on_outgoing=record_outgoing(of.journal, of.clock),
            patience_s=5.0,
        )
        found.use_federation(of.host.manifest)
        opened.append(found)
        return found

    opened: list[Transport] = []
    world.make_transport = transport
    monkeypatch.setattr(Transport, "put_part", _remembering(world, Transport.put_part))
    world.work()
    world.journal.close()
    opened[0].close()
    monkeypatch.setattr(
        sys, "argv", ["sheepfold-agent", "sent", "--home", str(world.home.root), "--json", "-"]
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in {0, None}
    listed = json.loads(capsys.readouterr().out)
    assert [item["what"] for item in listed] == [
        "ready",
        "shares",
        "masked-upload-header",
        "masked update part 1 of 1",
        "confirm",
        "reveal",
    ]
    bodies = [body for kind, body in world.host.arrived if kind != "complete"]
    assert [item["n_bytes"] for item in listed] == [len(body) for body in bodies]
    assert [item["sha256"] for item in listed] == [sha256(body).hex() for body in bodies]
    assert {item["round"] for item in listed} == {ROUND}
    assert {item["host"] for item in listed} == {url.removeprefix("http://")}
    assert_the_sum_is_exact(world)


def _remembering(world: World, real: Callable[..., UploadStatus]) -> Callable[..., UploadStatus]:
    def put_part(self: Transport, upload: Upload, part: int, data: bytes) -> UploadStatus:
        world.remember(upload.attempt)
        return real(self, upload, part, data)

    return put_part


# Memory


def test_masking_a_large_update_holds_little_of_it(make_world: Callable[..., World]) -> None:
    """20 million parameters under five masks: what is allocated at once stays below 64 MiB."""
    layout = VectorLayout.of_shapes({"a": (20_000_000,)})
    world = make_world(layout=layout)
    host = world.host

    def bundle(cell: Any) -> Any:
        if "bundle" in cell.played:
            return NoNews(retry_after_s=1.0)
        cell.played.add("bundle")
        cell.share()
        cell.book.close_sharing()
        return BundleNews(bundle=cell.book.bundle_for(cell.me))

    host.says[AgentPhase.SHARED] = bundle
    host.refuses["upload"] = [ProblemType.STAGE_CLOSED]
    rounds = world.work_until(AgentPhase.SHARED)
    world.step(rounds)  # the bundle
    state = world.journal.attempt(ROUND)
    assert state is not None
    assert len(state.headers) == 5
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        world.step(rounds)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert world.kinds()[-1] == "upload"
    assert world.home.masked_update(ROUND, 1).stat().st_size == host.plan.n_bytes > 40_000_000
    assert peak - before < 64 * MIB
