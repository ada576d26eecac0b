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
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import requests
from fastapi.testclient import TestClient
from requests.adapters import BaseAdapter
from sqlalchemy import insert
from urllib3 import HTTPResponse

from aggregator_server import merging as merging_module
from aggregator_server.app import create_app
from aggregator_server.blobs import FolderBlobs
from aggregator_server.config import ServerConfig
from aggregator_server.federation import Federation, open_federation
from aggregator_server.founding import found_federation
from aggregator_server.masking.books import Books
from aggregator_server.masking.vectors import SUMS
from aggregator_server.recipes import Masking, RecipeOptions, make_config
from aggregator_server.store.cells import identities_of
from aggregator_server.store.database import Database
from aggregator_server.store.rows import MaskedCellRow
from aggregator_server.store.schema import cell_members, masked_cells
from aggregator_server.uploads import UPLOADS
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
from protocol.blocks import BaseBlock, CellMasking, Factor, LoraRule, Weighting
from protocol.manifest import FederationManifest
from protocol.messages import Enrolment
from protocol.phases import AgentPhase, CellPhase, RoundPhase
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
N_MASKED_OPERATIONS = 120  # a masked round takes six messages and as many questions of each agent
N_MANY_MASKED_OPERATIONS = 300
FAST_MASKED_SEEDS = range(15)
SLOW_MASKED_SEEDS = range(15, 115)


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
    """Kills a machine at the n-th write from now, before or after it takes effect."""

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
        self.world.racing = True
        try:
            answer = self.world.server.client.request(method, url, content=body, headers=headers)
        except (KilledError, RuntimeError) as error:
            # The client's loop may be gone with the server, before it could say why.
            if isinstance(error, RuntimeError) and "portal" not in str(error):
                raise
            self.world.server.kill()
            raise requests.ConnectionError from None
        finally:
            self.world.racing = False
        self.world.advance_between_requests()
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

    def train_only(self, factors: tuple[Factor, ...]) -> None:
        """Nothing is trained here."""


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
            n_tokens=1,
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
        self.world.agents_bomb.disarm()
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
    n_rounds: int = N_ROUNDS
    working: bool = False
    """Is an agent at a turn of its loop, where it may be killed?"""
    clock: FakeClock = field(default_factory=FakeClock)
    bomb: Bomb = field(default_factory=Bomb)
    agents_bomb: Bomb = field(default_factory=Bomb)
    """Kills the agent that works, amid what it writes down."""
    race_chance: float = 0.0
    """How often the clockwork moves between two looks of one request at the database."""
    between_chance: float = 1.0
    """How often it moves after a request."""
    racing: bool = False
    fault_chance: float = 0.25
    kill_chance: float = 0.1
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        base = make_base()
        plain = self.seed % 2 and not self.masked
        # Cells of 5 to 7, which lose one or two, with words of both sizes.
        n_agents = 6 + self.seed % 2 if self.masked else N_AGENTS
        options = RecipeOptions(
            name="Faults",
            n_rounds=self.n_rounds,
            cohort_target=5 + self.seed // 2 % 2 if self.masked else 3,
            min_cohort=5 if self.masked else 2,
            masking=Masking.CELLS if self.masked else Masking.OFF,
            word_bits=32 if self.seed // 4 % 2 else 16,
            ready_delay_s=5.0 * (self.seed // 8 % 2),
            rank=2,
            target_modules=("q_proj",),
            lora_rule=LoraRule.FEDIT if plain else LoraRule.FFA_LORA,
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
        for index in range(n_agents):
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
        if self.masked:  # a cell takes many turns, and soon fails when time runs
            operations += [(20, operations[0][1]), (3, self.arm_agents_bomb)]
        weights = [weight for weight, _ in operations]
        self.rng.choices([operation for _, operation in operations], weights)[0]()

    def advance_between_requests(self) -> None:
        if self.rng.random() < self.between_chance:
            self.server.advance()

    def race(self) -> None:
        """What the clockwork's thread may do while a request is at work."""
        if self.racing and self.rng.random() < self.race_chance:
            self.racing = False
            try:
                self.server.federation.rounds.advance()
            finally:
                self.racing = True

    def arm_agents_bomb(self) -> None:
        self.agents_bomb.arm(self.rng.randint(1, 6), after=self.rng.random() < 0.5)

    def advance_clock(self) -> None:
        steps = [1.0, 30.0, 200.0, DEADLINE_S + 10, 3 * DEADLINE_S]
        if self.masked:
            steps = [*steps[:2] * 6, 95.0, *steps]
        self.clock.time += self.rng.choice(steps)

    def assemble(self) -> None:
        """Without a fault up to the round's cells, so that what follows happens to them."""
        chances = self.fault_chance, self.kill_chance
        self.fault_chance = self.kill_chance = 0.0
        while not self.server.federation._store.cells.of_round(1):
            for agent in self.agents:
                agent.work()
            self.server.advance()
        self.fault_chance, self.kill_chance = chances

    def settle(self) -> None:
        """The faults end; the federation must too."""
        self.fault_chance = self.kill_chance = 0.0
        self.bomb.disarm()
        self.agents_bomb.disarm()
        if not self.server.alive:
            self.server.start()
        for _ in range(200):
            before = self.server.federation._store.changes()
            if self.server.federation.status().finished:
                break
            for agent in self.agents:
                agent.work()
            # Where all wait for a deadline, time passes more quickly; nobody counts as absent.
            waits = self.masked and self.server.federation._store.changes() == before
            self.clock.time += 60 if waits else 5
            self.advance_between_requests()
        for agent in self.agents:
            agent.work()


def uniform(config: ServerConfig) -> ServerConfig:
    block = config.aggregation.model_copy(update={"weighting": Weighting.UNIFORM})
    return config.model_copy(update={"aggregation": block})


def agents_disk_fails(monkeypatch: pytest.MonkeyPatch, worlds: list[World]) -> None:
    """An agent that works may die amid each transaction of its journal and each file it writes."""
    real_transaction, real_hashed = Journal._transaction, masked_module.write_hashed
    real_durably = masked_module.write_durably

    @contextmanager
    def on_agents_disk() -> Iterator[None]:
        if worlds and worlds[-1].working:
            with worlds[-1].agents_bomb.around():
                yield
        else:
            yield

    @contextmanager
    def transaction(self: Journal) -> Iterator[None]:
        with on_agents_disk(), real_transaction(self):
            yield

    def write_hashed(path: Path, pieces: Iterable[memoryview]) -> bytes:
        with on_agents_disk():
            return real_hashed(path, pieces)

    def write_durably(path: Path, *pieces: bytes | memoryview) -> None:
        with on_agents_disk():
            real_durably(path, *pieces)

    monkeypatch.setattr(Journal, "_transaction", transaction)
    monkeypatch.setattr(masked_module, "write_hashed", write_hashed)
    monkeypatch.setattr(masked_module, "write_durably", write_durably)


def races_happen(monkeypatch: pytest.MonkeyPatch, worlds: list[World]) -> None:
    """After any look at the database that holds no lock, the clockwork may have gone on."""
    real_reading, real_of = Database.reading, Books.of

    @contextmanager
    def reading(self: Database) -> Iterator[object]:
        with real_reading(self) as connection:
            yield connection
        if worlds:
            worlds[-1].race()

    @contextmanager
    def of(self: Books, row: MaskedCellRow) -> Iterator[object]:
        raced, worlds[-1].racing = worlds[-1].racing, False
        try:
            with real_of(self, row) as book:
                yield book
        finally:
            worlds[-1].racing = raced

    monkeypatch.setattr(Database, "reading", reading)
    monkeypatch.setattr(Books, "of", of)


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    yield from making_worlds(tmp_path, monkeypatch)


def making_worlds(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    monkeypatch.setattr(agent_module, "AdaptedModel", lambda base, lora: base)
    monkeypatch.setattr(agent_module, "LocalTrainer", FakeTrainer)
    chosen = Chosen(settings=StepSettings(), text="")
    monkeypatch.setattr(agent_module.Agent, "_choose", lambda _: chosen)
    monkeypatch.setattr(agent_module, "LONG_POLL_S", 0.0)
    monkeypatch.setattr(masked_module, "LONG_POLL_S", 0.0)
    worlds: list[World] = []
    bombs: list[Bomb] = []
    # Pauses and delays follow from the seed too: what happens when depends on them.
    randbelow = secrets.randbelow
    monkeypatch.setattr(
        secrets, "randbelow", lambda n: worlds[-1].rng.randrange(n) if worlds else randbelow(n)
    )
    real_writing, real_put = Database.writing, FolderBlobs.put
    agents_disk_fails(monkeypatch, worlds)
    races_happen(monkeypatch, worlds)

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

    def make(seed: int, *, masked: bool = False, n_rounds: int = N_ROUNDS) -> World:
        world = World(seed, root, masked=masked, n_rounds=n_rounds)
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
        slots = federation.charter.turns.plan_at(0).layout.slots
        near += (
            float(slots[0].step)
            * federation.charter.turns.plan_at(0).max_weight
            / unit_of(world.manifest)
        )
        assert near < 1.0, "two attempts of one agent could not be told apart"
    releases = [federation.releases.get(number) for number in range(world.n_rounds + 1)]
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
    if world.masked:
        check_one_sum_for_each_update(world)
        check_what_agents_sent(world, published)
        check_nothing_is_left(world)


def check_one_sum_for_each_update(world: World) -> None:
    """By the server's journal: who confirmed in a cell is in no other one of the round."""
    store = world.server.federation._store
    last = store.rounds.latest()
    assert last is not None
    for number in range(1, last.number + 1):
        attempts: dict[bytes, list[tuple[int, bool]]] = {}
        n_sums: Counter[bytes] = Counter()
        for cell in store.cells.of_round(number):
            confirmers = store.cells.confirmers(cell.transcript)
            for member in store.cells.members(cell.transcript):
                consumed = member.agent in confirmers
                attempts.setdefault(member.agent, []).append((member.attempt, consumed))
            if cell.phase is CellPhase.UNMASKED:
                n_sums.update(identities_of(cell.survivors or "[]"))
        assert max(n_sums.values(), default=0) <= 1, "an update is in two sums"
        for found in attempts.values():
            # Only the last cell of an agent may have its word.
            assert not any(consumed for _, consumed in sorted(found)[:-1])


def check_what_agents_sent(world: World, published: dict[int, np.ndarray]) -> None:
    """By the agents' journals: one word on one list of survivors, and nothing new after it."""
    store = world.server.federation._store
    for agent in world.agents:
        by_round: dict[int, list[tuple[str, bytes]]] = {}
        for item in agent.journal.sent():
            if item.round is not None:
                by_round.setdefault(item.round, []).append((item.what, item.sha256))
        for sent in by_round.values():
            for what in ("confirm", "reveal"):
                assert len({digest for kind, digest in sent if kind == what}) <= 1
            kinds = [kind for kind, _ in sent]
            if "confirm" in kinds:
                after = set(kinds[kinds.index("confirm") :])
                assert after <= {"confirm", "reveal"}, after
            heads = {digest for kind, digest in sent if kind == "masked-upload-header"}
            assert len(heads) <= 2, "an update was masked for more than one second try"
        identity = agent.home.load_or_create_signer().identity
        for part in agent.journal.parts():
            if part.phase is AgentPhase.REVEALED and part.round not in published:
                # It revealed for a cell that was lost, or whose round was.
                phases = {
                    cell.phase
                    for cell in store.cells.of_round(part.round)
                    if store.cells.member(cell.transcript, identity) is not None
                }
                failed = store.rounds.get(part.round).phase is RoundPhase.FAILED
                assert failed
                assert phases


def check_nothing_is_left(world: World) -> None:
    """Rounds that are over leave no vector, no sum, and no secret of an attempt."""
    federation = world.server.federation
    for folder in (UPLOADS, SUMS):
        assert federation._blobs.names(folder) == ()
    for agent in world.agents:
        for ended in agent.journal.parts():
            if ended.ended:
                assert agent.journal.attempt(ended.round) is None


def run_sequence(world: World, n_operations: int = N_OPERATIONS) -> None:
    if world.masked:
        world.fault_chance, world.kill_chance, world.race_chance = 0.1, 0.04, 0.2
        world.between_chance = 0.5
        if world.seed % 4:
            world.assemble()
    for _ in range(n_operations):
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
    run_sequence(make_world(seed, masked=True, n_rounds=1), N_MASKED_OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SLOW_MASKED_SEEDS, ids=lambda seed: f"seed_{seed}")
def test_under_masks_an_update_is_in_one_sum_at_most_in_many_more_sequences(
    make_world: Callable[..., World], seed: int
) -> None:
    run_sequence(make_world(seed, masked=True), N_MANY_MASKED_OPERATIONS)


@pytest.mark.parametrize(
    ("masked", "seed"), [(False, 0), (False, 1), *((True, seed) for seed in range(12))]
)
def test_no_agent_is_left_out_because_the_clockwork_moves_amid_its_requests(
    make_world: Callable[..., World], masked: bool, seed: int
) -> None:
    world = make_world(seed, masked=masked, n_rounds=1)
    world.fault_chance = world.kill_chance = 0.0
    world.race_chance, world.between_chance = 0.4, 0.0
    world.settle()
    check(world)
    took_part = [part for agent in world.agents for part in agent.journal.parts()]
    assert len(took_part) >= world.manifest.rounds.min_cohort
    assert not [part for part in took_part if part.phase is AgentPhase.ABANDONED]
    release = world.server.federation.releases.newest()
    assert release.aggregation.n_agents == len(took_part)


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


def test_the_check_notices_a_double_count_under_masks(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that publishes a cell's sum twice is caught."""
    real = merging_module.load_sum

    def twice(*args: object) -> object:
        found = real(*args)
        return replace(found, weighted_sum=found.weighted_sum * 2)

    monkeypatch.setattr(merging_module, "load_sum", twice)
    world = make_world(1, masked=True, n_rounds=1)
    world.fault_chance = world.kill_chance = 0.0
    world.settle()
    with pytest.raises(AssertionError):
        check(world)


def test_the_check_notices_an_update_that_was_given_a_second_cell(
    make_world: Callable[..., World],
) -> None:
    """A server that lets in again who has confirmed is caught, before anything is published."""
    world = make_world(2, masked=True, n_rounds=1)
    world.fault_chance = world.kill_chance = 0.0
    world.settle()
    check(world)
    store = world.server.federation._store
    (cell,) = store.cells.of_round(1)
    other = replace(cell, transcript=bytes(32), wave=2, phase=CellPhase.FAILED)
    member = store.cells.members(cell.transcript)[0]
    with store._database.writing() as connection:
        connection.execute(insert(masked_cells).values(**{**asdict(other), "phase": "failed"}))
        again = replace(member, transcript=bytes(32), attempt=member.attempt + 1)
        connection.execute(insert(cell_members).values(**asdict(again)))
    with pytest.raises(AssertionError):
        check_one_sum_for_each_update(world)
