"""The agent's loop on a real base, against a server that stands in for the transport."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_agent import agent as agent_module
from edge_agent.agent import Agent, AgentEventReport
from edge_agent.data.records import OnMalformed, Record
from edge_agent.data.tokens import tokenize
from edge_agent.errors import (
    CheckpointError,
    JournalError,
    OutOfMemoryError,
    RefusedError,
    TrainingError,
    TrustError,
    UnreachableError,
)
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from edge_agent.member import Member
from edge_agent.newest import newest_release
from edge_agent.politeness import OwnersWishes
from edge_agent.training.trainer import LocalTrainer, TrainingProgress
from edge_agent.transport import Upload as SentUpload
from protocol.blocks import (
    SENT,
    AggregationBlock,
    ChangeLimitsBlock,
    Factor,
    LoraBlock,
    LoraRule,
    RoundsBlock,
    TrainingBlock,
    Weighting,
)
from protocol.chain import AggregationReport, BlobRef, Release, RoundManifest
from protocol.layout import VectorLayout
from protocol.manifest import FederationManifest
from protocol.messages import (
    Acknowledged,
    Credential,
    ReleasePage,
    TaskReply,
    TrainTask,
    UploadHeader,
    UploadState,
    UploadStatus,
    WaitReason,
    WaitTask,
    Withdrawal,
    WithdrawalReason,
)
from protocol.phases import AgentPhase
from protocol.privacy import ExamplePrivacy
from protocol.problems import ProblemType, problem_document
from protocol.signing import Signed, Signer, sign, verify
from protocol.wire import sha256
from quant.adapter import (
    AdapterArrays,
    adapter_shapes,
    factor_of,
    initial_adapter,
    peft_config,
    sent_layout,
    to_safetensors,
    unflatten,
    vector_from_bytes,
)
from quant.base_model import LoadedBase, load_base
from quant.lora_turns import turn_layouts

N_STEPS = 3
ROWS = 8


class KillError(BaseException):
    """Stands for kill -9: nothing after it runs."""


def refusal(problem: ProblemType) -> RefusedError:
    return RefusedError(problem_document(problem, detail="", server_time=1.0))


@dataclass
class Upload:
    """An upload as the server has it."""

    header: Signed[UploadHeader]
    parts: dict[int, bytes] = field(default_factory=dict)
    accepted: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.parts[index] for index in sorted(self.parts))


class FakeServer:
    """Has the methods of `Transport`; averages what one agent uploads, and publishes it.

    `faults` holds, for the name of a method, what its next calls do before their work: an error is
    raised, a callable is called. `faults_after` the same after their work, when the answer is lost.
    """

    def __init__(self, key: Signer, manifest: FederationManifest, start: AdapterArrays) -> None:
        self.key = key
        self.manifest = manifest
        self.shapes = {name: array.shape for name, array in start.items()}
        self.layout = sent_layout(self.shapes, manifest.lora.sent)
        self.layouts = turn_layouts(manifest.lora.rule, self.shapes)
        self.start = start
        self.adapters: list[AdapterArrays] = []
        self.releases: list[Signed[Release]] = []
        self.rounds: list[Signed[RoundManifest]] = []
        self.blobs: dict[bytes, bytes] = {}
        self.uploads: dict[tuple[int, int], Upload] = {}
        self.withdrawals: list[Withdrawal] = []
        self.fetched: list[bytes] = []
        self.calls: list[str] = []
        self.faults: dict[str, list[Any]] = {}
        self.faults_after: dict[str, list[Any]] = {}
        self.idle: Callable[[], None] = lambda: None
        self.page_size = 100
        self.publish(start)

    def _begin(self, name: str) -> None:
        self.calls.append(name)
        self._fault(self.faults, name)

    def _end(self, name: str) -> None:
        self._fault(self.faults_after, name)

    @staticmethod
    def _fault(faults: dict[str, list[Any]], name: str) -> None:
        if queue := faults.get(name):
            fault = queue.pop(0)
            if callable(fault):
                fault()
            elif fault is not None:
                raise fault

    def _blob(self, data: bytes) -> BlobRef:
        self.blobs[sha256(data)] = data
        return BlobRef(sha256=sha256(data), n_bytes=len(data))

    def layout_at(self, release: int) -> VectorLayout:
        """Of what is sent in a round that starts from a release."""
        return self.layouts[release % len(self.layouts)]

    def publish(self, arrays: AdapterArrays, **changes: Any) -> Release:
        """The next release."""
        number = len(self.releases)
        made_by = self.rounds[-1].body.digest() if self.rounds else bytes(32)
        changed = self.layout_at(max(0, number - 1))
        sent = {slot.name: arrays[slot.name] for slot in changed.slots}
        values = {
            "federation": self.manifest.federation,
            "number": number,
            "round": number,
            "previous": self.releases[-1].body.digest() if number else None,
            "federation_digest": self.manifest.digest(),
            "round_digest": None if number == 0 or "rolled_back_to" in changes else made_by,
            "adapter": self._blob(to_safetensors(arrays)),
            "sent": self._blob(to_safetensors(sent)),
            "config": self._blob(peft_config(self.manifest.base, self.manifest.lora)),
            "accepted": (),
            "rejected": (),
            "aggregation": AggregationReport(
                rule="fedavg" if number else "none", n_cells=1, n_agents=1, update_norm=1.0
            ),
            "filter": {"rule": "none", "n_cells": 0, "n_rejected": 0},
            "verdict": {"rule": "none", "accepted": True},
            "created_at": 1.0,
        }
        release = Release(**{**values, **changes})
        self.releases.append(sign(self.key, "release", release).signed)
        self.adapters.append(arrays)
        return release

    def open_round(self, key: Signer | None = None, **changes: Any) -> RoundManifest:
        """The next round, from the newest release."""
        newest = self.releases[-1].body
        number = self.rounds[-1].body.round + 1 if self.rounds else 1
        n_rounds = self.manifest.rounds.n_rounds
        values = {
            "federation": self.manifest.federation,
            "federation_digest": self.manifest.digest(),
            "round": number,
            "release": newest.number,
            "release_digest": newest.digest(),
            "sent": newest.sent,
            "selection_seed": bytes(32),
            "cohort_size": 1,
            "schedule_start": min(1.0, (number - 1) / n_rounds),
            "schedule_end": min(1.0, number / n_rounds),
            "update_n_bytes": self.layout_at(newest.number).n_bytes,
            "opened_at": 1.0,
            "deadline_at": 2e9,
            "cap_at": 2e9,
        }
        manifest = RoundManifest(**{**values, **changes})
        self.rounds.append(sign(key or self.key, "round", manifest).signed)
        return manifest

    def close_round(self) -> None:
        """Average the one upload into the next release."""
        upload = self.accepted()[-1]
        layout = self.layout_at(self.releases[-1].body.number)
        update = unflatten(vector_from_bytes(upload.body, layout), layout)
        arrays = dict(self.adapters[-1])
        arrays |= {name: arrays[name] + change for name, change in update.items()}
        self.publish(arrays)

    def accepted(self) -> list[Upload]:
        return [upload for upload in self.uploads.values() if upload.accepted]

    # What `Transport` has

    def take_received_bytes(self) -> int:
        return 10

    def task(self, *, after: int, wait_s: float) -> TaskReply:
        self._begin("task")
        newest = self.releases[-1].body.number
        if self.rounds and self.rounds[-1].body.round > after:
            return TaskReply(task=TrainTask(round=self.rounds[-1]), newest_release=newest)
        finished = newest == self.manifest.rounds.n_rounds
        reason = WaitReason.FINISHED if finished else WaitReason.ROUND_ENDING
        self.idle()
        return TaskReply(task=WaitTask(reason=reason, retry_after_s=5.0), newest_release=newest)

    def releases_after(self, after: int) -> tuple[Signed[Release], ...]:
        return tuple(self.releases[after + 1 : after + 1 + self.page_size])

    def releases_page(self, *, after: int) -> ReleasePage:
        self._begin("releases")
        newest = self.releases[-1].body.number
        return ReleasePage(releases=self.releases_after(after), newest=newest)

    def fetch(self, ref: BlobRef, folder: Path) -> Path:
        self._begin("fetch")
        path = folder / ref.sha256.hex()
        if not path.exists():
            self.fetched.append(ref.sha256)
            path.write_bytes(self.blobs[ref.sha256])
        return path

    def begin_upload(self, header: Signed[UploadHeader]) -> UploadStatus:
        self._begin("begin_upload")
        key = (header.body.round, header.body.attempt)
        upload = self.uploads.setdefault(key, Upload(header))
        if upload.header != header:
            raise refusal(ProblemType.CONFLICT)
        self._end("begin_upload")
        return self._status(upload)

    def put_part(self, sent: SentUpload, part: int, data: bytes) -> UploadStatus:
        self._begin("put_part")
        upload = self.uploads[sent.round, sent.attempt]
        assert len(data) == sent.head.part_n_bytes(part)
        upload.parts[part] = data
        self._end("put_part")
        return self._status(upload)

    def complete(self, sent: SentUpload) -> UploadStatus:
        self._begin("complete")
        upload = self.uploads[sent.round, sent.attempt]
        if len(upload.parts) < sent.head.n_parts:
            raise refusal(ProblemType.INCOMPLETE)
        if sha256(upload.body) != sent.head.body_sha256:
            upload.parts.clear()
            raise refusal(ProblemType.DIGEST_MISMATCH)
        upload.accepted = True
        self._end("complete")
        return self._status(upload)

    def withdraw(self, withdrawal: Signed[Withdrawal]) -> Acknowledged:
        self._begin("withdraw")
        self.withdrawals.append(withdrawal.body)
        return Acknowledged()

    @staticmethod
    def _status(upload: Upload) -> UploadStatus:
        if upload.accepted:
            return UploadStatus(state=UploadState.ACCEPTED, missing=())
        missing = (i for i in range(upload.header.body.n_parts) if i not in upload.parts)
        return UploadStatus(state=UploadState.RECEIVING, missing=tuple(missing))


# `Transport.releases` is a method, and here a list has that name.
class FakeTransport:
    """The server, by the names of `Transport`."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, "releases_page" if name == "releases" else name)


@dataclass
class World:
    """A federation of one agent, which may be killed and started again."""

    server: FakeServer
    agent_key: Signer
    base_dir: Path
    home: AgentHome
    clock: Any
    rows: int = ROWS
    events: list[AgentEventReport] = field(default_factory=list)
    journals: list[Journal] = field(default_factory=list)
    on_event: Callable[[AgentEventReport], None] = lambda event: None

    @property
    def journal(self) -> Journal:
        return self.journals[-1]

    def start(self) -> Agent:
        """A new process: journal, base and agent anew; the home stays."""
        self.home.create()
        journal = Journal(self.home.journal_path)
        self.journals.append(journal)
        if journal.membership() is None:
            federation = sign(self.server.key, "federation", self.server.manifest).signed
            journal.join(url="https://h", federation=federation, data="x", now=1.0)
            credential = Credential(
                federation=self.server.manifest.federation,
                agent=self.agent_key.identity,
                expires_at=2_000_000_000,
            )
            journal.set_credential(sign(self.server.key, "credential", credential).signed)
        membership = journal.membership()
        assert membership is not None
        base = load_base(self.base_dir)
        records = [
            Record(
                instruction=f"Say {k}.",
                context="",
                response=f"Anna has {k} green boats.",
                source=f"made[{k}]",
                category=None,
                messages=None,
            )
            for k in range(self.rows)
        ]
        block = self.server.manifest.training
        data = tokenize(
            records,
            base.tokenizer,
            template=block.template,
            loss_on=block.loss_on,
            max_length=block.max_length,
            on_malformed=OnMalformed.FAIL,
        )
        self.wishes = OwnersWishes(journal, self.clock, None)
        self.server.idle = self.wishes.stop
        return Agent(
            member=Member(
                home=self.home, journal=journal, membership=membership, signer=self.agent_key
            ),
            transport=FakeTransport(self.server),  # type: ignore[arg-type]
            base=base,
            data=data,
            wishes=self.wishes,
            clock=self.clock,
            on_event=self._note,
        )

    def _note(self, event: AgentEventReport) -> None:
        self.events.append(event)
        self.on_event(event)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events if event.kind != "progress"]

    def steps(self) -> list[int]:
        return [event.progress.step for event in self.events if event.progress is not None]

    def phases(self) -> list[AgentPhase]:
        return [part.phase for part in self.journal.parts()]

    def files(self) -> list[str]:
        return sorted(
            [path.name for path in self.home.updates.iterdir()]
            + [path.name for path in self.home.root.glob("training*")]
        )


@pytest.fixture
def make_world(
    random_base: LoadedBase,
    random_base_dir: Path,
    server_key: Signer,
    agent_key: Signer,
    make_manifest: Callable[..., FederationManifest],
    clock: Any,
    tmp_path: Path,
) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(
        *,
        rule: LoraRule = LoraRule.FEDIT,
        n_steps: int = N_STEPS,
        dropout: float = 0.0,
        name: str = "home",
        **changes: Any,
    ) -> World:
        lora = LoraBlock(
            rank=2,
            alpha=4.0,
            dropout=dropout,
            target_modules=("q_proj", "v_proj"),
            sent=SENT[rule],
            rule=rule,
            init_seed=7,
        )
        shapes = adapter_shapes(random_base.description, lora)
        values = {
            "base": random_base.description.base,
            "lora": lora,
            "layout": sent_layout(shapes, lora.sent).digest(),
            "training": TrainingBlock(
                local_steps=n_steps, batch_size=4, learning_rate=1e-2, max_length=128
            ),
            "rounds": RoundsBlock(n_rounds=2, cohort_target=1, min_cohort=1),
            **changes,
        }
        manifest = make_manifest(**values)
        server = FakeServer(server_key, manifest, initial_adapter(random_base.description, lora))
        world = World(server, agent_key, random_base_dir, AgentHome(tmp_path / name), clock)
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        for journal in world.journals:
            journal.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.fixture
def never_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: object, **kwargs: object) -> None:
        pytest.fail("something was trained")

    monkeypatch.setattr(LocalTrainer, "run", train)


# A round


def test_a_whole_round(world: World) -> None:
    manifest = world.server.open_round()
    world.start().run()
    (upload,) = world.server.accepted()
    header = verify(upload.header, "upload", key=world.agent_key.identity).body
    assert (header.round, header.attempt, header.weight) == (1, 1, ROWS)
    assert header.round_digest == manifest.digest()
    assert header.layout == world.server.layout.digest() == world.server.manifest.layout
    assert header.body_sha256 == sha256(upload.body)
    vector = vector_from_bytes(upload.body, world.server.layout)
    assert np.isfinite(vector).all()
    assert vector.any()
    assert world.phases() == [AgentPhase.UPLOADED]
    assert world.kinds()[:3] == ["training", "uploading", "uploaded"]
    assert world.steps() == [1, 2, 3]
    assert world.files() == []
    assert world.journal.bytes_received() > 0
    assert not world.server.withdrawals


def test_a_federation_from_its_first_round_to_its_last(world: World) -> None:
    server = world.server
    server.open_round()

    def next_round() -> None:
        if len(server.releases) > server.manifest.rounds.n_rounds:
            return
        server.close_round()
        if len(server.releases) <= server.manifest.rounds.n_rounds:
            server.open_round()

    agent = world.start()
    server.idle = next_round
    before = world.clock.time
    agent.run(until_finished=True)
    assert world.phases() == [AgentPhase.UPLOADED] * 2
    assert [upload.header.body.round for upload in server.accepted()] == [1, 2]
    assert len(server.releases) == 3
    assert world.kinds()[-1] == "finished"
    assert world.clock.time - before < 60.0
    release, arrays = agent._releases.newest()
    assert release.number == 2
    for name, array in server.adapters[2].items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_finished_federation_is_watched_without_haste(world: World) -> None:
    """After the last release there may come another federation's, so the agent stays."""
    world.server.publish(world.server.start)
    world.server.publish(world.server.start)
    agent = world.start()
    polls = []

    def count() -> None:
        polls.append(world.clock.time)
        if len(polls) == 3:
            world.wishes.stop()

    world.server.idle = count
    agent.run()
    assert [later - earlier for earlier, later in pairwise(polls)] == pytest.approx([5.0, 5.0])


def test_a_wait_lasts_as_long_as_the_server_says_unless_the_owner_stops(world: World) -> None:
    agent = world.start()
    world.server.idle = lambda: None
    world.server.faults["task"] = [None, world.wishes.stop]
    before = world.clock.time
    agent.run()
    assert world.server.calls.count("task") == 2
    assert world.clock.time - before == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("block", "weight"),
    [
        (AggregationBlock(weighting=Weighting.UNIFORM), 1),
        (AggregationBlock(max_weight=3), 3),
        (AggregationBlock(max_weight=ROWS + 1), ROWS),
    ],
)
def test_the_weight_is_the_manifests(
    make_world: Callable[..., World], block: AggregationBlock, weight: int
) -> None:
    world = make_world(aggregation=block)
    world.server.open_round()
    world.start().run()
    assert world.server.accepted()[0].header.body.weight == weight


def test_two_agents_with_one_key_would_train_the_same_and_two_keys_do_not(
    make_world: Callable[..., World],
) -> None:
    """The order of the examples comes from the private key: the same after a restart."""
    bodies = []
    for name, key in (("a", None), ("b", None), ("c", Signer.generate())):
        world = make_world(name=name)
        world.agent_key = key or world.agent_key
        world.server.open_round()
        world.start().run()
        bodies.append(world.server.accepted()[0].body)
    assert bodies[0] == bodies[1] != bodies[2]


# Kill and start again


def test_guarantee_1_killed_before_a_byte_left_the_same_bytes_are_sent(world: World) -> None:
    world.server.open_round()
    world.server.faults["begin_upload"] = [KillError()]
    with pytest.raises(KillError):
        world.start().run()
    (part,) = world.journal.parts()
    assert part.phase is AgentPhase.TRAINED
    assert part.header is not None
    stored = (world.home.updates / "1-1.f32").read_bytes()
    assert sha256(stored) == part.header.body.body_sha256
    world.server.calls.clear()
    world.events.clear()
    world.start().run()
    assert world.server.calls[0] == "begin_upload"  # before anything is asked
    (upload,) = world.server.uploads.values()
    assert (upload.header, upload.body, upload.accepted) == (part.header, stored, True)
    assert world.steps() == []
    assert world.phases() == [AgentPhase.UPLOADED]
    assert world.files() == []


def test_what_a_training_kept_is_gone_before_its_update_leaves_also_after_a_kill(
    world: World,
) -> None:
    world.server.open_round()
    world.server.faults["begin_upload"] = [KillError(), KillError()]
    with pytest.raises(KillError):
        world.start().run()
    assert not world.home.training_state.exists()
    world.home.training_state.write_bytes(b"as if killed once the update was kept")
    with pytest.raises(KillError):
        world.start().run()
    assert not world.home.training_state.exists()


def test_guarantee_1_killed_between_parts_only_the_missing_ones_follow(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.limits.PART_BYTES", 1000)
    monkeypatch.setattr(agent_module, "PART_BYTES", 1000)
    world = make_world()
    world.server.open_round()
    world.server.faults_after["put_part"] = [None, KillError()]
    with pytest.raises(KillError):
        world.start().run()
    n_parts = world.journal.parts()[0].header.body.n_parts  # type: ignore[union-attr]
    assert n_parts > 3
    world.server.calls.clear()
    world.start().run()
    assert world.server.calls.count("put_part") == n_parts - 2
    (upload,) = world.server.accepted()
    assert sha256(upload.body) == upload.header.body.body_sha256


@pytest.mark.parametrize("method", ["begin_upload", "put_part", "complete"])
def test_guarantee_1_a_lost_answer_never_makes_a_second_upload(world: World, method: str) -> None:
    world.server.open_round()
    world.server.faults_after[method] = [KillError()]
    with pytest.raises(KillError):
        world.start().run()
    world.start().run()
    assert len(world.server.uploads) == 1
    assert world.phases() == [AgentPhase.UPLOADED]
    assert world.files() == []


def test_killed_while_training_it_goes_on_and_sends_what_it_would_have_sent(
    make_world: Callable[..., World],
) -> None:
    whole = make_world(n_steps=13, dropout=0.1, name="whole")
    whole.server.open_round()
    whole.start().run()
    killed = make_world(n_steps=13, dropout=0.1, name="killed")
    killed.server.open_round()

    def kill(event: AgentEventReport) -> None:
        if event.progress is not None and event.progress.step == 12:
            raise KillError

    killed.on_event = kill
    with pytest.raises(KillError):
        killed.start().run()
    assert killed.phases() == [AgentPhase.TRAINING]
    killed.on_event = lambda event: None
    killed.events.clear()
    killed.start().run()
    assert killed.steps() == [11, 12, 13]  # the state was saved after step 10
    assert killed.server.accepted()[0].body == whole.server.accepted()[0].body
    assert killed.server.accepted()[0].header == whole.server.accepted()[0].header
    assert killed.files() == []


def test_stopped_while_training_it_goes_on_at_the_next_start(
    make_world: Callable[..., World],
) -> None:
    whole = make_world(name="whole")
    whole.server.open_round()
    whole.start().run()
    world = make_world(name="stopped")
    world.server.open_round()

    def stop(event: AgentEventReport) -> None:
        if event.progress is not None and event.progress.step == 2:
            world.wishes.stop()

    world.on_event = stop
    world.start().run()  # returns; nothing is raised
    assert world.phases() == [AgentPhase.TRAINING]
    assert world.kinds()[-1] == "stopped"
    assert not world.server.uploads
    assert not world.server.withdrawals
    world.on_event = lambda event: None
    world.events.clear()
    world.start().run()
    assert world.steps() == [3]
    assert world.server.accepted()[0].body == whole.server.accepted()[0].body


def test_what_a_kill_left_behind_is_removed_with_the_next_update(world: World) -> None:
    """Killed after acceptance was journalled, before the file was removed."""
    left_over = world.home.updates / "0-1.f32"
    agent = world.start()
    left_over.write_bytes(b"an old update")
    world.server.open_round()
    agent.run()
    assert world.files() == []


def test_leaving_meanwhile_ends_the_work(world: World) -> None:
    world.server.open_round()

    def leave(event: AgentEventReport) -> None:
        if event.progress is not None:
            world.journal.leave(2.0)
            world.clock.time += 1.0

    world.on_event = leave
    world.start().run()
    assert world.steps() == [1]
    assert not world.server.uploads


# Pauses


def test_a_paused_agent_asks_nothing_and_writes_little(world: World) -> None:
    world.server.open_round()
    agent = world.start()
    world.journal.set_paused(paused=True)
    n_sleeps = 0

    def resume(duration_s: float) -> None:
        nonlocal n_sleeps
        n_sleeps += 1
        world.clock.time += duration_s
        if n_sleeps == 20:
            assert world.server.calls == []
            world.journal.set_paused(paused=False)

    world.clock.sleep = resume
    agent.run()
    assert world.phases() == [AgentPhase.UPLOADED]
    assert world.kinds().count("waiting") == 2  # for the pause, told once, and for the server
    assert "paused by the owner" in world.events[0].text


# The round is over, or the server refuses


@pytest.mark.parametrize(
    "problem",
    [
        ProblemType.ROUND_CLOSED,
        ProblemType.NOT_SELECTED,
        ProblemType.CONSUMED,
        ProblemType.NOT_FINITE,
    ],
)
@pytest.mark.parametrize("method", ["begin_upload", "put_part", "complete"])
def test_a_round_that_closed_is_dropped_and_the_next_one_taken(
    world: World, problem: ProblemType, method: str
) -> None:
    world.server.open_round()
    world.server.faults[method] = [refusal(problem)]
    agent = world.start()

    def idle() -> None:
        world.server.idle = world.wishes.stop
        world.server.open_round()

    world.server.idle = idle
    agent.run()
    assert world.phases() == [AgentPhase.ABANDONED, AgentPhase.UPLOADED]
    assert problem.sentence in world.journal.parts()[0].note
    assert world.files() == []
    assert world.server.accepted()[-1].header.body.round == 2


def test_a_part_that_is_open_when_the_next_round_begins_is_dropped(world: World) -> None:
    world.server.open_round()

    def stop(event: AgentEventReport) -> None:
        if event.progress is not None:
            world.wishes.stop()

    world.on_event = stop
    world.start().run()
    world.on_event = lambda event: None
    world.server.open_round()
    world.start().run()
    assert world.phases() == [AgentPhase.ABANDONED, AgentPhase.UPLOADED]
    assert world.journal.parts()[0].note == "round 2 began"


def test_a_part_that_is_open_when_the_federation_ends_is_dropped(world: World) -> None:
    world.server.open_round()
    world.server.faults["begin_upload"] = [KillError()]
    with pytest.raises(KillError):
        world.start().run()
    world.server.publish(world.server.start)
    world.server.publish(world.server.start)
    world.server.rounds.clear()
    world.server.faults["begin_upload"] = [refusal(ProblemType.ROUND_CLOSED)]
    world.start().run(until_finished=True)
    assert world.phases() == [AgentPhase.ABANDONED]
    assert world.kinds()[-1] == "finished"


@pytest.mark.parametrize("problem", [ProblemType.REVOKED, ProblemType.CONFLICT])
def test_what_only_the_owner_can_mend_is_raised_and_kept(
    world: World, problem: ProblemType
) -> None:
    world.server.open_round()
    world.server.faults["begin_upload"] = [refusal(problem)]
    with pytest.raises(RefusedError, match=problem.sentence):
        world.start().run()
    assert world.phases() == [AgentPhase.TRAINED]


def test_a_discard_where_there_is_nothing_to_discard_is_told_not_repeated(world: World) -> None:
    """Hammering: a server that has no such path, asked again and again without a pause."""
    agent = world.start()
    world.server.faults["task"] = [refusal(ProblemType.NOT_FOUND)] * 3
    with pytest.raises(RefusedError):
        agent.run()
    assert world.server.calls == ["task"]


def test_an_unreachable_server_is_told_unless_the_owner_stops(world: World) -> None:
    agent = world.start()
    world.server.faults["task"] = [UnreachableError("no answer")]
    with pytest.raises(UnreachableError):
        agent.run()

    def stop_and_fail() -> None:
        world.wishes.stop()
        raise UnreachableError("no further try")

    world.server.faults["task"] = [stop_and_fail]
    agent.run()


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("complete", ProblemType.INCOMPLETE),
        ("complete", ProblemType.DIGEST_MISMATCH),
        ("put_part", ProblemType.DIGEST_MISMATCH),
    ],
)
def test_an_upload_that_is_not_whole_is_announced_again(
    world: World, method: str, problem: ProblemType
) -> None:
    world.server.open_round()
    world.server.faults[method] = [refusal(problem)]
    world.start().run()
    assert world.server.calls.count("begin_upload") == 2
    assert world.phases() == [AgentPhase.UPLOADED]


def test_an_upload_that_is_never_taken_is_given_up(world: World) -> None:
    world.server.open_round()
    world.server.faults["complete"] = [refusal(ProblemType.DIGEST_MISMATCH)] * 5
    world.start().run()
    assert world.phases() == [AgentPhase.ABANDONED]
    assert world.server.calls.count("begin_upload") == 5


def test_a_part_that_no_upload_has_is_not_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = UploadStatus(state=UploadState.RECEIVING, missing=(0, 7))
    monkeypatch.setattr(world.server, "begin_upload", lambda header: status)
    world.server.open_round()
    with pytest.raises(TrustError, match="part 7 of 1"):
        world.start().run()
    assert "put_part" not in world.server.calls


def test_a_finished_update_that_vanished_is_told(world: World) -> None:
    world.server.open_round()
    world.server.faults["begin_upload"] = [KillError()]
    with pytest.raises(KillError):
        world.start().run()
    (world.home.updates / "1-1.f32").unlink()
    with pytest.raises(JournalError, match="cannot be read"):
        world.start().run()


# Training that fails


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfMemoryError("too large"), WithdrawalReason.OUT_OF_MEMORY),
        (TrainingError("exactly zero"), WithdrawalReason.TRAINING_FAILED),
    ],
)
@pytest.mark.parametrize("heard", [True, False])
def test_a_training_that_fails_gives_its_place_to_another_and_is_told(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: object, *, heard: bool
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(LocalTrainer, "run", fail)
    world.server.open_round()
    if not heard:
        world.server.faults["withdraw"] = [refusal(ProblemType.ROUND_CLOSED)]
    with pytest.raises(type(error), match=str(error)):
        world.start().run()
    assert [item.reason for item in world.server.withdrawals] == [reason] * heard
    assert world.phases() == [AgentPhase.ABANDONED]
    assert world.journal.parts()[0].note == str(error)
    assert not world.server.uploads
    assert world.files() == []


def test_guarantee_3_an_update_of_zero_is_never_sent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.server.open_round()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _: None)
    with pytest.raises(TrainingError, match="exactly zero"):
        world.start().run()
    assert not world.server.uploads
    assert world.server.withdrawals[0].reason is WithdrawalReason.TRAINING_FAILED


@pytest.mark.parametrize(
    ("when", "error", "said"),
    [
        ("training begins", CheckpointError, "cannot save the training state"),
        ("training is done", JournalError, "cannot keep the finished update"),
    ],
)
def test_a_full_disk_keeps_the_round_open(
    world: World, monkeypatch: pytest.MonkeyPatch, when: str, error: type[Exception], said: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    world.server.open_round()
    agent = world.start()
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        if when == "training is done":
            patched.setattr("edge_agent.training.trainer.save_state", lambda *_: None)
        with pytest.raises(error, match=said):
            agent.run()
    assert world.phases() == [AgentPhase.TRAINING]
    assert not world.server.uploads
    world.start().run()
    assert world.phases() == [AgentPhase.UPLOADED]


# Guarantee 2: what is not verified is not trained on


def forge_release_key(world: World) -> None:
    release = world.server.releases[0].body
    world.server.releases[0] = sign(Signer.generate(), "release", release).signed


def forge_round_key(world: World) -> None:
    world.server.open_round(Signer.generate())


def break_chain(world: World) -> None:
    world.server.publish(world.server.start, previous=bytes(32))


def hide_release(world: World) -> None:
    world.server.publish(world.server.start)
    world.server.page_size = 0


def ask_for_more(world: World) -> None:
    world.server.open_round(update_n_bytes=world.server.layout.n_bytes + 4)


def start_elsewhere(world: World) -> None:
    world.server.publish(world.server.start)
    release = world.server.releases[0].body
    world.server.open_round(release=0, release_digest=release.digest(), sent=release.sent)


@pytest.mark.usefixtures("never_train")
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (forge_release_key, "release document is refused"),
        (forge_round_key, "round document is refused"),
        (break_chain, "does not continue it"),
        (hide_release, "speaks of release 1 but does not show it"),
        (ask_for_more, "the layout has"),
    ],
)
def test_guarantee_2_a_fault_in_what_the_server_signs_ends_the_matter(
    world: World, fault: Callable[[World], None], says: str
) -> None:
    fault(world)
    if not world.server.rounds:
        world.server.open_round()
    with pytest.raises(TrustError, match=says):
        world.start().run()
    assert not world.server.uploads
    assert world.journal.parts() == []


@pytest.mark.usefixtures("never_train")
def test_guarantee_2_a_round_from_an_older_release_is_refused_after_one_more_look(
    world: World,
) -> None:
    """Rollback: the agent looks twice, as a round may close between poll and chain; no more."""
    start_elsewhere(world)
    with pytest.raises(TrustError, match="newest release, 1"):
        world.start().run()
    assert world.server.calls.count("task") == 2


@pytest.mark.usefixtures("never_train")
def test_guarantee_2_two_manifests_for_one_round_are_refused(world: World) -> None:
    world.server.open_round()

    def stop(event: AgentEventReport) -> None:
        if event.kind == "training":
            raise KillError

    world.on_event = stop
    with pytest.raises(KillError):
        world.start().run()
    world.server.rounds.clear()
    world.server.open_round(cohort_size=9)
    with pytest.raises(TrustError, match="begun under another manifest"):
        world.start().run()


@pytest.mark.usefixtures("never_train")
@pytest.mark.parametrize("spoil", ["nan", "extra", "dtype"])
def test_guarantee_2_an_adapter_that_is_none_is_refused(world: World, spoil: str) -> None:
    arrays = {name: array.copy() for name, array in world.server.start.items()}
    name = min(arrays)
    if spoil == "nan":
        arrays[name][0, 0] = np.nan
    elif spoil == "dtype":
        arrays[name] = arrays[name].astype(np.float16)
    else:
        arrays["more"] = np.zeros(1, np.float32)
    blob = world.server._blob(to_safetensors(arrays))
    world.server.publish(world.server.start, adapter=blob, sent=blob)
    world.server.open_round()
    with pytest.raises(Exception, match="tensor"):
        world.start().run()
    assert not world.server.uploads


def test_guarantee_4_where_noise_is_asked_for_nothing_is_trained_without(
    make_world: Callable[..., World], never_train: None
) -> None:
    world = make_world(
        privacy=ExamplePrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0),
        aggregation=AggregationBlock(weighting=Weighting.UNIFORM),
    )
    world.server.open_round()
    with pytest.raises(TrustError, match="asks for differential privacy"):
        world.start().run()


def test_guarantee_2_another_layout_than_the_manifests_is_refused(
    make_world: Callable[..., World],
) -> None:
    world = make_world(layout=bytes(32))
    with pytest.raises(TrustError, match="layout is not the one"):
        world.start()


def test_an_enrolment_that_was_not_finished_does_not_work(world: World) -> None:
    world.start()
    journal = world.journal
    membership = journal.membership()
    assert membership is not None
    journal.join(url="https://h", federation=membership.federation, data="x", now=1.0)
    with pytest.raises(JournalError, match="was not finished"):
        world.start()


# Check 17


def moved(arrays: AdapterArrays, by: float) -> AdapterArrays:
    name = min(arrays)
    changed = arrays[name].copy()
    changed.flat[0] += by
    return {**arrays, name: changed}


LIMIT = ChangeLimitsBlock(max_tensor_change_norm=10.0)


@pytest.mark.usefixtures("never_train")
def test_check_17_an_adapter_that_moved_too_far_is_refused_at_the_first_round_already(
    make_world: Callable[..., World],
) -> None:
    """The part that was begun names the very release that is to be checked."""
    world = make_world(change_limits=LIMIT)
    world.server.publish(moved(world.server.start, 10.1))
    world.server.open_round()
    for _ in range(2):  # and again after a restart
        with pytest.raises(TrustError, match="above the limit of 10"):
            world.start().run()
        world.server.open_round()
    assert not world.server.uploads
    assert {item.reason for item in world.server.withdrawals} == {
        WithdrawalReason.REFUSED_BY_POLICY
    }


def test_check_17_is_measured_from_the_release_that_was_trained_on_last(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(change_limits=LIMIT)
    world.server.publish(moved(world.server.start, 9.0))
    world.server.open_round()
    world.start().run()
    assert world.phases() == [AgentPhase.UPLOADED]
    world.server.publish(moved(world.server.start, 18.0))  # 9 more: accepted
    world.server.open_round()
    world.start().run()
    assert world.phases() == [AgentPhase.UPLOADED] * 2
    world.server.publish(moved(world.server.start, 29.0))  # 11 more: refused
    world.server.open_round()
    with pytest.raises(TrustError, match=r"changed .* by 11"):
        world.start().run()


def test_check_17_allows_each_release_its_step(make_world: Callable[..., World]) -> None:
    world = make_world(change_limits=LIMIT)
    for by in (9.0, 18.0, 27.0):
        world.server.publish(moved(world.server.start, by))
    world.server.page_size = 2  # the chain comes in pages
    world.server.open_round()
    world.start().run()
    assert world.phases() == [AgentPhase.UPLOADED]
    assert world.journal.newest_release().number == 3  # type: ignore[union-attr]
    # Releases between are verified by their signatures; only what is compared is fetched.
    assert len(world.server.fetched) == 2


# Only B is sent


def test_only_b_travels_and_a_stays_as_release_0_has_it(make_world: Callable[..., World]) -> None:
    world = make_world(rule=LoraRule.FFA_LORA)
    server = world.server
    server.open_round()
    world.start().run()
    (upload,) = server.accepted()
    vector = vector_from_bytes(upload.body, server.layout)
    n_b = sum(a.size for name, a in server.start.items() if factor_of(name) is Factor.B)
    assert vector.size == n_b
    server.close_round()
    server.open_round()
    world.start().run()
    assert world.phases() == [AgentPhase.UPLOADED] * 2
    agent = world.start()
    release, arrays = agent._releases.newest()
    assert release.number == 1
    for name, array in arrays.items():
        expected = server.start if factor_of(name) is Factor.A else server.adapters[1]
        np.testing.assert_array_equal(array, expected[name])
    assert sha256(to_safetensors(arrays)) == release.adapter.sha256


@pytest.mark.usefixtures("never_train")
@pytest.mark.parametrize("how", ["whole", "as sent"])
def test_a_frozen_factor_that_was_exchanged_is_refused(
    make_world: Callable[..., World], how: str
) -> None:
    """The server signs a release whose A is another one than all agents froze."""
    world = make_world(rule=LoraRule.FFA_LORA)
    name = next(name for name in world.server.start if factor_of(name) is Factor.A)
    changed = {**world.server.start, name: world.server.start[name] + np.float32(0.5)}
    release = world.server.publish(changed)
    if how == "as sent":
        world.server.releases.pop()
        world.server.publish(changed, sent=release.adapter)
    world.server.open_round()
    with pytest.raises(Exception, match=r"does not hold what its signature promises|unexpected"):
        world.start().run()
    assert not world.server.uploads


# A and B take turns


def take_turns(world: World, n_rounds: int) -> None:
    for _ in range(n_rounds):
        world.server.open_round()
        world.start().run()
        world.server.close_round()


def test_under_rolora_b_and_a_are_trained_and_sent_in_turn(
    make_world: Callable[..., World],
) -> None:
    world = make_world(rule=LoraRule.ROLORA)
    server = world.server
    take_turns(world, 4)
    for number, turn in enumerate("BABA"):
        before, after = server.adapters[number], server.adapters[number + 1]
        changed = {factor_of(name) for name in after if (after[name] != before[name]).any()}
        assert changed == {Factor(turn)}
        upload = server.accepted()[number]
        assert len(upload.body) == server.layout_at(number).n_bytes
        assert upload.header.body.layout == server.layout_at(number).digest()


def test_under_rolora_an_agent_fetches_the_factor_that_changed_alone(
    make_world: Callable[..., World],
) -> None:
    world = make_world(rule=LoraRule.ROLORA)
    server = world.server
    take_turns(world, 4)
    first, *later = (signed.body for signed in server.releases)
    # Release 4 is what no round has started from yet.
    assert server.fetched == [ref.sha256 for ref in (first.sent, first.adapter)] + [
        release.sent.sha256 for release in later[:3]
    ]
    server.open_round()
    world.start().run()
    kept = {path.name for path in world.home.cache.iterdir()}
    assert kept == {ref.sha256.hex() for ref in (later[3].sent, later[2].sent, first.adapter)}


@pytest.mark.parametrize("n_missed", [1, 2, 3])
@pytest.mark.parametrize("back_to", [None, 0, 1, 2])
def test_under_rolora_an_agent_that_was_away_puts_the_newest_release_together(
    make_world: Callable[..., World], n_missed: int, back_to: int | None
) -> None:
    world = make_world(rule=LoraRule.ROLORA)
    server = world.server
    take_turns(world, 2)
    if back_to is not None:
        old = server.releases[back_to].body
        server.publish(
            server.adapters[back_to], sent=old.sent, adapter=old.adapter, rolled_back_to=back_to
        )
    for _ in range(n_missed):  # by others
        layout = server.layout_at(len(server.releases) - 1)
        moved = {slot.name: server.adapters[-1][slot.name] + 0.25 for slot in layout.slots}
        server.publish(server.adapters[-1] | moved)
    server.open_round()
    agent = world.start()
    agent.run()
    _release, arrays = agent._releases.newest()
    assert to_safetensors(arrays) == to_safetensors(server.adapters[-1])
    newest = newest_release(world.home, world.journal, None)
    assert newest.release.number == len(server.releases) - 1
    assert newest.weights == to_safetensors(server.adapters[-1])


@pytest.mark.usefixtures("never_train")
def test_under_rolora_a_factor_that_changed_out_of_its_turn_is_refused(
    make_world: Callable[..., World],
) -> None:
    world = make_world(rule=LoraRule.ROLORA)
    a, b = (
        next(name for name in world.server.start if factor_of(name) is factor) for factor in Factor
    )
    start = world.server.start
    world.server.publish({**start, a: start[a] + np.float32(0.5), b: start[b] + np.float32(0.5)})
    world.server.open_round()
    with pytest.raises(TrustError, match="does not hold what its signature promises"):
        world.start().run()
    assert not world.server.uploads


# Files


def test_the_cache_keeps_what_the_next_round_needs(make_world: Callable[..., World]) -> None:
    world = make_world(rule=LoraRule.FFA_LORA)
    server = world.server
    for round_number in (1, 2):
        server.open_round()
        world.start().run()
        server.close_round()
        assert len(world.journal.parts()) == round_number
    server.open_round()
    world.start().run()
    names = {path.name for path in world.home.cache.iterdir()}
    first, newest = server.releases[0].body, server.releases[-1].body
    assert names == {first.adapter.sha256.hex(), newest.sent.sha256.hex()}


def test_what_the_owner_sees_is_never_what_is_sent(world: World) -> None:
    """Losses are shown; check 16 keeps them on this machine."""
    world.server.open_round()
    world.start().run()
    shown = [event.progress for event in world.events if event.progress is not None]
    assert all(isinstance(progress, TrainingProgress) for progress in shown)
    header = world.server.accepted()[0].header.canonical().decode()
    assert not any(f"{progress.loss:.4f}" in header for progress in shown)
    assert set(json.loads(header)["body"]) == set(UploadHeader.model_fields)
