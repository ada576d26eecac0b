"""A clock moved by hand, a server that does what a test's script says, and one of masked rounds."""

import functools
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from privacy.fixed_point import EncodingPlan, agreed_layout, encode, split_sum, with_checks
from privacy.masking import MaskAdder, Words
from privacy.noise import SecureStream
from privacy.secagg import cells
from privacy.secagg.agent import SecAggAgent
from privacy.secagg.checks import CellPolicy
from privacy.secagg.server import CellServer
from privacy.turns import Turns
from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import (
    AggregationBlock,
    BaseBlock,
    CellMasking,
    LoraBlock,
    RoundsBlock,
    TrainingBlock,
)
from protocol.chain import (
    AggregationReport,
    BlobRef,
    FilterReport,
    NoVerdict,
    Release,
    RoundManifest,
)
from protocol.layout import VectorLayout
from protocol.manifest import FederationManifest
from protocol.masked import (
    BundleNews,
    CellNews,
    Complaint,
    Confirm,
    ConfirmedNews,
    EndedNews,
    Failed,
    FailedNews,
    FailureReason,
    MaskedHeader,
    News,
    Ready,
    ReadyList,
    Reveal,
    Roster,
    RosterNews,
    Shares,
    SurvivorsNews,
)
from protocol.messages import (
    Acknowledged,
    Credential,
    ReleasePage,
    TaskReply,
    TrainTask,
    UploadState,
    UploadStatus,
    WaitReason,
    WaitTask,
    Withdrawal,
)
from protocol.phases import AgentPhase
from protocol.problems import CONTENT_TYPE, ProblemType, problem_document
from protocol.signing import Signed, Signer, sign
from protocol.wire import WireModel, b64u_encode, parse, sha256
from quant.adapter import adapter_shapes, initial_adapter, peft_config, sent_layout, to_safetensors

START = 1_800_000_000.0


@dataclass
class FakeClock:
    """Sleeping moves it on and takes no time."""

    time: float = START
    slept: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)
        self.time += duration_s


@dataclass(frozen=True)
class Seen:
    """A request that arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server does with one request."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    """Close the connection without a word."""
    cut: int | None = None
    """Send only so many bytes of the body that was announced."""


Script = Callable[[Seen], Answer] | Answer


class QuietServer(ThreadingHTTPServer):
    """A client that closes early, as some tests do, is no event."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class ScriptedServer:
    """Answers one request after the other as told; the last answer holds for all that follow."""

    def __init__(self) -> None:
        self.script: list[Script] = []
        self.seen: list[Seen] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two writes

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                seen = Seen(
                    method=self.command,
                    path=self.path,
                    headers={name.lower(): value for name, value in self.headers.items()},
                    body=body,
                )
                server.seen.append(seen)
                step = server.script[min(len(server.seen), len(server.script)) - 1]
                self.give(step(seen) if callable(step) else step)

            do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - the names of http.server

            def give(self, answer: Answer) -> None:
                if answer.drop:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.content_type)
                self.send_header("Content-Length", str(len(answer.body)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body[: answer.cut])
                if answer.cut is not None:
                    self.close_connection = True

        self.http = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.close()


@pytest.fixture
def answer() -> type[Answer]:
    return Answer


@pytest.fixture
def refuse() -> Callable[..., Answer]:
    """A problem document."""

    def make(
        problem: ProblemType,
        *,
        server_time: float = START,
        retry_after_s: float | None = None,
        **changes: object,
    ) -> Answer:
        document = problem_document(
            problem, detail="told so", server_time=server_time, retry_after_s=retry_after_s
        )
        body = json.dumps({**document.as_json(), **changes}).encode()
        return Answer(status=problem.status, body=body, content_type=CONTENT_TYPE)

    return make


# A masked federation: its server is played by a test, all other members are real

N_EXTRA_S = 7200


def signer_of(name: str) -> Signer:
    """A key that follows from a name."""
    return Signer.from_private_bytes(sha256(name.encode()))


class RefusalError(Exception):
    """The played server refuses a request."""

    def __init__(self, problem: ProblemType) -> None:
        super().__init__(problem.value)
        self.problem = problem


class FakeCell:
    """The cell of one READY of the agent under test.

    Honest: what it says follows the protocol, and each stage of the others is played when the next
    one is asked for. A test replaces what is said (`MaskedHost.says`), and makes false documents
    with `form`, `ready_of` and `failed`.
    """

    def __init__(self, host: "MaskedHost", ready: Signed[Ready]) -> None:
        self.host, self.ready, self.me = host, ready, ready.body.agent
        self.everyone = [
            SecAggAgent.begin(
                signer,
                host.policy,
                credential=host.credential(signer.identity),
                attempt=ready.body.attempt,
                expires_at=int(START) + N_EXTRA_S,
            )
            for signer in host.signers
        ]
        self.listed, self.roster = self.form()
        inside = set(self.roster.body.identities())
        self.others = [a for a in self.everyone if a.state.ready.body.agent in inside]
        self.book = CellServer(
            self.roster.body, body_n_bytes=host.plan.n_bytes, word_bits=host.plan.word_bits
        )
        self.parts: dict[int, bytes] = {}
        self.header: Signed[MaskedHeader] | None = None
        self.bodies: dict[bytes, Words] = {}
        self.payloads: dict[bytes, Words] = {}
        self.played: set[str] = set()

    # Documents, true and false

    @functools.cached_property
    def transcript(self) -> bytes:
        return self.roster.body.transcript()

    def readies(self) -> list[Signed[Ready]]:
        """Of the whole wave, sorted by identity."""
        found = [self.ready, *(agent.state.ready for agent in self.everyone)]
        return sorted(found, key=lambda ready: ready.body.agent)

    def ready_of(self, index: int, **changes: Any) -> Signed[Ready]:
        """The READY of another member with other fields, signed by it again."""
        agent = self.everyone[index]
        body = Ready(**{**dict(agent.state.ready.body), **changes})
        return sign(agent._signer, "ready", body).signed

    def with_ready(self, index: int, **changes: Any) -> list[Signed[Ready]]:
        false = self.ready_of(index, **changes)
        true = self.everyone[index].state.ready
        return [false if ready == true else ready for ready in self.readies()]

    def form(
        self,
        readies: list[Signed[Ready]] | None = None,
        *,
        listed: dict[str, Any] | None = None,
        roster: dict[str, Any] | None = None,
        list_key: Signer | None = None,
        roster_key: Signer | None = None,
    ) -> tuple[Signed[ReadyList], Signed[Roster]]:
        """A list and the agent's cell in it: consistent but for the changes."""
        wave = self.readies() if readies is None else readies
        common = {
            "federation": self.host.manifest.federation,
            "round": self.host.round.round,
            "round_digest": self.host.round.digest(),
        }
        entries = tuple((ready.body.agent, ready.body.digest()) for ready in wave)
        ready_list = ReadyList(**common, wave=self.ready.body.attempt, entries=entries)
        ready_list = ready_list.model_copy(update=listed or {})
        drawn = cells.assign(ready_list, self.host.masking.cell_target)
        number = next(i for i, names in enumerate(drawn) if self.me in names)
        members = tuple(ready for ready in wave if ready.body.agent in drawn[number])
        c = cells.colluders(max(2, len(members)), wanted=self.host.masking.colluders)
        values = {
            **common,
            "list_digest": ready_list.digest(),
            "cell": number,
            "formed_at": int(START),
            "members": members,
            "threshold": cells.threshold(len(members), c),
            "colluders": c,
        }
        body = Roster(**{**values, **(roster or {})})
        key = self.host.key
        return (
            sign(list_key or key, "ready-list", ready_list).signed,
            sign(roster_key or key, "roster", body).signed,
        )

    def failed(
        self, *, key: Signer | None = None, may_retry: bool = True, **changes: Any
    ) -> FailedNews:
        body = Failed(
            federation=self.host.manifest.federation,
            round=self.host.round.round,
            transcript=self.transcript,
            reason=FailureReason.TOO_FEW_UPLOADED,
            may_retry=may_retry,
        ).model_copy(update=changes)
        return FailedNews(failed=sign(key or self.host.key, "failed", body).signed)

    # The other members, stage by stage

    def _present(self, stage: str) -> list[SecAggAgent]:
        gone = self.host.gone.get(stage, frozenset())
        return [agent for i, agent in enumerate(self.others) if i not in gone]

    def _once(self, stage: str) -> bool:
        if stage in self.played:
            return False
        self.played.add(stage)
        return True

    def share(self) -> None:
        if not self._once("share"):
            return
        for agent in self._present("share"):
            shares = self.host.deal(self, agent)
            self.book.check_shares(shares)
            self.book.shares[agent.state.ready.body.agent] = shares

    def mask(self) -> None:
        self.share()
        if not self._once("mask"):
            return
        self.book.close_sharing()
        for i, agent in enumerate(self.others):
            name = agent.state.ready.body.agent
            bundle = self.book.bundle_for(name)
            if bundle is None:
                continue
            plan, masks = self.host.plan, agent.receive_bundle(bundle)
            rng = np.random.default_rng(i)
            values = rng.normal(0.0, 0.1, plan.layout.n_values).astype(np.float32)
            stream = SecureStream(sha256(name))
            self.payloads[name] = encode(values, weight=i + 1, plan=plan, stream=stream)
            words = with_checks(self.payloads[name], masks.checks, plan, 0, plan.n_words)
            MaskAdder(masks.masks, word_bits=plan.word_bits).add(words)
            self.bodies[name] = words
            agent.sign_upload(sha256(words.tobytes()))
            agent.uploaded()

    def upload(self) -> None:
        self.mask()
        if not self._once("upload"):
            return
        for agent in self._present("upload"):
            header = agent.state.upload
            if header is not None:
                self.book.check_upload(header)
                self.book.uploads[header.body.agent] = header

    def close_uploads(self) -> None:
        self.upload()
        if self._once("close-uploads"):
            self.book.close_uploading()

    def confirm(self) -> None:
        self.close_uploads()
        if not self._once("confirm"):
            return
        for agent in self._present("confirm"):
            name = agent.state.ready.body.agent
            if name in self.book.uploads:
                self.book.confirms[name] = agent.receive_survivors(self.book.survivors())

    def reveal(self) -> None:
        if not self._once("reveal"):
            return
        confirmed = self.book.confirmed()
        assert confirmed is not None
        for agent in self._present("reveal"):
            name = agent.state.ready.body.agent
            if name in self.book.uploads:
                reveal = agent.receive_confirmed(confirmed)
                self.book.check_reveal(reveal)
                self.book.reveals[name] = reveal

    # What the agent hears, and the sum

    def honest_news(self, phase: AgentPhase) -> News:
        """What there is for the agent at a phase."""
        match phase:
            case AgentPhase.READY:
                return RosterNews(ready_list=self.listed, roster=self.roster)
            case AgentPhase.SHARED:
                self.mask()
                bundle = self.book.bundle_for(self.me)
                assert bundle is not None
                return BundleNews(bundle=bundle)
            case AgentPhase.UPLOADED:
                self.close_uploads()
                return SurvivorsNews(survivors=self.book.survivors())
            case _:
                self.confirm()
                confirmed = self.book.confirmed()
                assert confirmed is not None
                return ConfirmedNews(confirmed=confirmed)

    def body(self) -> Words:
        """The agent's masked vector as it arrived."""
        data = b"".join(self.parts[index] for index in sorted(self.parts))
        words: Words = np.frombuffer(data, self.host.plan.dtype)
        return words

    def sum(self) -> Words:
        """The survivors' sum as an honest server gets it, without its check words."""
        self.reveal()
        recovery = self.book.recover()
        assert recovery is not None
        plan = self.host.plan
        words = np.zeros(plan.n_words, plan.dtype)
        for name in recovery.survivors:
            words += self.body() if name == self.me else self.bodies[name]
        MaskAdder(recovery.masks, word_bits=plan.word_bits).add(words)
        return split_sum(words, recovery.checks, plan, n_members=len(recovery.survivors))


class MaskedHost:
    """The server of a masked federation, in the hands of a test; the registrar is apart.

    Attributes:
        says: What is said, instead of the truth, to an agent that stands at a phase.
        gone: Which of the other members (by place) miss a stage.
        refuses: What the next requests of a kind are refused with.
        arrived: All that the agent sent: kind and body, in order.
    """

    def __init__(self, key: Signer, *, n_others: int = 4, **changes: Any) -> None:
        self.key, self.registrar = key, signer_of("registrar")
        base = BaseDescription(
            base=BaseBlock(
                model="made/up",
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
        lora = LoraBlock(rank=2, alpha=4.0, target_modules=("q_proj",), init_seed=7)
        lora = changes.pop("lora", lora)
        masking = CellMasking(max_change=1.0, clip_norm=20.0, cell_target=5, ready_delay_s=0.0)
        self.masking: CellMasking = changes.pop("masking", masking)
        plain = changes.pop("layout", sent_layout(adapter_shapes(base, lora), lora.sent))
        layout: VectorLayout = agreed_layout(plain, self.masking, changes.get("privacy"))
        values: dict[str, Any] = {
            "federation": bytes(range(16)),
            "name": "Masked",
            "server": key.identity,
            "registrar": self.registrar.identity,
            "registrar_held_by_server": False,
            "created_at": START,
            "base": base.base,
            "lora": lora,
            "layout": layout.digest(),
            "training": TrainingBlock(local_steps=1, learning_rate=1e-3),
            "masking": self.masking,
            "aggregation": AggregationBlock(max_weight=50),
            "rounds": RoundsBlock(n_rounds=9, cohort_target=5, min_cohort=5),
        }
        self.manifest = FederationManifest(**{**values, **changes})
        self.federation = sign(key, "federation", self.manifest).signed
        self.turns = Turns.of((plain,), self.manifest)
        self.plan: EncodingPlan = self.turns.plan_at(0)
        self.base = base
        self.start = initial_adapter(base, lora)
        self.blobs: dict[bytes, bytes] = {}
        self.releases: list[Signed[Release]] = []
        self.publish(self.start)
        self.open_round()
        self.signers = [signer_of(f"member {i}") for i in range(n_others)]
        self.cells: dict[int, FakeCell] = {}
        self.says: dict[AgentPhase, Callable[[FakeCell], News]] = {}
        self.gone: dict[str, frozenset[int]] = {}
        self.refuses: dict[str, list[ProblemType | None]] = {}
        self.arrived: list[tuple[str, bytes]] = []
        self.withdrawn: list[Withdrawal] = []

    def deal(self, cell: FakeCell, agent: SecAggAgent) -> Shares:
        """What another member deals; a test may replace it."""
        return agent.receive_roster(cell.listed, cell.roster)

    # The chain

    def _blob(self, data: bytes) -> BlobRef:
        self.blobs[sha256(data)] = data
        return BlobRef(sha256=sha256(data), n_bytes=len(data))

    def publish(self, arrays: dict[str, Any], **changes: Any) -> Release:
        """The next release."""
        number = len(self.releases)
        sent = {s.name: arrays[s.name] for s in self.plan.layout.slots if s.name in arrays}
        values = {
            "federation": self.manifest.federation,
            "number": number,
            "round": number,
            "previous": self.releases[-1].body.digest() if number else None,
            "federation_digest": self.manifest.digest(),
            "round_digest": self.round.digest() if number else None,
            "adapter": self._blob(to_safetensors(arrays)),
            "sent": self._blob(to_safetensors(sent)),
            "config": self._blob(peft_config(self.manifest.base, self.manifest.lora)),
            "accepted": (),
            "rejected": (),
            "aggregation": AggregationReport(rule="none", n_cells=0, n_agents=0, update_norm=0.0),
            "filter": FilterReport(rule="none", n_cells=0, n_rejected=0),
            "verdict": NoVerdict(),
            "created_at": START,
        }
        release = Release(**{**values, **changes})
        self.releases.append(sign(self.key, "release", release).signed)
        return release

    def open_round(self, *, key: Signer | None = None, **changes: Any) -> RoundManifest:
        """The round that agents are asked for, from the newest release unless told otherwise."""
        newest = self.releases[-1].body
        values = {
            "federation": self.manifest.federation,
            "federation_digest": self.manifest.digest(),
            "round": newest.number + 1,
            "release": newest.number,
            "release_digest": newest.digest(),
            "sent": newest.sent,
            "selection_seed": bytes(32),
            "cohort_size": 5,
            "schedule_start": 0.0,
            "schedule_end": 0.5,
            "update_n_bytes": self.plan.n_bytes,
            "opened_at": START,
            "deadline_at": START + 3600.0,
            "cap_at": START + N_EXTRA_S,
        }
        self.round = RoundManifest(**{**values, **changes})
        self.signed_round = sign(key or self.key, "round", self.round).signed
        return self.round

    def credential(
        self, agent: bytes, *, key: Signer | None = None, **changes: Any
    ) -> Signed[Credential]:
        body = Credential(
            federation=self.manifest.federation, agent=agent, expires_at=int(START) + 10**6
        )
        key = key or self.registrar
        return sign(key, "credential", body.model_copy(update=changes)).signed

    @property
    def policy(self) -> CellPolicy:
        """What the other members hold the cell against."""
        return CellPolicy(
            federation=self.manifest.federation,
            round=self.round.round,
            round_digest=self.round.digest(),
            server=self.key.identity,
            registrar=self.registrar.identity,
            masking=self.masking,
            body_n_bytes=self.plan.n_bytes,
            min_members=self.masking.min_cell,
        )

    # What the agent sends

    @property
    def cell(self) -> FakeCell:
        """Of the newest READY."""
        return self.cells[max(self.cells)]

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.arrived]

    def bodies_of(self, kind: str) -> list[bytes]:
        return [body for name, body in self.arrived if name == kind]

    def _note(self, kind: str, body: bytes) -> None:
        self.arrived.append((kind, body))
        problem = self.refuses[kind].pop(0) if self.refuses.get(kind) else None
        if problem is not None:
            raise RefusalError(problem)

    def take_ready(self, ready: Signed[Ready]) -> Acknowledged:
        self._note("ready", ready.canonical())
        attempt = ready.body.attempt
        if attempt not in self.cells:
            self.cells[attempt] = FakeCell(self, ready)
        if self.cells[attempt].ready != ready:
            raise RefusalError(ProblemType.CONFLICT)
        return Acknowledged()

    def news(self, attempt: int, phase: AgentPhase) -> CellNews:
        if attempt not in self.cells:
            return CellNews(news=EndedNews(counted=False))
        cell = self.cells[attempt]
        lie = self.says.get(phase)
        return CellNews(news=lie(cell) if lie is not None else cell.honest_news(phase))

    def take_shares(self, shares: Shares) -> Acknowledged:
        self._note("shares", shares.canonical())
        cell = self._cell_of(shares.header.body.transcript)
        cell.book.check_shares(shares)
        if cell.book.shares.setdefault(cell.me, shares) != shares:
            raise RefusalError(ProblemType.CONFLICT)
        return Acknowledged()

    def take_complaint(self, signed: Signed[Complaint]) -> Acknowledged:
        self._note("complaint", signed.canonical())
        cell = self._cell_of(signed.body.transcript)
        cell.book.check_complaint(signed)
        cell.book.complaints[cell.me, signed.body.dealer.body.agent] = signed
        return Acknowledged()

    def begin_upload(self, signed: Signed[MaskedHeader]) -> UploadStatus:
        self._note("upload", signed.canonical())
        cell = self._cell_of(signed.body.transcript)
        cell.book.check_upload(signed)
        cell.header = cell.header or signed
        if cell.header != signed:
            raise RefusalError(ProblemType.CONFLICT)
        return self._status(cell)

    def put_part(self, attempt: int, part: int, data: bytes) -> UploadStatus:
        self._note("part", data)
        cell = self.cells[attempt]
        if cell.parts.setdefault(part, data) != data:
            raise RefusalError(ProblemType.CONFLICT)
        return self._status(cell)

    def complete(self, attempt: int) -> UploadStatus:
        self._note("complete", b"")
        cell = self.cells[attempt]
        assert cell.header is not None
        if sha256(cell.body().tobytes()) != cell.header.body.body_sha256:
            cell.parts.clear()
            raise RefusalError(ProblemType.DIGEST_MISMATCH)
        cell.book.uploads[cell.me] = cell.header
        return self._status(cell)

    @staticmethod
    def _status(cell: FakeCell) -> UploadStatus:
        if cell.me in cell.book.uploads:
            return UploadStatus(state=UploadState.ACCEPTED, missing=())
        assert cell.header is not None
        missing = tuple(i for i in range(cell.header.body.n_parts) if i not in cell.parts)
        return UploadStatus(state=UploadState.RECEIVING, missing=missing)

    def take_confirm(self, confirm: Confirm) -> Acknowledged:
        self._note("confirm", confirm.canonical())
        cell = self._cell_of(confirm.transcript)
        cell.book.confirms[cell.me] = confirm
        return Acknowledged()

    def take_reveal(self, signed: Signed[Reveal]) -> Acknowledged:
        self._note("reveal", signed.canonical())
        cell = self._cell_of(signed.body.transcript)
        cell.book.reveals[cell.me] = signed
        return Acknowledged()

    def _cell_of(self, transcript: bytes) -> FakeCell:
        """The agent's cell of this transcript, or, for a roster that lied, its newest."""
        found = [cell for cell in self.cells.values() if cell.transcript == transcript]
        return found[0] if found else self.cell

    # Over HTTP

    def task(self, after: int) -> TaskReply:
        """What there is to do; a test may replace it."""
        newest = self.releases[-1].body.number
        if self.round.round > after:
            return TaskReply(task=TrainTask(round=self.signed_round), newest_release=newest)
        wait = WaitTask(reason=WaitReason.FINISHED, retry_after_s=1.0)
        return TaskReply(task=wait, newest_release=newest)

    def answer(self, method: str, path: str, body: bytes) -> bytes:
        """The body of the answer to a request.

        Raises:
            RefusalError: As `refuses` says.
        """
        path, _, query = path.partition("?")
        found = re.fullmatch(r"/v1/federations/[^/]+/(.+)", path)
        assert found is not None, path
        options = dict(pair.split("=") for pair in query.split("&") if pair)
        names = found[1].split("/")
        if method == "GET":
            return self._get(names, options)
        match method, names:
            case "PUT", ["uploads", _, attempt, "parts", part]:
                reply: WireModel = self.put_part(int(attempt), int(part), body)
            case "POST", ["uploads", _, attempt, "complete"]:
                reply = self.complete(int(attempt))
            case "POST", ["readies"]:
                reply = self.take_ready(parse(Signed[Ready], body))
            case "POST", ["withdrawals"]:
                self.withdrawn.append(parse(Signed[Withdrawal], body).body)
                reply = Acknowledged()
            case _:
                _, transcript, kind = names
                reply = self._post(transcript, kind, body)
        return reply.canonical()

    def _get(self, names: list[str], options: dict[str, str]) -> bytes:
        match names:
            case ["task"]:
                return self.task(int(options["after"])).canonical()
            case ["releases"]:
                after = int(options["after"])
                newest = self.releases[-1].body.number
                page = ReleasePage(releases=tuple(self.releases[after + 1 :]), newest=newest)
                return page.canonical()
            case ["blobs", name]:
                return self.blobs[bytes.fromhex(name)]
            case _:
                _, _, attempt = names
                return self.news(int(attempt), AgentPhase(options["phase"])).canonical()

    def _post(self, transcript: str, kind: str, body: bytes) -> WireModel:
        taken: dict[str, tuple[Any, Callable[[Any], WireModel], Callable[[Any], bytes]]] = {
            "shares": (Shares, self.take_shares, lambda m: m.header.body.transcript),
            "complaints": (Signed[Complaint], self.take_complaint, lambda m: m.body.transcript),
            "uploads": (Signed[MaskedHeader], self.begin_upload, lambda m: m.body.transcript),
            "confirm": (Confirm, self.take_confirm, lambda m: m.transcript),
            "reveal": (Signed[Reveal], self.take_reveal, lambda m: m.body.transcript),
        }
        model, take, transcript_of = taken[kind]
        message = parse(model, body)
        assert b64u_encode(transcript_of(message)) == transcript
        return take(message)


@pytest.fixture
def make_host(server_key: Signer) -> Callable[..., MaskedHost]:
    """The server of a masked federation that a test plays, and the other members of its cells."""

    def make(**changes: Any) -> MaskedHost:
        return MaskedHost(server_key, **changes)

    return make


@pytest.fixture
def refusal_error() -> type[RefusalError]:
    return RefusalError


@pytest.fixture
def serve(
    server: ScriptedServer, refuse: Callable[..., Answer]
) -> Iterator[Callable[[MaskedHost], str]]:
    """Put a host on the wire; its address. A fault of the host's own fails the test."""
    faults: list[BaseException] = []

    def start(host: MaskedHost) -> str:
        def give(seen: Seen) -> Answer:
            try:
                return Answer(body=host.answer(seen.method, seen.path, seen.body))
            except RefusalError as error:
                return refuse(error.problem, retry_after_s=1.0)
            except BaseException as error:
                faults.append(error)
                raise

        server.script = [give]
        return server.url

    yield start
    if faults:
        raise faults[0]
