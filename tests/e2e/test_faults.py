"""Random sequences of faults: nothing acknowledged is lost, nothing is counted twice.

After divviup/janus: a sequence draws random operations (let an agent work, drop a request, drop a
response, replay, duplicate, corrupt, kill and restart the server between or inside its
transactions, kill an agent, advance the clock) over the real agent, journal and transport and the
real server, store and blobs, joined by their HTTP messages. Only training is replaced: every update
carries a value of its own in a coordinate of its agent's own, so a loss or a double count shows in
the published adapter. Under masks the update is encoded, and the cell's messages fail like others.

A failing sequence is replayed by its seed: `pytest tests/e2e/test_faults.py -k 'seed_17'`.
"""

import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import requests
from fastapi.testclient import TestClient
from requests.adapters import BaseAdapter
from urllib3 import HTTPResponse

from aggregator_server.app import create_app
from aggregator_server.blobs import FolderBlobs
from aggregator_server.config import ServerConfig
from aggregator_server.federation import Federation, open_federation
from aggregator_server.founding import found_federation
from aggregator_server.recipes import Masking, RecipeOptions, make_config
from aggregator_server.store.database import Database
from edge_agent import agent as agent_module
from edge_agent import masked as masked_module
from edge_agent.agent import Agent
from edge_agent.chain import check_discovery
from edge_agent.errors import RefusedError, TrainingStoppedError, TransportError
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from edge_agent.member import Member
from edge_agent.membership import record_outgoing
from edge_agent.politeness import OwnersWishes
from edge_agent.training.planning import Chosen
from edge_agent.training.trainer import TrainingResult
from edge_agent.transport import Transport
from privacy.updates import PlainUpdate
from protocol.base_description import BaseDescription, LinearModule
from protocol.manifest import BaseBlock, CellMasking, Factor, FederationManifest, Weighting
from protocol.messages import Enrolment
from protocol.phases import AgentPhase, RoundPhase
from protocol.signing import sign
from quant.adapter import flatten
from quant.memory import StepSettings

URL = "http://127.0.0.1:1"
N_AGENTS = 4
N_ROUNDS = 3
N_OPERATIONS = 60
DEADLINE_S = 3600.0
FAST_SEEDS = range(20)
SLOW_SEEDS = range(20, 220)
N_MASKED_AGENTS = 6
N_MASKED_OPERATIONS = 250  # a masked round takes six messages and as many questions of each agent
FAST_MASKED_SEEDS = range(8)
SLOW_MASKED_SEEDS = range(8, 68)


class KilledError(BaseException):
    """kill -9: no handler of ours may catch it."""


class FakeClock:
    """A clock that only sleeping and the sequence move."""

    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def sleep(self, duration_s: float) -> None:
        self.time += duration_s


def make_base() -> BaseDescription:
    return BaseDescription(
        base=BaseBlock(
            model="synthetic/tiny",
            source_dtype="float32",
            fingerprint=bytes(32),
            tokenizer_digest=bytes(32),
        ),
        architecture="LlamaForCausalLM",
        n_parameters=1000,
        max_positions=64,
        has_chat_template=False,
        linear_modules=(LinearModule(name="model.layers.0.q_proj", d_out=8, d_in=8),),
    )


def value_of(round_number: int, attempt: int) -> float:
    """What an agent's update carries in its coordinate: no two updates of an agent share one."""
    return float(100 * round_number + attempt)


def unit_of(manifest: FederationManifest) -> float:
    """What one of `value_of` is in an update: under masks, all fit the range that is encoded.

    A step of the encoding is a fifth of it, so that rounding leaves values apart.
    """
    masking = manifest.masking
    return masking.max_change / 1000 if isinstance(masking, CellMasking) else 1.0


class Bomb:
    """Kills the server at the n-th write from now, before or after it takes effect."""

    def __init__(self) -> None:
        self.fuse: int | None = None
        self.after = False

    def arm(self, fuse: int, *, after: bool) -> None:
        self.fuse, self.after = fuse, after

    def disarm(self) -> None:
        self.fuse = None

    @contextmanager
    def around(self) -> Iterator[None]:
        if self.fuse is not None:
            self.fuse -= 1
        due = self.fuse is not None and self.fuse <= 0
        if due and not self.after:
            raise KilledError
        yield
        if due:
            raise KilledError


class Fault(StrEnum):
    DROP_REQUEST = "drop-request"
    DROP_RESPONSE = "drop-response"
    DUPLICATE = "duplicate"
    REPLAY = "replay"
    CORRUPT = "corrupt"


@dataclass
class Server:
    """The server in its folder; killed, it leaves only what it wrote."""

    directory: Path
    clock: FakeClock
    bomb: Bomb
    alive: bool = True

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.bomb.disarm()
        self.clock.time += 2
        self.federation: Federation = open_federation(
            self.directory, clock=self.clock, environment={}, may_edit=True
        )
        self.client = TestClient(create_app(self.federation), base_url=URL)
        self.clock.time += 2
        self.alive = True

    def kill(self) -> None:
        self.alive = False
        self.bomb.disarm()
        self.federation._store.close()

    def advance(self) -> None:
        if not self.alive:
            return
        try:
            self.federation.advance()
        except KilledError:
            self.kill()


class Wire(BaseAdapter):
    """Carries requests to the server through a network that fails."""

    def __init__(self, world: "World") -> None:
        super().__init__()
        self.world = world

    def send(self, request: requests.PreparedRequest, **_: object) -> requests.Response:
        world = self.world
        if world.masked and world.working and world.rng.random() < world.kill_chance / 4:
            raise KilledError  # the agent, with a message kept and not sent
        fault = world.draw_fault()
        if not world.server.alive:
            if world.rng.random() < 0.5:
                world.server.start()
            raise requests.ConnectionError
        if fault is Fault.DROP_REQUEST:
            raise requests.ConnectionError
        body = request.body or b""
        body = body.encode() if isinstance(body, str) else body
        if fault is Fault.REPLAY and world.seen:
            self._carry(*world.rng.choice(world.seen))  # its answer reaches nobody
        if fault is Fault.CORRUPT and body:
            at = world.rng.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ (1 << world.rng.randrange(8))]) + body[at + 1 :]
        sent = (request.method or "", request.url or "", dict(request.headers), body)
        world.seen.append(sent)
        response = self._carry(*sent)
        if fault is Fault.DUPLICATE:
            self._carry(*sent)
        if fault is Fault.DROP_RESPONSE:
            raise requests.ConnectionError
        if world.masked and world.working and world.rng.random() < world.kill_chance / 4:
            raise KilledError  # the agent, with an answer that it never read
        return response

    def _carry(
        self, method: str, url: str, headers: dict[str, str], body: bytes
    ) -> requests.Response:
        if not self.world.server.alive:
            raise requests.ConnectionError
        try:
            answer = self.world.server.client.request(method, url, content=body, headers=headers)
        except KilledError:
            self.world.server.kill()
            raise requests.ConnectionError from None
        self.world.server.advance()
        response = requests.Response()
        response.status_code = answer.status_code
        response.headers.update(answer.headers)
        response.raw = HTTPResponse(
            body=io.BytesIO(answer.content), status=answer.status_code, preload_content=False
        )
        return response

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class FakeBase:
    """What an `Agent` asks of a base and an adapted model, and who it is."""

    description: BaseDescription
    world: "World"
    index: int


class FakeTrainer:
    """Makes the update that tells whose it is; now and then the machine dies first."""

    def __init__(self, adapted: FakeBase, *_: object, **__: object) -> None:
        self.base = adapted

    def run(self, start: object, layout: object, *, weight: int) -> TrainingResult:
        world, index = self.base.world, self.base.index
        if world.rng.random() < world.kill_chance:
            raise KilledError
        part = world.agents[index].journal.open_part()
        vector = np.zeros(layout.n_values, np.float32)
        vector[index] = value_of(part.round, part.attempt) * unit_of(world.manifest)
        world.clock.sleep(world.rng.random() * 30)
        return TrainingResult(
            update=PlainUpdate(vector=vector, weight=weight),
            n_steps=1,
            n_examples=1,
            first_loss=1.0,
            last_loss=1.0,
        )


@dataclass(frozen=True)
class FakeData:
    examples: tuple[int, ...] = (0,)


class FaultyAgent:
    """An agent on its machine; killed, it leaves only its home."""

    def __init__(self, world: "World", index: int, root: Path) -> None:
        self.world, self.index, self.home = world, index, AgentHome(root)
        self.home.create()
        self.start()

    def start(self) -> None:
        world = self.world
        self.journal = Journal(self.home.journal_path)
        signer = self.home.load_or_create_signer()
        self.wishes = OwnersWishes(self.journal, world.clock, None)
        transport = Transport(
            URL,
            clock=world.clock,
            signer=signer,
            on_outgoing=record_outgoing(self.journal, world.clock),
            patience_s=120.0,
        )
        transport._session.mount("http://", Wire(world))
        transport.use_federation(world.manifest)
        member = self.journal.membership()
        if member is None:
            signed = world.signed_manifest
            self.journal.join(url=URL, federation=signed, data="made", now=world.clock.now())
            member = self.journal.membership()
        if member.credential is None:
            enrolment = Enrolment(
                federation=world.manifest.federation,
                federation_digest=world.manifest.digest(),
                agent=signer.identity,
                invite=None,
            )
            self.agent = None
            try:
                credential = transport.enrol(sign(signer, "enrolment", enrolment).signed)
            except TransportError:
                return
            self.journal.set_credential(credential)
            member = self.journal.membership()
        self.agent = Agent(
            member=Member(home=self.home, journal=self.journal, membership=member, signer=signer),
            transport=transport,
            base=FakeBase(make_base(), world, self.index),
            data=FakeData(),
            wishes=self.wishes,
            clock=world.clock,
            on_event=lambda _: None,
        )

    def kill(self) -> None:
        self.journal.close()
        self.start()

    def work(self) -> None:
        """One turn of the loop; an agent that gives up is started again by its owner."""
        if self.agent is None:
            self.kill()
            return
        self.world.working = True
        try:
            self.agent._turn()
        except KilledError:
            self.world.working = False
            self.kill()
        except RefusedError as error:
            self.world.working = False
            try:
                self.agent._after_refusal(error)
            except RefusedError:
                self.kill()
        except (TransportError, TrainingStoppedError):
            self.world.working = False
            self.kill()
        finally:
            self.world.working = False


@dataclass
class World:
    """A server, its agents, and the network between them."""

    seed: int
    root: Path
    masked: bool = False
    working: bool = False
    """Is an agent at a turn of its loop, where it may be killed?"""
    clock: FakeClock = field(default_factory=FakeClock)
    bomb: Bomb = field(default_factory=Bomb)
    fault_chance: float = 0.25
    kill_chance: float = 0.1
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        base = make_base()
        sent = (Factor.A, Factor.B) if self.seed % 2 and not self.masked else (Factor.B,)
        options = RecipeOptions(
            name="Faults",
            n_rounds=N_ROUNDS,
            cohort_target=N_MASKED_AGENTS if self.masked else 3,
            min_cohort=5 if self.masked else 2,
            masking=Masking.CELLS if self.masked else Masking.OFF,
            ready_delay_s=5.0,
            rank=2,
            target_modules=("q_proj",),
            sent=sent,
            deadline_s=DEADLINE_S,
            open_enrolment=True,
        )
        directory = self.root / "server"
        config = uniform(make_config(options, base))
        found_federation(directory, config=config, base=base, clock=self.clock)
        self.server = Server(directory, self.clock, self.bomb)
        discovery = self.server.federation.discovery()
        self.signed_manifest = discovery.federation
        self.manifest = check_discovery(discovery, None)
        self.agents: list[FaultyAgent] = []
        for index in range(N_MASKED_AGENTS if self.masked else N_AGENTS):
            self.agents.append(FaultyAgent(self, index, self.root / f"agent-{index}"))

    def draw_fault(self) -> Fault | None:
        if self.rng.random() >= self.fault_chance:
            return None
        return self.rng.choice(list(Fault))

    def operate(self) -> None:
        operations: list[tuple[float, Callable[[], None]]] = [
            (10, lambda: self.rng.choice(self.agents).work()),
            (1, lambda: self.rng.choice(self.agents).kill()),
            (2, self.server.kill),
            (4, lambda: self.bomb.arm(self.rng.randint(1, 8), after=self.rng.random() < 0.5)),
            (1, self.advance_clock),
            (2, self.server.advance),
        ]
        weights = [weight for weight, _ in operations]
        self.rng.choices([operation for _, operation in operations], weights)[0]()

    def advance_clock(self) -> None:
        self.clock.time += self.rng.choice([1.0, 30.0, 200.0, DEADLINE_S + 10, 3 * DEADLINE_S])

    def settle(self) -> None:
        """The faults end; the federation must too."""
        self.fault_chance = self.kill_chance = 0.0
        self.bomb.disarm()
        if not self.server.alive:
            self.server.start()
        for _ in range(200):
            if self.server.federation.status().finished:
                break
            for agent in self.agents:
                agent.work()
            self.clock.time += 5
            self.server.advance()
        for agent in self.agents:
            agent.work()


def uniform(config: ServerConfig) -> ServerConfig:
    block = config.aggregation.model_copy(update={"weighting": Weighting.UNIFORM})
    return config.model_copy(update={"aggregation": block})


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    monkeypatch.setattr(agent_module, "AdaptedModel", lambda base, lora: base)
    monkeypatch.setattr(agent_module, "LocalTrainer", FakeTrainer)
    chosen = Chosen(settings=StepSettings(), text="")
    monkeypatch.setattr(agent_module.Agent, "_choose", lambda _: chosen)
    monkeypatch.setattr(agent_module, "LONG_POLL_S", 0.0)
    monkeypatch.setattr(masked_module, "LONG_POLL_S", 0.0)
    worlds: list[World] = []
    bombs: list[Bomb] = []
    real_writing, real_put = Database.writing, FolderBlobs.put

    @contextmanager
    def writing(self: Database) -> Iterator[object]:
        if not bombs:
            with real_writing(self) as connection:
                yield connection
            return
        bomb = bombs[0]
        if bomb.fuse is not None and bomb.fuse <= 1 and not bomb.after:
            with real_writing(self) as connection:
                yield connection
                raise KilledError  # the transaction is not committed
        with bomb.around(), real_writing(self) as connection:
            yield connection

    def put(self: FolderBlobs, key: str, data: bytes) -> None:
        if not bombs:
            real_put(self, key, data)
            return
        with bombs[0].around():
            real_put(self, key, data)

    monkeypatch.setattr(Database, "writing", writing)
    monkeypatch.setattr(FolderBlobs, "put", put)

    def make(seed: int, *, masked: bool = False) -> World:
        world = World(seed, tmp_path, masked=masked)
        worlds.append(world)
        bombs.append(world.bomb)
        return world

    yield make
    for world in worlds:
        world.server.federation._store.close()
        for agent in world.agents:
            agent.journal.close()


def check(world: World) -> None:
    federation = world.server.federation
    acknowledged = AgentPhase.REVEALED if world.masked else AgentPhase.UPLOADED
    near = 0.05
    if world.masked:  # a value is rounded to one of the two steps beside it
        slots = federation.charter.masked.plan.layout.slots
        near += (
            float(slots[0].step)
            * federation.charter.masked.plan.max_weight
            / unit_of(world.manifest)
        )
        assert near < 1.0, "two attempts of one agent could not be told apart"
    releases = [federation.releases.get(number) for number in range(N_ROUNDS + 1)]
    layout = federation.charter.layout
    vectors = [flatten(federation.releases.arrays(release), layout) for release in releases]
    published: dict[int, np.ndarray] = {}
    for before, after, release in zip(vectors, vectors[1:], releases[1:], strict=False):
        moved = (after.astype(np.float64) - before) / unit_of(world.manifest)
        summed = moved * release.aggregation.n_agents
        published[release.round] = np.round(summed, 3)
        assert np.count_nonzero(published[release.round]) == release.aggregation.n_agents
    digests: dict[int, set[bytes]] = {}
    for agent in world.agents:
        for part in agent.journal.parts():
            digests.setdefault(part.round, set()).add(part.manifest.body.digest())
            if part.phase is acknowledged and part.round in published:
                # Acknowledged: in the sum, once, with its own value.
                found = published[part.round][agent.index]
                assert found == pytest.approx(value_of(part.round, part.attempt), abs=near)
        for round_number, summed in published.items():
            # Nothing but whole updates of this round, each at most once.
            attempts = [p.attempt for p in agent.journal.parts() if p.round == round_number]
            allowed = [0.0, *(value_of(round_number, attempt) for attempt in attempts)]
            assert any(summed[agent.index] == pytest.approx(v, abs=near) for v in allowed)
    assert all(len(found) == 1 for found in digests.values()), "a round number had two manifests"
    assert federation.status().finished
    last = federation._store.rounds.latest()
    assert last is not None
    assert last.phase in {RoundPhase.PUBLISHED, RoundPhase.FAILED}


def run_sequence(world: World) -> None:
    for _ in range(N_MASKED_OPERATIONS if world.masked else N_OPERATIONS):
        world.operate()
    world.settle()
    check(world)


@pytest.mark.parametrize("seed", FAST_SEEDS, ids=lambda seed: f"seed_{seed}")
def test_nothing_acknowledged_is_lost_and_nothing_is_counted_twice(
    make_world: Callable[[int], World], seed: int
) -> None:
    run_sequence(make_world(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_SEEDS, ids=lambda seed: f"seed_{seed}")
def test_nothing_is_lost_or_counted_twice_in_many_more_sequences(
    make_world: Callable[[int], World], seed: int
) -> None:
    run_sequence(make_world(seed))


@pytest.mark.parametrize("seed", FAST_MASKED_SEEDS, ids=lambda seed: f"seed_{seed}")
def test_under_masks_an_update_is_in_one_sum_at_most(
    make_world: Callable[..., World], seed: int
) -> None:
    run_sequence(make_world(seed, masked=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_MASKED_SEEDS, ids=lambda seed: f"seed_{seed}")
def test_under_masks_an_update_is_in_one_sum_at_most_in_many_more_sequences(
    make_world: Callable[..., World], seed: int
) -> None:
    run_sequence(make_world(seed, masked=True))


def test_the_check_notices_a_double_count(
    make_world: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: a server that sums an update twice is caught."""
    from aggregator_server.uploads import Uploads

    real = Uploads.load

    def twice(self: Uploads, upload: object) -> object:
        found = real(self, upload)
        found.weighted_sum[:] *= 2
        return found

    monkeypatch.setattr(Uploads, "load", twice)
    world = make_world(1)
    world.fault_chance = world.kill_chance = 0.0
    world.settle()
    with pytest.raises(AssertionError):
        check(world)
