"""A federation on a synthetic base, a clock moved by hand, and agents that speak HTTP."""

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import pytest
import structlog
from fastapi.testclient import TestClient

from aggregator_server.app import create_app
from aggregator_server.config import ServerConfig
from aggregator_server.federation import Federation, open_federation
from aggregator_server.founding import found_federation
from aggregator_server.recipes import Masking, RecipeOptions, make_config
from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import BaseBlock, FilterRule
from protocol.chain import RoundManifest
from protocol.limits import NONCE_BYTES, PART_BYTES
from protocol.manifest import FederationManifest
from protocol.messages import (
    Enrolment,
    Revocation,
    TaskReply,
    TrainTask,
    UploadHeader,
    Withdrawal,
    WithdrawalReason,
)
from protocol.problems import ProblemDocument, ProblemType
from protocol.signing import Invite, Signer, prove_invite, sign
from protocol.transport_signing import sign_request
from protocol.wire import parse, sha256

START = 1_800_000_000.0


class FakeClock:
    """A clock that a test moves by hand."""

    def __init__(self) -> None:
        self.time = START

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def sleep(self, duration_s: float) -> None:
        self.time += duration_s


def make_base(*, size: int = 64, d_in: int | None = None) -> BaseDescription:
    modules = tuple(
        LinearModule(name=f"model.layers.{layer}.self_attn.{name}", d_out=size, d_in=d_in or size)
        for layer in range(2)
        for name in ("q_proj", "v_proj")
    )
    return BaseDescription(
        base=BaseBlock(
            model="synthetic/tiny",
            source_dtype="float32",
            fingerprint=bytes(range(32)),
            tokenizer_digest=bytes(32),
        ),
        architecture="LlamaForCausalLM",
        n_parameters=100_000,
        max_positions=512,
        has_chat_template=False,
        linear_modules=modules,
    )


@dataclass
class Case:
    """A federation under test with its folder, clock and HTTP client."""

    directory: Path
    clock: FakeClock
    federation: Federation
    client: TestClient

    @property
    def manifest(self) -> FederationManifest:
        return self.federation.charter.manifest

    @property
    def prefix(self) -> str:
        return f"/v1/federations/{self.federation.charter.path_id}"

    def advance(self, seconds: float = 0.0) -> None:
        self.clock.time += seconds
        self.federation.advance()

    def restart(self) -> None:
        """As after kill -9: nothing of the old process is used, nothing is flushed."""
        self.clock.time += 2
        self.federation._store.close()
        self.federation = open_federation(
            self.directory, clock=self.clock, environment={}, may_edit=True
        )
        self.client = TestClient(create_app(self.federation))
        self.clock.time += 2


@dataclass
class FakeAgent:
    """An agent that trains nothing: its update is whatever the test says."""

    case: Case
    signer: Signer = field(default_factory=Signer.generate)

    @property
    def identity(self) -> bytes:
        return self.signer.identity

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        signed: bool = True,
        nonce: bytes | None = None,
        created: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx2.Response:
        all_headers = dict(headers or {})
        if signed:
            all_headers |= sign_request(
                self.signer,
                method=method,
                url="http://testserver" + path,
                body=body,
                created=int(self.case.clock.now() if created is None else created),
                nonce=nonce or secrets.token_bytes(NONCE_BYTES),
            )
        return self.case.client.request(method, path, content=body, headers=all_headers)

    def enrolment(self, invite: Invite | None = None) -> bytes:
        manifest = self.case.manifest
        proof = None
        if invite is not None:
            proof = prove_invite(invite.code, agent=self.identity, server=manifest.server)
        body = Enrolment(
            federation=manifest.federation,
            federation_digest=manifest.digest(),
            agent=self.identity,
            invite=proof,
        )
        return sign(self.signer, "enrolment", body).signed.canonical()

    def enrol(self, invite: Invite | None = None) -> httpx2.Response:
        return self.request("POST", f"{self.case.prefix}/enrolments", self.enrolment(invite))

    def revoke(self) -> httpx2.Response:
        body = Revocation(federation=self.case.manifest.federation, agent=self.identity)
        data = sign(self.signer, "revocation", body).signed.canonical()
        return self.request("POST", f"{self.case.prefix}/enrolments/revoke", data)

    def poll(self, *, after: int = 0, wait: float = 0.0) -> httpx2.Response:
        return self.request("GET", f"{self.case.prefix}/task?after={after}&wait={wait}")

    def task(self, *, after: int = 0) -> TaskReply:
        response = self.poll(after=after)
        assert response.status_code == 200, response.text
        return parse(TaskReply, response.content)

    def round(self) -> RoundManifest | None:
        task = self.task().task
        return task.round.body if isinstance(task, TrainTask) else None

    def header(
        self, manifest: RoundManifest, data: bytes, *, attempt: int = 1, weight: int = 1
    ) -> UploadHeader:
        return UploadHeader(
            federation=manifest.federation,
            round=manifest.round,
            attempt=attempt,
            agent=self.identity,
            round_digest=manifest.digest(),
            layout=self.case.federation.charter.turns.at(manifest.release).layout.digest(),
            weight=weight,
            body_sha256=sha256(data),
            body_n_bytes=len(data),
        )

    def begin(self, header: UploadHeader) -> httpx2.Response:
        data = sign(self.signer, "upload", header).signed.canonical()
        return self.request("POST", f"{self.case.prefix}/uploads", data)

    def _path(self, header: UploadHeader) -> str:
        return f"{self.case.prefix}/uploads/{header.round}/{header.attempt}"

    def upload_status(self, header: UploadHeader) -> httpx2.Response:
        return self.request("GET", self._path(header))

    def put(self, header: UploadHeader, n: int, part: bytes) -> httpx2.Response:
        return self.request("PUT", f"{self._path(header)}/parts/{n}", part)

    def complete(self, header: UploadHeader) -> httpx2.Response:
        return self.request("POST", f"{self._path(header)}/complete")

    def withdraw(
        self, round_number: int, reason: WithdrawalReason = WithdrawalReason.OWNER_STOPPED
    ) -> httpx2.Response:
        body = Withdrawal(
            federation=self.case.manifest.federation,
            round=round_number,
            agent=self.identity,
            reason=reason,
        )
        data = sign(self.signer, "withdrawal", body).signed.canonical()
        return self.request("POST", f"{self.case.prefix}/withdrawals", data)

    def upload(
        self, manifest: RoundManifest, vector: np.ndarray, *, attempt: int = 1, weight: int = 1
    ) -> httpx2.Response:
        """The whole of an upload; the answer of the first step that is refused, or the last."""
        data = vector.astype("<f4").tobytes()
        header = self.header(manifest, data, attempt=attempt, weight=weight)
        response = self.begin(header)
        for n in range(header.n_parts):
            if response.status_code == 200:
                response = self.put(header, n, data[n * PART_BYTES : (n + 1) * PART_BYTES])
        return self.complete(header) if response.status_code == 200 else response

    def constant(self, value: float) -> np.ndarray:
        return np.full(self.case.federation.charter.layout.n_values, value, np.float32)


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """Whatever a test sets up for its logs ends with it."""
    handlers = list(logging.root.handlers)
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers


@pytest.fixture
def base() -> BaseDescription:
    return make_base()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def make_case(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., Case]]:
    cases: list[Case] = []

    def make(
        *,
        base: BaseDescription | None = None,
        edit: Callable[[ServerConfig], ServerConfig] | None = None,
        **options: object,
    ) -> Case:
        described = base or make_base()
        settings = {
            "name": "Test",
            "open_enrolment": True,
            "rank": 4,
            "n_rounds": 3,
            "masking": Masking.OFF,
            "filter": FilterRule.NONE,
            **options,
        }
        config = make_config(RecipeOptions(**settings), described)
        config = edit(config) if edit else config
        directory = tmp_path / f"federation-{len(cases)}"
        found_federation(directory, config=config, base=described, clock=clock)
        federation = open_federation(directory, clock=clock, environment={}, may_edit=True)
        clock.time += 2
        case = Case(directory, clock, federation, TestClient(create_app(federation)))
        cases.append(case)
        return case

    yield make
    for case in cases:
        case.federation.close()


@pytest.fixture
def make_base_of() -> Callable[..., BaseDescription]:
    return make_base


@pytest.fixture
def make_agent() -> Callable[[Case], FakeAgent]:
    return FakeAgent


@pytest.fixture
def make_agents() -> Callable[..., list[FakeAgent]]:
    def make(case: Case, n: int) -> list[FakeAgent]:
        agents = [FakeAgent(case) for _ in range(n)]
        for agent in agents:
            assert agent.enrol().status_code == 200
        return agents

    return make


@pytest.fixture
def start_round(make_agents) -> Callable[..., tuple[list[FakeAgent], RoundManifest]]:
    """Enrols agents and opens a round; gives the selected agents and the manifest."""

    def start(case: Case, n: int) -> tuple[list[FakeAgent], RoundManifest]:
        agents = make_agents(case, n)
        case.advance()
        tasks = {agent.identity: agent.round() for agent in agents}
        selected = [agent for agent in agents if tasks[agent.identity] is not None]
        manifest = tasks[selected[0].identity]
        assert manifest is not None
        return selected, manifest

    return start


@pytest.fixture
def problem_of() -> Callable[[httpx2.Response], ProblemType | None]:
    def problem(response: httpx2.Response) -> ProblemType | None:
        assert response.headers["content-type"] == "application/problem+json", response.text
        document = parse(ProblemDocument, response.content)
        assert document.status == response.status_code
        return document.problem_type

    return problem


@pytest.fixture
def blob_files() -> Callable[[Case], set[str]]:
    """The names of all blobs on disk."""

    def names(case: Case) -> set[str]:
        root = case.directory / "blobs"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    return names
