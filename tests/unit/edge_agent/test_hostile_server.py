"""A hostile server against the real agent, over HTTP: what it may try, and what it gets.

It holds the server's signing key, but not the registrar's; the other members of the cell are real.
Only training is replaced. In each attack the agent must refuse by the check that the attack is for,
tell its owner which one it was, and send nothing more.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent import agent as agent_module
from edge_agent.agent import Agent, AgentEventReport
from edge_agent.errors import (
    AgentError,
    RefusedError,
    TrainingStoppedError,
    TransportError,
    TrustError,
)
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from edge_agent.member import Member, OwnersCell
from edge_agent.membership import record_outgoing
from edge_agent.politeness import OwnersWishes
from edge_agent.training.planning import Chosen
from edge_agent.training.trainer import TrainingResult
from edge_agent.transport import Transport
from privacy.fixed_point import decode, with_checks
from privacy.masking import Mask, MaskAdder, expand
from privacy.secagg import cells, derive
from privacy.secagg.agent import AttemptState
from privacy.shares import PRIME, SHARE_BYTES, Rebuilder
from privacy.updates import PlainUpdate
from protocol.base_description import BaseDescription
from protocol.blocks import CellMasking, ChangeLimitsBlock, Factor, LoraBlock, RoundsBlock
from protocol.checks import Check
from protocol.masked import (
    Bundle,
    BundleNews,
    Confirm,
    Confirmed,
    ConfirmedNews,
    EndedNews,
    FailureReason,
    MaskedHeader,
    NoNews,
    Ready,
    Reveal,
    RosterNews,
    Survivors,
    SurvivorsNews,
)
from protocol.messages import TaskReply, TrainTask, WaitReason, WaitTask, WithdrawalReason
from protocol.phases import AgentPhase
from protocol.problems import ProblemType
from protocol.signing import Signed, Signer, sign
from protocol.wire import b64u_encode, parse, sha256
from quant.memory import StepSettings

WEIGHT = 7
UP_TO_READY = ("ready",)
UP_TO_SHARES = (*UP_TO_READY, "shares")
UP_TO_UPLOAD = (*UP_TO_SHARES, "upload", "part", "complete")
UP_TO_CONFIRM = (*UP_TO_UPLOAD, "confirm")
ALL = (*UP_TO_CONFIRM, "reveal")
LOW_ORDER = (
    "00" * 32,
    "01" + "00" * 31,
    "ec" + "ff" * 30 + "7f",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
)
NOT_CANONICAL = (
    (2**255 - 19).to_bytes(32, "little").hex(),  # 0 by another name
    (2**255 - 10).to_bytes(32, "little").hex(),
    "ff" * 32,
    "09" + "00" * 30 + "80",  # the base point with its unused bit set
)
Lie = Callable[[Any], Any]


class KillError(BaseException):
    """Stands for kill -9: nothing after it runs."""


@dataclass
class FakeBase:
    """What an `Agent` asks of a base and an adapted model."""

    description: BaseDescription
    world: "World"

    def train_only(self, factors: tuple[Factor, ...]) -> None:
        assert factors == self.world.host.manifest.lora.sent


class FakeTrainer:
    """Gives the update that the world holds."""

    def __init__(self, adapted: FakeBase, *_: object, **__: object) -> None:
        self.world = adapted.world

    def run(self, start: object, layout: object, *, weight: int) -> TrainingResult:
        self.world.n_trained += 1
        self.world.while_training()
        return TrainingResult(
            update=PlainUpdate(vector=self.world.vector, weight=weight),
            n_steps=1,
            n_examples=WEIGHT,
            n_tokens=1,
            first_loss=1.0,
            last_loss=1.0,
        )


@dataclass(frozen=True)
class FakeData:
    examples: tuple[tuple[int, ...], ...] = ((0,),) * WEIGHT


@dataclass
class World:
    """A hostile server with its members, and one agent, which may be started again."""

    host: Any
    url: str
    home: AgentHome
    key: Signer
    clock: Any
    owners: OwnersCell = field(default_factory=OwnersCell)
    events: list[AgentEventReport] = field(default_factory=list)
    n_trained: int = 0
    words: Any = None
    """The encoded update, as it stood when it was first masked."""
    state: AttemptState | None = None
    """The attempt as it then was, secrets too."""
    while_training: Callable[[], None] = lambda: None
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.home.create()
        n_values = self.host.plan.layout.n_values
        self.vector = np.random.default_rng(9).normal(0.0, 0.1, n_values).astype(np.float32)
        self.journal = Journal(self.home.journal_path)
        if self.journal.membership() is None:
            self.journal.join(url=self.url, federation=self.host.federation, data="made", now=1.0)
            self.journal.set_credential(self.host.credential(self.key.identity))

    def start(self) -> Agent:
        """A new process on the same home."""
        self.journal.close()
        self.journal = Journal(self.home.journal_path)
        membership = self.journal.membership()
        assert membership is not None
        self.wishes = OwnersWishes(self.journal, self.clock, None)
        self.transport = Transport(
            self.url,
            clock=self.clock,
            signer=self.key,
            on_outgoing=record_outgoing(self.journal, self.clock),
            stopped=self.wishes.stopping,
            patience_s=30.0,
        )
        self.transport.use_federation(self.host.manifest)
        return Agent(
            member=Member(
                home=self.home,
                journal=self.journal,
                membership=membership,
                signer=self.key,
                owners_cell=self.owners,
            ),
            transport=self.transport,
            base=FakeBase(self.host.base, self),  # type: ignore[arg-type]
            data=FakeData(),  # type: ignore[arg-type]
            wishes=self.wishes,
            clock=self.clock,
            on_event=self._note,
        )

    def run(self) -> None:
        """Until the federation is finished, or an error reaches the owner."""
        agent = self.start()
        try:
            agent.run(until_finished=True)
        finally:
            self.transport.close()

    def _note(self, event: AgentEventReport) -> None:
        self.events.append(event)
        if event.kind == "uploading" and self.words is None:
            path = self.home.encoded_update(self.host.round.round, 1)
            self.words = np.frombuffer(path.read_bytes(), self.host.plan.dtype)
            self.state = self.journal.attempt(self.host.round.round)
        if len(self.events) > 200:  # an agent that goes round in circles
            self.wishes.stop()

    def texts(self, kind: str) -> list[str]:
        return [event.text for event in self.events if event.kind == kind]

    def phases(self) -> list[AgentPhase]:
        return [part.phase for part in self.journal.parts()]


@pytest.fixture
def make_world(
    make_host: Callable[..., Any],
    serve: Callable[[Any], str],
    agent_key: Signer,
    clock: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., World]]:
    monkeypatch.setattr(agent_module, "AdaptedModel", lambda base, lora: base)
    monkeypatch.setattr(agent_module, "LocalTrainer", FakeTrainer)
    chosen = Chosen(settings=StepSettings(), text="")
    monkeypatch.setattr(agent_module.Agent, "_choose", lambda _: chosen)
    worlds: list[World] = []

    def make(owners: OwnersCell | None = None, **changes: Any) -> World:
        host = make_host(**changes)
        home = AgentHome(tmp_path / "home")
        world = World(host, serve(host), home, agent_key, clock, owners or OwnersCell())
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        world.journal.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


@pytest.fixture
def two_cells(make_world: Callable[..., World]) -> World:
    """Ten ready agents in two cells of five."""
    return make_world(n_others=9)


def masking(**changes: Any) -> CellMasking:
    values = {"max_change": 1.0, "clip_norm": 20.0, "cell_target": 5, "ready_delay_s": 0.0}
    return CellMasking(**{**values, **changes})


def code_of(check: Check) -> str:
    return f"[check {check.number}, {check.value}]"


def assert_refused(world: World, check: Check, *, sent: tuple[str, ...]) -> None:
    """The owner was told which check it was; nothing but `sent` has ever left; nothing is kept."""
    world.run()
    (told,) = world.texts("refused")
    assert code_of(check) in told
    (part,) = world.journal.parts()
    assert code_of(check) in part.note
    assert (part.phase, part.ended) == (AgentPhase.ABANDONED, True)
    assert tuple(world.host.kinds()) == sent
    assert world.journal.attempt(1) is None
    assert world.home.update_files() == []


def assert_roster_refused(world: World, check: Check, lie: Lie) -> None:
    """A roster is refused before anything but READY has left."""
    world.host.says[AgentPhase.READY] = lambda cell: roster_news(*lie(cell))
    assert_refused(world, check, sent=UP_TO_READY)


def roster_news(ready_list: Any, roster: Any) -> RosterNews:
    return RosterNews(ready_list=ready_list, roster=roster)


def with_changes(message: Any, **changes: Any) -> Any:
    """A message with other fields; unlike `model_copy` it is one that can be sent."""
    return type(message)(**{**dict(message), **changes})


def in_turn(*lies: Lie) -> Lie:
    """One after the other; the last holds for all that follow."""
    left = list(lies)

    def say(cell: Any) -> Any:
        return (left.pop(0) if len(left) > 1 else left[0])(cell)

    return say


def honestly(phase: AgentPhase) -> Lie:
    return lambda cell: cell.honest_news(phase)


def bundle_of(cell: Any) -> Bundle:
    bundle: Bundle = cell.honest_news(AgentPhase.SHARED).bundle
    return bundle


def cut(bundle: Bundle, me: bytes, keep: Callable[[bytes], bool]) -> Bundle:
    """A bundle with fewer dealers, consistent in itself."""
    others = [head for head in bundle.headers if head.body.agent != me]
    sealed = dict(zip([head.body.agent for head in others], bundle.ciphertexts, strict=True))
    heads = [h for h in bundle.headers if h.body.agent == me or keep(h.body.agent)]
    texts = [sealed[h.body.agent] for h in heads if h.body.agent != me]
    return with_changes(bundle, headers=tuple(heads), ciphertexts=tuple(texts))


def survivors_of(cell: Any, keep: Callable[[bytes], bool] = lambda _: True) -> Survivors:
    """A U3 of those whose upload the server has, as it likes."""
    cell.close_uploads()
    heads = tuple(cell.book.uploads[name] for name in sorted(cell.book.uploads) if keep(name))
    return Survivors(transcript=cell.transcript, headers=heads)


def strangers(cell: Any) -> list[bytes]:
    """The other members, by identity."""
    return [name for name in cell.roster.body.identities() if name != cell.me]


# The honest path: without it no refusal below would mean anything


@pytest.mark.parametrize("gone", [frozenset(), frozenset({2})], ids=["all", "one-drops-out"])
def test_an_honest_cell_gives_exactly_the_sum_of_its_survivors(
    world: World, gone: frozenset[int]
) -> None:
    world.host.gone["upload"] = gone
    world.run()
    assert tuple(world.host.kinds()) == ALL
    assert world.phases() == [AgentPhase.REVEALED]
    cell, plan = world.host.cell, world.host.plan
    payload = cell.sum()
    others = [cell.payloads[name] for name in cell.book.uploads if name != cell.me]
    assert len(others) == 4 - len(gone)
    assert np.array_equal(payload, sum(others, start=world.words.copy()))
    found = decode(payload, plan)
    own = decode(world.words, plan)
    steps = np.array([slot.step for slot in plan.layout.slots]).max()
    assert own.weight_sum == WEIGHT
    assert np.abs(own.values - world.vector * (WEIGHT / plan.max_weight)).max() <= steps
    assert found.n_members == 5 - len(gone)
    assert not world.texts("refused")


def test_what_an_honest_server_gets_is_not_the_update(world: World) -> None:
    world.run()
    body = world.host.cell.body()
    plain = with_checks(world.words, np.zeros(16, body.dtype), world.host.plan, 0, len(body))
    assert np.count_nonzero(body == plain) < 3  # by chance
    sent = b"".join(body for _, body in world.host.arrived)
    assert world.words.tobytes() not in sent


# The round and its adapter


def test_two_adapters_in_one_round(world: World) -> None:
    """A member was given another round manifest: T would differ, and so its adapter might."""
    assert_roster_refused(
        world,
        Check.OTHER_ADAPTER,
        lambda cell: cell.form(cell.with_ready(1, round_digest=bytes(32))),
    )


def test_two_manifests_of_one_round(world: World) -> None:
    """The agent is stopped while it trains, and is then shown another manifest of its round."""

    def stop() -> None:
        msg = "stopped"
        raise TrainingStoppedError(msg)

    world.while_training = stop
    world.run()
    assert world.phases() == [AgentPhase.TRAINING]
    world.while_training = lambda: None
    world.host.open_round(selection_seed=bytes([1]) * 32)
    with pytest.raises(TrustError, match="begun under another manifest"):
        world.run()
    assert world.n_trained == 1
    assert world.host.arrived == []


def test_a_round_whose_number_does_not_rise(world: World) -> None:
    """The round that the agent has done is offered again, so that its update is summed twice."""
    world.run()
    assert world.phases() == [AgentPhase.REVEALED]
    task = TaskReply(task=TrainTask(round=world.host.signed_round), newest_release=0)
    world.host.task = lambda after: task
    with pytest.raises(TrustError, match="does not rise above 1") as refused:
        world.run()
    assert refused.value.check is Check.STALE_MANIFEST
    assert code_of(Check.STALE_MANIFEST) in str(refused.value)
    assert tuple(world.host.kinds()) == ALL
    assert world.n_trained == 1


def test_a_round_that_does_not_start_from_the_newest_release(world: World) -> None:
    """An old adapter, whose successor the agent knows already."""
    host = world.host
    old = host.signed_round
    host.publish(host.start)
    host.open_round()
    stale = sign(
        host.key,
        "round",
        with_changes(old.body, round=2),
    ).signed
    wait = WaitTask(reason=WaitReason.ROUND_ENDING, retry_after_s=1.0)
    tasks = [wait, TrainTask(round=stale)]
    host.task = lambda after: TaskReply(task=tasks.pop(0), newest_release=1)
    with pytest.raises(TrustError, match="does not start from the newest release") as refused:
        world.run()
    assert refused.value.check is Check.STALE_MANIFEST
    assert world.n_trained == 0
    assert host.arrived == []


def test_a_round_signed_by_another_key(world: World) -> None:
    world.host.open_round(key=Signer.generate())
    with pytest.raises(TrustError) as refused:
        world.run()
    assert refused.value.check is Check.FOREIGN_SIGNATURE
    assert code_of(Check.FOREIGN_SIGNATURE) in str(refused.value)
    assert (world.n_trained, world.host.arrived) == (0, [])


def test_a_round_of_vectors_of_another_size(world: World) -> None:
    world.host.open_round(update_n_bytes=world.host.plan.layout.n_bytes)  # as if unmasked
    with pytest.raises(TrustError) as refused:
        world.run()
    assert refused.value.check is Check.OTHER_LAYOUT
    assert (world.n_trained, world.host.arrived) == (0, [])


@pytest.mark.parametrize("cap_at", [9e8, 2e10], ids=["long-past", "far-future"])
def test_a_round_at_an_impossible_time_is_refused_and_no_crash(world: World, cap_at: float) -> None:
    """READY's expiry has ten digits, so a `cap_at` without them must be refused as a manifest."""
    world.host.open_round(opened_at=1.0, deadline_at=2.0, cap_at=cap_at)
    with pytest.raises(AgentError):
        world.run()
    assert world.host.arrived == []


@pytest.mark.parametrize(
    "changes",
    [{"previous": bytes(32)}, {"number": 2, "round": 2}, {"federation_digest": bytes(32)}],
    ids=["another-predecessor", "a-gap", "another-federation"],
)
def test_a_broken_chain(world: World, changes: dict[str, Any]) -> None:
    host = world.host
    host.publish(host.start, **changes)
    host.open_round(release=1, round=2)
    with pytest.raises(TrustError) as refused:
        world.run()
    assert refused.value.check is Check.BROKEN_CHAIN
    assert code_of(Check.BROKEN_CHAIN) in str(refused.value)
    assert world.journal.newest_release() is None or world.journal.newest_release().number == 0
    assert (world.n_trained, host.arrived) == (0, [])


def test_a_release_that_is_spoken_of_and_not_shown(world: World) -> None:
    world.host.task = lambda after: TaskReply(
        task=TrainTask(round=world.host.signed_round), newest_release=3
    )
    with pytest.raises(TrustError) as refused:
        world.run()
    assert refused.value.check is Check.BROKEN_CHAIN
    assert (world.n_trained, world.host.arrived) == (0, [])


def test_a_release_that_moved_too_far(make_world: Callable[..., World]) -> None:
    world = make_world(change_limits=ChangeLimitsBlock(max_tensor_change_norm=1.0))
    host = world.host
    host.publish({name: array + 1.0 for name, array in host.start.items()})
    host.open_round()
    with pytest.raises(TrustError) as refused:
        world.run()
    assert refused.value.check is Check.MOVED_TOO_FAR
    (told,) = [text for text in world.texts("withdrawn") if "check" in text]
    (part,) = world.journal.parts()
    for text in (told, part.note):
        assert code_of(Check.MOVED_TOO_FAR) in text
    assert part.phase is AgentPhase.ABANDONED
    assert [item.reason for item in host.withdrawn] == [WithdrawalReason.REFUSED_BY_POLICY]
    assert (world.n_trained, host.arrived) == (0, [])


def other_bytes(world: World) -> None:
    """The server sends another adapter under the digest that it signed."""
    host = world.host
    digest = host.releases[0].body.sent.sha256
    host.blobs[digest] = host.blobs[digest][:-4] + bytes(4)
    host.blobs[digest] = host.blobs[digest][:-8] + b"\x00\x00\x80\x3f" + bytes(4)


def test_an_adapter_with_other_bytes_than_were_signed(world: World) -> None:
    other_bytes(world)
    with pytest.raises((TrustError, TransportError)):
        world.run()
    assert (world.n_trained, world.host.arrived) == (0, [])
    assert world.home.cached_files() == []


def test_an_adapter_with_other_bytes_is_told_as_check_2(world: World) -> None:
    other_bytes(world)
    with pytest.raises(AgentError) as refused:
        world.run()
    assert code_of(Check.OTHER_ADAPTER) in str(refused.value)


def test_an_adapter_whose_frozen_factors_are_others(make_world: Callable[..., World]) -> None:
    """What agents do not send must stay what it was in release 0."""
    lora = LoraBlock(rank=2, alpha=4.0, target_modules=("q_proj",), sent=(Factor.B,), init_seed=7)
    world = make_world(lora=lora)
    host = world.host
    moved = {name: array + (0.5 if "lora_A" in name else 0.0) for name, array in host.start.items()}
    host.publish(moved)
    host.open_round()
    with pytest.raises(TrustError) as refused:
        world.run()
    assert refused.value.check is Check.OTHER_ADAPTER
    assert code_of(Check.OTHER_ADAPTER) in world.journal.parts()[0].note
    assert (world.n_trained, host.arrived) == (0, [])


def test_cells_smaller_than_the_owner_accepts_are_refused_before_training(
    make_world: Callable[..., World],
) -> None:
    world = make_world(OwnersCell(min_cell=6))
    with pytest.raises(TrustError) as refused:
        world.run()
    assert refused.value.check is Check.SMALL_CELL
    assert code_of(Check.SMALL_CELL) in str(refused.value)
    assert (world.n_trained, world.host.arrived) == (0, [])


# The roster


def test_a_roster_of_four(world: World) -> None:
    def four(cell: Any) -> Any:
        out = strangers(cell)[0]
        return cell.form([ready for ready in cell.readies() if ready.body.agent != out])

    assert_roster_refused(world, Check.SMALL_CELL, four)


def test_a_roster_of_one(world: World) -> None:
    assert_roster_refused(world, Check.SMALL_CELL, lambda cell: cell.form([cell.ready]))


def test_a_roster_larger_than_sums_can_hold(make_world: Callable[..., World]) -> None:
    """Twelve in one cell where at most nine do not wrap."""
    world = make_world(n_others=11, masking=masking(max_cell=9))

    def twelve(cell: Any) -> Any:
        c = cells.colluders(12)
        return cell.form(
            roster={
                "members": tuple(cell.readies()),
                "threshold": cells.threshold(12, c),
                "colluders": c,
            }
        )

    assert_roster_refused(world, Check.LARGE_CELL, twelve)


def test_a_threshold_of_one(world: World) -> None:
    assert_roster_refused(
        world, Check.WRONG_THRESHOLD, lambda cell: cell.form(roster={"threshold": 1})
    )


@pytest.mark.parametrize(
    "false",
    [{"threshold": 3}, {"threshold": 5}, {"colluders": 2}, {"threshold": 3, "colluders": 2}],
    ids=["one-less", "one-more", "other-c", "both"],
)
def test_a_threshold_below_the_rule(world: World, false: dict[str, int]) -> None:
    """Or above it, or with a c that it does not follow from."""

    def lie(cell: Any) -> Any:
        assert (cell.roster.body.threshold, cell.roster.body.colluders) == (4, 1)
        return cell.form(roster=false)

    assert_roster_refused(world, Check.WRONG_THRESHOLD, lie)


def test_a_lower_threshold_than_the_manifest_agreed(make_world: Callable[..., World]) -> None:
    """The manifest raises c of ten to 4; the server goes by the rule alone."""
    world = make_world(n_others=9, masking=masking(cell_target=10, max_cell=19, colluders=4))

    def rule_alone(cell: Any) -> Any:
        assert cell.roster.body.threshold == cells.threshold(10, 4)
        c = cells.colluders(10)
        assert cells.threshold(10, c) < cells.threshold(10, 4)
        return cell.form(roster={"threshold": cells.threshold(10, c), "colluders": c})

    assert_roster_refused(world, Check.WRONG_THRESHOLD, rule_alone)


def test_a_duplicate_identity(world: World) -> None:
    """One member stands for two, so that the cell looks larger than it is."""

    def twice(cell: Any) -> Any:
        double, dropped, *_ = strangers(cell)
        four = [ready for ready in cell.readies() if ready.body.agent != dropped]
        five = [*four, *(ready for ready in four if ready.body.agent == double)]
        members = tuple(sorted(five, key=lambda ready: ready.body.agent))
        return cell.form(four, roster={"members": members, "threshold": 4, "colluders": 1})

    assert_roster_refused(world, Check.DUPLICATE_MEMBER, twice)


def test_a_duplicate_identity_in_the_list(world: World) -> None:
    def twice(cell: Any) -> Any:
        entries = cell.listed.body.entries
        return cell.form(listed={"entries": (entries[0], *entries)})

    assert_roster_refused(world, Check.DUPLICATE_MEMBER, twice)


@pytest.mark.parametrize("name", ["sealing_key", "masking_key"])
def test_one_key_of_two_members(world: World, name: str) -> None:
    """Two members with one masking key: the masks of both with a third are linked."""

    def shared(cell: Any) -> Any:
        key = getattr(cell.everyone[2].state.ready.body, name)
        return cell.form(cell.with_ready(0, **{name: key}))

    assert_roster_refused(world, Check.DUPLICATE_MEMBER, shared)


def test_one_key_for_sealing_and_for_masking(world: World) -> None:
    """The masking key may be disclosed, and would open the sealed shares."""

    def one(cell: Any) -> Any:
        key = cell.everyone[0].state.ready.body.sealing_key
        return cell.form(cell.with_ready(0, masking_key=key))

    assert_roster_refused(world, Check.KEY_REUSE, one)


def test_an_edited_own_entry(world: World) -> None:
    """The server puts keys of its own into the agent's READY."""

    def edited(cell: Any) -> Any:
        body = with_changes(cell.ready.body, masking_key=bytes([9]) + bytes(31))
        mine = with_changes(cell.ready, body=body)
        return cell.form([mine if r == cell.ready else r for r in cell.readies()])

    assert_roster_refused(world, Check.EDITED_ENTRY, edited)


def test_an_own_entry_that_only_the_list_edits(world: World) -> None:
    def edited(cell: Any) -> Any:
        entries = tuple(
            (name, bytes(32) if name == cell.me else digest)
            for name, digest in cell.listed.body.entries
        )
        return cell.form(listed={"entries": entries})

    assert_roster_refused(world, Check.EDITED_ENTRY, edited)


def test_a_roster_without_me(world: World) -> None:
    def without(cell: Any) -> Any:
        others = tuple(r for r in cell.readies() if r.body.agent != cell.me)
        stranger = Signer.from_private_bytes(sha256(b"a fifth"))
        body = with_changes(
            others[0].body,
            agent=stranger.identity,
            credential=cell.host.credential(stranger.identity),
            sealing_key=derive.public_key_of(bytes([1]) * 32),
            masking_key=derive.public_key_of(bytes([2]) * 32),
        )
        members = [*others, sign(stranger, "ready", body).signed]
        members.sort(key=lambda ready: ready.body.agent)
        return cell.form(roster={"members": tuple(members)})

    assert_roster_refused(world, Check.EDITED_ENTRY, without)


@pytest.mark.parametrize("point", LOW_ORDER)
@pytest.mark.parametrize("name", ["sealing_key", "masking_key"])
def test_a_low_order_key(world: World, name: str, point: str) -> None:
    """A colluding member's key that makes the pair's secret one that everybody knows."""
    assert_roster_refused(
        world,
        Check.WEAK_KEY,
        lambda cell: cell.form(cell.with_ready(3, **{name: bytes.fromhex(point)})),
    )


@pytest.mark.parametrize("point", NOT_CANONICAL)
@pytest.mark.parametrize("name", ["sealing_key", "masking_key"])
def test_a_key_that_is_not_canonical(world: World, name: str, point: str) -> None:
    """One key under two names, which a comparison of bytes would miss."""
    assert_roster_refused(
        world,
        Check.WEAK_KEY,
        lambda cell: cell.form(cell.with_ready(3, **{name: bytes.fromhex(point)})),
    )


def test_a_member_that_did_not_sign(world: World) -> None:
    """The server replaces another member's keys by its own."""

    def forged(cell: Any) -> Any:
        true = cell.everyone[0].state.ready
        body = with_changes(true.body, masking_key=derive.public_key_of(bytes(32)))
        false = with_changes(true, body=body)
        return cell.form([false if r == true else r for r in cell.readies()])

    assert_roster_refused(world, Check.FOREIGN_ENTRY, forged)


def test_a_member_of_another_round(world: World) -> None:
    assert_roster_refused(
        world, Check.FOREIGN_ENTRY, lambda cell: cell.form(cell.with_ready(2, round=2))
    )


def test_a_member_whose_ready_had_expired(world: World) -> None:
    formed_at = world.host.round.opened_at
    assert_roster_refused(
        world,
        Check.EXPIRED_READY,
        lambda cell: cell.form(cell.with_ready(2, expires_at=int(formed_at) - 1)),
    )


def with_credential(cell: Any, **changes: Any) -> Any:
    agent = cell.everyone[1].state.ready.body.agent
    holder = changes.pop("holder", agent)
    return cell.form(cell.with_ready(1, credential=cell.host.credential(holder, **changes)))


def test_an_expired_credential(world: World) -> None:
    formed_at = int(world.host.round.opened_at)
    assert_roster_refused(
        world,
        Check.BAD_CREDENTIAL,
        lambda cell: with_credential(cell, expires_at=formed_at - 1),
    )


def test_a_credential_of_a_foreign_registrar(world: World) -> None:
    """The server mints a member: it holds its own key, but not the registrar's."""
    assert_roster_refused(
        world, Check.BAD_CREDENTIAL, lambda cell: with_credential(cell, key=cell.host.key)
    )


def test_a_credential_of_another_agent(world: World) -> None:
    """A stolen credential under a key that the server made."""
    assert_roster_refused(
        world, Check.BAD_CREDENTIAL, lambda cell: with_credential(cell, holder=cell.me)
    )


def test_a_credential_of_another_federation(world: World) -> None:
    assert_roster_refused(
        world, Check.BAD_CREDENTIAL, lambda cell: with_credential(cell, federation=bytes(16))
    )


def test_a_ready_list_signed_by_another_key(world: World) -> None:
    assert_roster_refused(
        world, Check.FOREIGN_SIGNATURE, lambda cell: cell.form(list_key=Signer.generate())
    )


def test_a_roster_signed_by_another_key(world: World) -> None:
    assert_roster_refused(
        world, Check.FOREIGN_SIGNATURE, lambda cell: cell.form(roster_key=Signer.generate())
    )


def test_a_roster_that_names_the_pinned_key_and_is_signed_by_another(world: World) -> None:
    def forged(cell: Any) -> Any:
        ready_list, roster = cell.form(roster_key=Signer.generate())
        return ready_list, with_changes(roster, key=cell.host.key.identity)

    assert_roster_refused(world, Check.FOREIGN_SIGNATURE, forged)


def test_a_roster_of_another_round(world: World) -> None:
    assert_roster_refused(
        world,
        Check.STALE_MANIFEST,
        lambda cell: cell.form(listed={"round": 2}, roster={"round": 2}),
    )


def test_a_ready_list_that_does_not_yield_my_cell(two_cells: World) -> None:
    """The server swaps an honest member for one of its own choice."""

    def chosen(cell: Any) -> Any:
        inside = cell.roster.body.identities()
        outside = next(r for r in cell.readies() if r.body.agent not in inside)
        dropped = next(name for name in inside if name != cell.me)
        members = [r for r in cell.roster.body.members if r.body.agent != dropped]
        members = sorted([*members, outside], key=lambda ready: ready.body.agent)
        return cell.form(roster={"members": tuple(members)})

    assert_roster_refused(two_cells, Check.WRONG_ASSIGNMENT, chosen)


def test_a_roster_that_claims_another_cell(two_cells: World) -> None:
    assert_roster_refused(
        two_cells,
        Check.WRONG_ASSIGNMENT,
        lambda cell: cell.form(roster={"cell": 1 - cell.roster.body.cell}),
    )


@pytest.mark.parametrize("number", [2, 2**53 - 1])
def test_a_roster_that_claims_a_cell_that_was_not_drawn(two_cells: World, number: int) -> None:
    assert_roster_refused(
        two_cells, Check.WRONG_ASSIGNMENT, lambda cell: cell.form(roster={"cell": number})
    )


def test_a_roster_drawn_from_another_list(two_cells: World) -> None:
    """The draw was repeated until it suited the server, and the list is not the one shown."""
    assert_roster_refused(
        two_cells,
        Check.WRONG_ASSIGNMENT,
        lambda cell: cell.form(roster={"list_digest": sha256(b"another list")}),
    )


def test_a_member_whose_listed_ready_is_another(world: World) -> None:
    """The list was fixed with one READY of a colluder, the cell is formed with another one."""

    def other(cell: Any) -> Any:
        members = cell.with_ready(0, nonce=bytes(32))
        return cell.form(roster={"members": tuple(members)})

    assert_roster_refused(world, Check.WRONG_ASSIGNMENT, other)


def test_too_few_friends_in_the_roster(make_world: Callable[..., World]) -> None:
    friend = Signer.from_private_bytes(sha256(b"member 0")).identity
    absent = Signer.generate().identity
    owners = OwnersCell(friends=frozenset({friend, absent}), min_friends=2)
    world = make_world(owners)
    assert_roster_refused(world, Check.TOO_FEW_FRIENDS, lambda cell: (cell.listed, cell.roster))


def test_a_cell_with_enough_friends_is_accepted(make_world: Callable[..., World]) -> None:
    friends = frozenset(
        Signer.from_private_bytes(sha256(f"member {i}".encode())).identity for i in (0, 1)
    )
    world = make_world(OwnersCell(friends=friends, min_friends=2))
    world.run()
    assert tuple(world.host.kinds()) == ALL


def test_a_roster_of_five_where_six_were_agreed(make_world: Callable[..., World]) -> None:
    world = make_world(
        OwnersCell(min_cell=6),
        n_others=5,
        masking=masking(cell_target=6, min_cell=6, max_cell=11),
        rounds=RoundsBlock(n_rounds=9, cohort_target=6, min_cohort=6),
    )

    def five(cell: Any) -> Any:
        out = strangers(cell)[0]
        return cell.form([ready for ready in cell.readies() if ready.body.agent != out])

    assert_roster_refused(world, Check.SMALL_CELL, five)


# One READY, one roster, one T


def test_one_ready_used_in_two_rosters(world: World) -> None:
    """A second cell with the keys that are already at work in the first."""

    def second(cell: Any) -> Any:
        formed_at = cell.roster.body.formed_at
        return roster_news(*cell.form(roster={"formed_at": formed_at + 1}))

    world.host.says[AgentPhase.SHARED] = second
    assert_refused(world, Check.SPENT_READY, sent=UP_TO_SHARES)


@pytest.mark.parametrize("phase", [AgentPhase.UPLOADED, AgentPhase.CONFIRMED])
def test_a_second_roster_at_a_later_stage(world: World, phase: AgentPhase) -> None:
    world.host.says[phase] = lambda cell: roster_news(*cell.form(roster={"formed_at": 2 * 10**9}))
    sent = UP_TO_UPLOAD if phase is AgentPhase.UPLOADED else UP_TO_CONFIRM
    assert_refused(world, Check.SPENT_READY, sent=sent)


@pytest.mark.parametrize("after", ["shares", "upload"])
def test_reuse_of_t_after_the_attempt_failed(world: World, after: str) -> None:
    """FAILED, and then the roster of the attempt that failed is served again."""
    host = world.host
    failing = AgentPhase.SHARED if after == "shares" else AgentPhase.UPLOADED
    host.says[failing] = lambda cell: cell.failed()
    host.says[AgentPhase.READY] = lambda cell: roster_news(
        host.cells[1].listed, host.cells[1].roster
    )
    sent = UP_TO_SHARES if after == "shares" else UP_TO_UPLOAD
    assert_refused(world, Check.EDITED_ENTRY, sent=(*sent, "ready"))
    first, second = (parse(Signed[Ready], body).body for body in host.bodies_of("ready"))
    fresh = {first.sealing_key, first.masking_key, second.sealing_key, second.masking_key}
    assert len(fresh) == 4
    assert first.nonce != second.nonce
    assert (first.attempt, second.attempt) == (1, 2)


def test_another_bundle_for_the_same_t(world: World) -> None:
    """With another U2 the agent would mask the same update a second time, under other masks."""
    host = world.host
    host.refuses["upload"] = [ProblemType.STAGE_CLOSED]
    host.says[AgentPhase.SHARED] = in_turn(
        honestly(AgentPhase.SHARED),
        lambda cell: BundleNews(
            bundle=cut(bundle_of(cell), cell.me, lambda name: name != strangers(cell)[0])
        ),
    )
    assert_refused(world, Check.BAD_BUNDLE, sent=(*UP_TO_SHARES, "upload"))


def test_another_bundle_after_the_upload(world: World) -> None:
    world.host.says[AgentPhase.UPLOADED] = lambda cell: BundleNews(
        bundle=cut(bundle_of(cell), cell.me, lambda name: name != strangers(cell)[0])
    )
    assert_refused(world, Check.BAD_BUNDLE, sent=UP_TO_UPLOAD)


# The bundle


def test_a_bundle_of_fewer_than_t(world: World) -> None:
    """U2 of t − 1: too few hold the shares, and too few masks hide the update."""

    def three(cell: Any) -> Any:
        kept = strangers(cell)[:2]
        bundle = cut(bundle_of(cell), cell.me, lambda name: name in kept)
        assert len(bundle.headers) == cell.roster.body.threshold - 1
        return BundleNews(bundle=bundle)

    world.host.says[AgentPhase.SHARED] = three
    assert_refused(world, Check.BAD_BUNDLE, sent=UP_TO_SHARES)


@pytest.mark.parametrize("n_ciphertexts", [4, 3])
def test_a_bundle_without_me(world: World, n_ciphertexts: int) -> None:
    def without(cell: Any) -> Any:
        bundle = bundle_of(cell)
        heads = tuple(head for head in bundle.headers if head.body.agent != cell.me)
        sealed = bundle.ciphertexts[:n_ciphertexts]
        return BundleNews(bundle=with_changes(bundle, headers=heads, ciphertexts=sealed))

    world.host.says[AgentPhase.SHARED] = without
    assert_refused(world, Check.BAD_BUNDLE, sent=UP_TO_SHARES)


def test_a_ciphertext_swapped_by_the_server(world: World) -> None:
    """It blames the server, never the dealers, who signed other digests: nobody is accused."""

    def swapped(cell: Any) -> Any:
        bundle = bundle_of(cell)
        one, other, *rest = bundle.ciphertexts
        return BundleNews(bundle=with_changes(bundle, ciphertexts=(other, one, *rest)))

    world.host.says[AgentPhase.SHARED] = swapped
    assert_refused(world, Check.BAD_BUNDLE, sent=UP_TO_SHARES)
    assert "complaint" not in world.host.kinds()
    assert not world.texts("complaint")


def test_a_ciphertext_that_the_server_made_itself(world: World) -> None:
    def made(cell: Any) -> Any:
        bundle = bundle_of(cell)
        texts = (bytes(82), *bundle.ciphertexts[1:])
        return BundleNews(bundle=with_changes(bundle, ciphertexts=texts))

    world.host.says[AgentPhase.SHARED] = made
    assert_refused(world, Check.BAD_BUNDLE, sent=UP_TO_SHARES)
    assert not world.texts("complaint")


def test_a_dealers_header_of_another_cell(world: World) -> None:
    """A colluder's shares of an earlier attempt, replayed."""

    def old(cell: Any) -> Any:
        bundle = bundle_of(cell)
        place = next(i for i, h in enumerate(bundle.headers) if h.body.agent != cell.me)
        dealer = next(
            a for a in cell.others if a.state.ready.body.agent == bundle.headers[place].body.agent
        )
        body = with_changes(bundle.headers[place].body, transcript=bytes(32))
        heads = list(bundle.headers)
        heads[place] = sign(dealer._signer, "shares", body).signed
        return BundleNews(bundle=with_changes(bundle, headers=tuple(heads)))

    world.host.says[AgentPhase.SHARED] = old
    assert_refused(world, Check.BAD_BUNDLE, sent=UP_TO_SHARES)


# The survivors


def test_survivors_without_me(world: World) -> None:
    world.host.says[AgentPhase.UPLOADED] = lambda cell: SurvivorsNews(
        survivors=survivors_of(cell, lambda name: name != cell.me)
    )
    assert_refused(world, Check.BAD_SURVIVORS, sent=UP_TO_UPLOAD)


def test_survivors_fewer_than_t(world: World) -> None:
    def three(cell: Any) -> Any:
        kept = {cell.me, *strangers(cell)[:2]}
        survivors = survivors_of(cell, lambda name: name in kept)
        assert len(survivors.headers) == cell.roster.body.threshold - 1
        return SurvivorsNews(survivors=survivors)

    world.host.says[AgentPhase.UPLOADED] = three
    assert_refused(world, Check.BAD_SURVIVORS, sent=UP_TO_UPLOAD)


def test_only_me_survived(world: World) -> None:
    """The sum of one."""
    world.host.says[AgentPhase.UPLOADED] = lambda cell: SurvivorsNews(
        survivors=survivors_of(cell, lambda name: name == cell.me)
    )
    assert_refused(world, Check.BAD_SURVIVORS, sent=UP_TO_UPLOAD)


def test_one_survivor_named_twice(world: World) -> None:
    def twice(cell: Any) -> Any:
        survivors = survivors_of(cell, lambda name: name != strangers(cell)[3])
        heads = (survivors.headers[0], *survivors.headers)
        return SurvivorsNews(survivors=with_changes(survivors, headers=heads))

    world.host.says[AgentPhase.UPLOADED] = twice
    assert_refused(world, Check.BAD_SURVIVORS, sent=UP_TO_UPLOAD)


def test_a_survivor_that_masked_for_other_members(world: World) -> None:
    """A colluder signs a header of another T2, so that U3 has two sets of masks in it."""

    def other(cell: Any) -> Any:
        survivors = survivors_of(cell)
        place = next(i for i, h in enumerate(survivors.headers) if h.body.agent != cell.me)
        member = survivors.headers[place].body.agent
        signer = next(a._signer for a in cell.others if a._signer.identity == member)
        body = with_changes(survivors.headers[place].body, bundle=bytes(32))
        heads = list(survivors.headers)
        heads[place] = sign(signer, "masked-upload", body).signed
        return SurvivorsNews(survivors=with_changes(survivors, headers=tuple(heads)))

    world.host.says[AgentPhase.UPLOADED] = other
    assert_refused(world, Check.BAD_SURVIVORS, sent=UP_TO_UPLOAD)


def test_a_survivor_that_did_not_share(world: World) -> None:
    """It is in U3 and not in U2: nobody holds shares of its secrets."""
    world.host.gone["share"] = frozenset({0})

    def added(cell: Any) -> Any:
        survivors = survivors_of(cell)
        ghost = cell.others[0]
        body = with_changes(survivors.headers[0].body, agent=ghost._signer.identity)
        heads = [*survivors.headers, sign(ghost._signer, "masked-upload", body).signed]
        heads.sort(key=lambda head: head.body.agent)
        return SurvivorsNews(survivors=with_changes(survivors, headers=tuple(heads)))

    world.host.says[AgentPhase.UPLOADED] = added
    assert_refused(world, Check.BAD_SURVIVORS, sent=UP_TO_UPLOAD)


def test_survivors_while_the_upload_is_not_done_are_refused_and_no_crash(world: World) -> None:
    """SURVIVORS out of turn, with the header of an upload that the server would not take."""
    host = world.host
    host.refuses["upload"] = [ProblemType.STAGE_CLOSED]

    def early(cell: Any) -> Any:
        mine = parse(Signed[MaskedHeader], host.bodies_of("upload")[0])
        cell.upload()
        heads = sorted([mine, *cell.book.uploads.values()], key=lambda head: head.body.agent)
        return SurvivorsNews(survivors=Survivors(transcript=cell.transcript, headers=tuple(heads)))

    host.says[AgentPhase.SHARED] = in_turn(honestly(AgentPhase.SHARED), early)
    assert_refused(world, Check.BAD_SURVIVORS, sent=(*UP_TO_SHARES, "upload"))


def test_two_different_survivor_lists(world: World) -> None:
    """Another U3 after CONFIRM: with both, masks of one member could be asked for in both kinds."""
    world.host.says[AgentPhase.CONFIRMED] = lambda cell: SurvivorsNews(
        survivors=survivors_of(cell, lambda name: name != strangers(cell)[0])
    )
    assert_refused(world, Check.TWO_SURVIVORS, sent=UP_TO_CONFIRM)


@pytest.mark.parametrize("gone", [(), (0,), (1,), (2,), (3,)], ids=str)
def test_one_agent_asked_for_in_both_lists(world: World, gone: tuple[int, ...]) -> None:
    """Whatever U3 is, REVEAL holds one kind of share for each dealer: no wire field asks for one.

    CONFIRMED holds all that it can: words on this U3 of everyone, and words of all on each other
    U3 that the cell could have had.
    """
    host = world.host
    host.gone["upload"] = frozenset(gone)

    def all_that_there_is(cell: Any) -> Any:
        true = cell.honest_news(AgentPhase.CONFIRMED).confirmed
        others = [a for a in cell.others if a._signer.identity in cell.book.uploads]
        extra = []
        for n_left in (1, 2):
            for left in combinations(others, n_left):
                names = {agent._signer.identity for agent in left}
                other = survivors_of(cell, lambda name, names=names: name not in names)
                message = derive.confirm_hash(cell.book.bundle_hash(), other.entries())
                extra += [
                    Confirm(
                        transcript=cell.transcript,
                        agent=agent._signer.identity,
                        signature=agent._signer.sign_bytes(message),
                    )
                    for agent in others
                ]
        words = (*extra, *true.confirmations)[-32:]
        return ConfirmedNews(confirmed=Confirmed(transcript=cell.transcript, confirmations=words))

    host.says[AgentPhase.CONFIRMED] = all_that_there_is
    world.run()
    cell = host.cell
    (reveal,) = (parse(Signed[Reveal], body).body for body in host.bodies_of("reveal"))
    of_self = {dealer for dealer, _ in reveal.self_shares}
    of_mask = {dealer for dealer, _ in reveal.mask_shares}
    lost = {cell.others[i]._signer.identity for i in gone}
    assert not of_self & of_mask
    assert of_mask == lost
    assert of_self == set(strangers(cell)) - lost
    assert len(reveal.self_shares) + len(reveal.mask_shares) == 4


# CONFIRMED


def confirmed_by(cell: Any, n: int) -> tuple[Confirm, ...]:
    """The words of the first n members, the agent's own among them."""
    words = cell.honest_news(AgentPhase.CONFIRMED).confirmed.confirmations
    mine = [word for word in words if word.agent == cell.me]
    return (*mine, *(word for word in words if word.agent != cell.me))[:n]


def pad_nothing(cell: Any, words: tuple[Confirm, ...]) -> tuple[Confirm, ...]:
    return words


def pad_with_one_twice(cell: Any, words: tuple[Confirm, ...]) -> tuple[Confirm, ...]:
    return (*words, words[-1], words[-1])


def pad_with_the_servers_own(cell: Any, words: tuple[Confirm, ...]) -> tuple[Confirm, ...]:
    key = cell.host.key
    message = derive.confirm_hash(cell.book.bundle_hash(), cell.book.survivor_entries())
    word = Confirm(
        transcript=cell.transcript, agent=key.identity, signature=key.sign_bytes(message)
    )
    return (*words, word)


def pad_with_a_word_on_another_u3(cell: Any, words: tuple[Confirm, ...]) -> tuple[Confirm, ...]:
    """An honest member was shown another U3, and signed that."""
    signed = {word.agent for word in words}
    member = next(a for a in cell.others if a._signer.identity not in signed)
    other = survivors_of(cell, lambda name: name != min(signed))
    message = derive.confirm_hash(cell.book.bundle_hash(), other.entries())
    word = Confirm(
        transcript=cell.transcript,
        agent=member._signer.identity,
        signature=member._signer.sign_bytes(message),
    )
    return (*words, word)


def pad_with_a_word_of_another_cell(cell: Any, words: tuple[Confirm, ...]) -> tuple[Confirm, ...]:
    signed = {word.agent for word in words}
    true = cell.honest_news(AgentPhase.CONFIRMED).confirmed.confirmations
    word = next(word for word in true if word.agent not in signed)
    return (*words, with_changes(word, transcript=bytes(32)))


@pytest.mark.parametrize(
    "pad",
    [
        pad_nothing,
        pad_with_one_twice,
        pad_with_the_servers_own,
        pad_with_a_word_on_another_u3,
        pad_with_a_word_of_another_cell,
    ],
)
def test_confirmed_by_fewer_than_t(world: World, pad: Callable[..., tuple[Confirm, ...]]) -> None:
    def three(cell: Any) -> Any:
        words = pad(cell, confirmed_by(cell, cell.roster.body.threshold - 1))
        return ConfirmedNews(confirmed=Confirmed(transcript=cell.transcript, confirmations=words))

    world.host.says[AgentPhase.CONFIRMED] = three
    assert_refused(world, Check.UNCONFIRMED, sent=UP_TO_CONFIRM)


def test_confirmed_by_someone_who_did_not_survive(world: World) -> None:
    """It is a member and signs the right U3, but it is not in it."""
    host = world.host
    host.gone["upload"] = frozenset({0})
    host.gone["confirm"] = frozenset({1})

    def three_and_a_ghost(cell: Any) -> Any:
        cell.confirm()
        ghost = cell.others[0]._signer
        message = derive.confirm_hash(cell.book.bundle_hash(), cell.book.survivor_entries())
        word = Confirm(
            transcript=cell.transcript, agent=ghost.identity, signature=ghost.sign_bytes(message)
        )
        words = (*cell.book.confirms.values(), word)
        assert len(words) == 4
        return ConfirmedNews(confirmed=Confirmed(transcript=cell.transcript, confirmations=words))

    host.says[AgentPhase.CONFIRMED] = three_and_a_ghost
    assert_refused(world, Check.UNCONFIRMED, sent=UP_TO_CONFIRM)


def test_confirmed_before_anything_was_confirmed(world: World) -> None:
    """CONFIRMED instead of SURVIVORS: nothing is revealed for a U3 that was not signed."""

    def early(cell: Any) -> Any:
        cell.close_uploads()
        message = derive.confirm_hash(cell.book.bundle_hash(), cell.book.survivor_entries())
        words = tuple(
            Confirm(
                transcript=cell.transcript,
                agent=agent._signer.identity,
                signature=agent._signer.sign_bytes(message),
            )
            for agent in cell.others
        )
        return ConfirmedNews(confirmed=Confirmed(transcript=cell.transcript, confirmations=words))

    world.host.says[AgentPhase.UPLOADED] = early
    assert_refused(world, Check.UNCONFIRMED, sent=UP_TO_UPLOAD)


# REVEAL, once


def other_news(cell: Any) -> Any:
    """Another U3, and all words on it that colluders could give."""
    other = survivors_of(cell, lambda name: name != strangers(cell)[0])
    message = derive.confirm_hash(cell.book.bundle_hash(), other.entries())
    words = tuple(
        Confirm(
            transcript=cell.transcript,
            agent=agent._signer.identity,
            signature=agent._signer.sign_bytes(message),
        )
        for agent in cell.others
    )
    return ConfirmedNews(confirmed=Confirmed(transcript=cell.transcript, confirmations=words))


@pytest.mark.parametrize("when", ["before-it-is-sent", "after-it-is-sent"])
def test_a_second_reveal(world: World, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Killed around REVEAL and started again, the agent repeats the stored one and no other."""
    host = world.host
    real = Journal.end_part

    def kill(*_: object, **__: object) -> None:
        raise KillError

    if when == "before-it-is-sent":
        monkeypatch.setattr(Transport, "reveal", kill)
    else:
        monkeypatch.setattr(Journal, "end_part", kill)
    with pytest.raises(KillError):
        world.run()
    monkeypatch.undo()
    monkeypatch.setattr(agent_module, "AdaptedModel", lambda base, lora: base)
    assert Journal.end_part is real
    assert world.phases() == [AgentPhase.REVEALED]
    stored = world.journal.attempt(1)
    assert stored is not None
    assert stored.reveal is not None
    for phase in (AgentPhase.UPLOADED, AgentPhase.CONFIRMED, AgentPhase.REVEALED):
        host.says[phase] = other_news
    world.run()
    bodies = host.bodies_of("reveal")
    assert len(bodies) == (1 if when == "before-it-is-sent" else 2)
    assert set(bodies) == {stored.reveal.canonical()}
    assert len(host.bodies_of("confirm")) == 1
    assert world.phases() == [AgentPhase.REVEALED]
    assert world.journal.attempt(1) is None


def test_a_second_reveal_by_pretending_that_the_first_did_not_arrive(world: World) -> None:
    host = world.host
    host.refuses["reveal"] = [ProblemType.BUSY, ProblemType.INTERNAL, None]
    host.says[AgentPhase.REVEALED] = other_news
    world.run()
    bodies = host.bodies_of("reveal")
    assert len(bodies) == 3
    assert len(set(bodies)) == 1
    assert world.phases() == [AgentPhase.REVEALED]


@pytest.mark.parametrize(
    "problem", [ProblemType.NOT_FOUND, ProblemType.BAD_MESSAGE, ProblemType.NOT_SELECTED]
)
def test_a_refused_reveal_ends_the_part_and_does_not_stop_the_agent_for_good(
    world: World, problem: ProblemType
) -> None:
    """Else a server could shut an agent down with one answer, again at every start."""
    world.host.refuses["reveal"] = [problem]
    world.run()
    assert [part.ended for part in world.journal.parts()] == [True]


# FAILED and retries


def test_a_failure_signed_by_another_key(world: World) -> None:
    """It would make the agent mask its update for a second cell, while the first one goes on."""
    world.host.says[AgentPhase.UPLOADED] = lambda cell: cell.failed(key=Signer.generate())
    assert_refused(world, Check.FOREIGN_SIGNATURE, sent=UP_TO_UPLOAD)


@pytest.mark.parametrize(
    "false",
    [{"transcript": bytes(32)}, {"round": 2}, {"federation": bytes(16)}],
    ids=["cell", "round", "federation"],
)
def test_a_failure_of_another_cell(world: World, false: dict[str, Any]) -> None:
    """A FAILED that the server signed for another cell, replayed."""
    world.host.says[AgentPhase.UPLOADED] = lambda cell: cell.failed(**false)
    assert_refused(world, Check.NO_RETRY, sent=UP_TO_UPLOAD)


def test_a_retry_after_confirm(world: World) -> None:
    """FAILED after CONFIRM, with leave to try again: the update is consumed all the same."""
    world.host.says[AgentPhase.CONFIRMED] = lambda cell: cell.failed(
        reason=FailureReason.TOO_FEW_CONFIRMED
    )
    world.run()
    assert tuple(world.host.kinds()) == UP_TO_CONFIRM
    assert world.phases() == [AgentPhase.ABANDONED]
    assert world.journal.attempt(1) is None
    assert world.home.update_files() == []
    # Nor does the round come back by the front door.
    task = TaskReply(task=TrainTask(round=world.host.signed_round), newest_release=0)
    world.host.task = lambda after: task
    with pytest.raises(TrustError) as refused:
        world.run()
    assert refused.value.check is Check.STALE_MANIFEST
    assert tuple(world.host.kinds()) == UP_TO_CONFIRM


def test_retries_without_end(world: World) -> None:
    """Every cell fails after the uploads: two sums at most could have this update in them."""
    world.host.says[AgentPhase.UPLOADED] = lambda cell: cell.failed()
    world.run()
    assert tuple(world.host.kinds()) == UP_TO_UPLOAD * 2
    assert world.phases() == [AgentPhase.ABANDONED]
    assert "its cell failed" in world.journal.parts()[0].note


def test_retries_without_end_before_any_upload(world: World) -> None:
    """Nothing of the update has left, but every attempt tells the server when an agent is there."""
    world.host.says[AgentPhase.READY] = lambda cell: cell.failed()
    world.run()
    assert tuple(world.host.kinds()) == UP_TO_READY * 9
    assert world.phases() == [AgentPhase.ABANDONED]


def test_both_attempts_mask_the_same_words_with_other_masks(world: World) -> None:
    """Else the difference of two vectors would tell of the rounding, or of the update."""
    host = world.host
    host.says[AgentPhase.UPLOADED] = in_turn(
        lambda cell: cell.failed(), honestly(AgentPhase.UPLOADED)
    )
    world.run()
    assert tuple(host.kinds()) == (*UP_TO_UPLOAD, *ALL)
    first, second = (host.cells[attempt].body() for attempt in (1, 2))
    assert np.count_nonzero(first == second) < 3
    cell = host.cell
    others = [cell.payloads[name] for name in strangers(cell)]
    assert np.array_equal(cell.sum(), sum(others, start=world.words.copy()))


# A vector that came too late


def test_a_late_vector(make_world: Callable[..., World]) -> None:
    """The server keeps an honest agent's vector, and closes U3 without it.

    From everything it then has (all messages, all REVEALs of the others, and all that c colluders
    know) it rebuilds the agent's masking key and takes off every pairwise mask. What is left is the
    update under the agent's own mask, whose seed nobody revealed a share of: c shares are known,
    and c shares fit every seed there is.
    """
    target = masking(cell_target=10, max_cell=19)
    world = make_world(n_others=9, masking=target)
    host = world.host

    def late(cell: Any) -> Any:
        cell.upload()
        kept = tuple(sorted(name for name in cell.book.uploads if name != cell.me))
        cell.book.close_uploading(kept)
        cell.played.add("close-uploads")
        return SurvivorsNews(survivors=cell.book.survivors())

    host.says[AgentPhase.UPLOADED] = late
    assert_refused(world, Check.BAD_SURVIVORS, sent=UP_TO_UPLOAD)
    cell, plan, truth = host.cell, host.plan, world.state
    assert truth is not None
    c, t = cell.roster.body.colluders, cell.roster.body.threshold
    assert (c, t, len(strangers(cell))) == (2, 7, 9)
    cell.confirm()
    cell.reveal()  # the honest others confirmed a U3 in which all is well
    reveals = [signed.body for signed in cell.book.reveals.values()]
    assert len(reveals) == 9
    assert cell.me not in cell.book.reveals
    colluders = cell.others[:c]

    # The masking key comes back, as it must for the others' sum.
    shares = {
        cell.book.cell.places[reveal.agent] + 1: dict(reveal.mask_shares)[cell.me]
        for reveal in reveals
    }
    places = sorted(shares)[:t]
    masking_key = Rebuilder(places).secret([shares[place] for place in places])
    assert masking_key == truth.masking_private_key
    bundle_hash = cell.book.bundle_hash()
    pairwise = [
        Mask(
            seed=derive.pair_seed(
                derive.agree(masking_key, cell.book.cell.readies[name].masking_key),
                bundle_hash,
                cell.me,
                name,
            ),
            sign=derive.pair_sign(name, cell.me),  # taken off
        )
        for name in strangers(cell)
    ]
    stripped = cell.body().copy()
    MaskAdder(pairwise, word_bits=plan.word_bits).add(stripped)

    # Which is not the update, but the update under the agent's own mask.
    checks = derive.check_words(bundle_hash, word_bits=plan.word_bits)
    plain = with_checks(world.words, checks, plan, 0, plan.n_words)
    own_seed = derive.self_mask_seed(truth.self_seed, bundle_hash, cell.me)
    own_mask = expand(own_seed, plan.n_words, word_bits=plan.word_bits)
    assert np.array_equal(stripped - plain, own_mask)
    assert np.count_nonzero(stripped == plain) < 3

    # Of the own mask's seed the server has c shares of t, from its colluders and nobody else.
    known: dict[int, bytes] = {}
    for reveal in reveals:
        assert cell.me not in dict(reveal.self_shares)
    for agent in colluders:
        (given,) = (found for found in agent.state.received if found.dealer == cell.me)
        known[cell.book.cell.places[agent._signer.identity] + 1] = given.self_share
    assert len(known) == c < t
    places = [*known, *(x for x in range(1, 11) if x not in known)][:t]
    coefficients = Rebuilder(places)._coefficients
    for candidate in (bytes(32), b"\xff" * 32, sha256(b"any other")):
        guessed = [int.from_bytes(known[x], "big") if x in known else x * 1000 for x in places]
        rest = sum(a * b for a, b in zip(coefficients[:-1], guessed[:-1], strict=True))
        missing = int.from_bytes(candidate, "big") - rest
        guessed[-1] = missing * pow(coefficients[-1], -1, PRIME) % PRIME
        fitting = [value.to_bytes(SHARE_BYTES, "big") for value in guessed]
        assert Rebuilder(places).secret(fitting) == candidate

    # And no message of anybody holds the seed.
    everything = b"".join(body for _, body in host.arrived)
    everything += b"".join(signed.canonical() for signed in cell.book.reveals.values())
    everything += b"".join(agent.state.canonical() for agent in colluders)
    for secret in (truth.self_seed, own_seed, truth.sealing_private_key):
        assert secret not in everything
        assert b64u_encode(secret).encode() not in everything


def test_a_late_vector_gets_no_second_chance(world: World) -> None:
    """The agent that was left out does not mask its update for anybody else in this round."""
    host = world.host
    host.says[AgentPhase.UPLOADED] = lambda cell: EndedNews(counted=False)
    world.run()
    assert tuple(host.kinds()) == UP_TO_UPLOAD
    assert world.phases() == [AgentPhase.ABANDONED]
    assert world.home.update_files() == []


# What the owner decides


def test_a_stop_during_the_delay_before_ready_sends_no_ready(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY is sent when the delay is over, or not at all: else its time is the stop's."""
    world = make_world(masking=masking(ready_delay_s=600.0))
    monkeypatch.setattr("edge_agent.masked.secrets.randbelow", lambda n: n - 1)
    real, before = world.clock.sleep, world.clock.time

    def sleep(duration_s: float) -> None:
        real(duration_s)
        if world.clock.time - before > 5.0:
            world.wishes.stop()

    world.clock.sleep = sleep
    world.run()
    assert world.clock.time - before < 10.0
    assert world.host.arrived == []
    world.clock.sleep = real
    world.run()
    assert tuple(world.host.kinds()) == ALL
    assert world.n_trained == 1


def test_the_delay_before_ready_ends_at_once_when_the_owner_stops(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(masking=masking(ready_delay_s=600.0))
    monkeypatch.setattr("edge_agent.masked.secrets.randbelow", lambda n: n - 1)
    world.clock.sleep = lambda duration_s: world.wishes.stop()
    before = world.clock.time
    world.run()
    assert world.clock.time == before
    assert "shares" not in world.host.kinds()


def test_a_server_that_only_lets_the_agent_wait_is_left_when_the_owner_stops(world: World) -> None:
    host = world.host
    n_polls = 0

    def nothing(cell: Any) -> Any:
        nonlocal n_polls
        n_polls += 1
        if n_polls == 5:
            world.wishes.stop()
        return NoNews(retry_after_s=1.0)

    host.says[AgentPhase.READY] = nothing
    world.run()
    assert tuple(host.kinds()) == UP_TO_READY
    assert world.phases() == [AgentPhase.READY]


def test_a_part_that_does_not_exist_is_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server asks for bytes beyond the vector."""
    host = world.host
    real = host._status

    def more(cell: Any) -> Any:
        return with_changes(real(cell), missing=(0, 1))

    monkeypatch.setattr(host, "_status", more)
    with pytest.raises(TrustError, match="asks for part 1 of 1"):
        world.run()
    assert tuple(host.kinds()) == (*UP_TO_SHARES, "upload")


def test_a_conflict_that_is_none_stops_the_agent_with_a_sentence(world: World) -> None:
    world.host.refuses["ready"] = [ProblemType.CONFLICT]
    with pytest.raises(RefusedError):
        world.run()
    assert tuple(world.host.kinds()) == UP_TO_READY
