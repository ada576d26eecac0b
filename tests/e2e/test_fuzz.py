"""The HTTP surface fuzzed: from our own OpenAPI document, and by mutations of real messages.

Whatever comes, signed or not: never a fault of the server, never a hang, and every refusal is a
problem document that an agent can act on. What a hostile member sends costs nobody else the round.

The sequences are the same at every run; a failing one is printed with its request.
"""

import base64
import contextlib
import copy
import io
import json
import secrets
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, currently_in_test_context, given, note, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from requests.adapters import BaseAdapter
from urllib3 import HTTPResponse

from aggregator_server import app as app_module
from aggregator_server.app import create_app
from aggregator_server.federation import Federation, open_federation
from aggregator_server.founding import found_federation
from aggregator_server.helper.service import HelperService, found_helper
from aggregator_server.helper_app import create_helper_app
from aggregator_server.recipes import Masking, RecipeOptions, make_config
from aggregator_server.web import cells as cells_module
from edge_agent.transport import Transport, Upload
from privacy.fixed_point import encode, with_checks
from privacy.masking import MaskAdder
from privacy.noise import SecureStream
from privacy.secagg.agent import SecAggAgent
from privacy.secagg.checks import CellPolicy
from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import BaseBlock
from protocol.chain import RoundManifest
from protocol.errors import EncodingError
from protocol.helped import HelperDescription
from protocol.limits import NONCE_BYTES
from protocol.masked import (
    BundleNews,
    Complaint,
    ConfirmedNews,
    RosterNews,
    SurvivorsNews,
)
from protocol.messages import (
    Credential,
    Enrolment,
    Revocation,
    TrainTask,
    UploadHeader,
    Withdrawal,
    WithdrawalReason,
)
from protocol.phases import RoundPhase
from protocol.problems import CONTENT_TYPE, ProblemDocument
from protocol.signing import Signed, Signer, sign
from protocol.transport_signing import sign_request
from protocol.wire import b64u_encode, domain_hash, parse, sha256

URL = "http://127.0.0.1:1"
N_AGENTS = 6
HANGS_AFTER_S = 30
KINDS = [Masking.OFF, Masking.CELLS]
MODES = ["positive", "negative"]
"""Whether a request is as the document says, or not."""
FEW, MANY = 12, 300
"""Requests of each operation from the document."""
FEW_MUTATIONS, MANY_MUTATIONS = 60, 2000
"""Mutated messages at each stage of a round."""


class FakeClock:
    """A clock that only the test moves."""

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


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        pytest.fail(f"no answer within {HANGS_AFTER_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class World:
    """A federation in its folder, its application, and six enrolled agents."""

    root: Path
    masking: Masking
    clock: FakeClock = field(default_factory=FakeClock)

    def __post_init__(self) -> None:
        base = make_base()
        options = RecipeOptions(
            name="Fuzz",
            open_enrolment=True,
            n_rounds=3,
            cohort_target=N_AGENTS,
            min_cohort=5,
            masking=self.masking,
            rank=2,
            target_modules=("q_proj",),
        )
        config = make_config(options, base)
        found_federation(self.root, config=config, base=base, clock=self.clock)
        self.federation: Federation = open_federation(
            self.root, clock=self.clock, environment={}, may_edit=True
        )
        self.clock.time += 2
        self.app = create_app(self.federation)
        self.client = TestClient(
            self.app, base_url=URL, follow_redirects=False, raise_server_exceptions=False
        )
        self.members = [Member(self) for _ in range(N_AGENTS)]
        self.federation.advance()
        for member in self.members:
            member.poll()

    @property
    def prefix(self) -> str:
        return f"/v1/federations/{self.federation.charter.path_id}"

    @property
    def phase(self) -> RoundPhase:
        return self.federation.status().round.phase

    def send(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        signer: Signer | None = None,
        headers: dict[str, str] | None = None,
    ) -> requests.Response:
        """One request; judged by `judge`."""
        found = dict(headers or {})
        if signer is not None:
            with contextlib.suppress(Exception):  # a target that cannot be signed goes unsigned
                found |= sign_request(
                    signer,
                    method=method,
                    url=URL + target,
                    body=body,
                    created=int(self.clock.now()),
                    nonce=secrets.token_bytes(NONCE_BYTES),
                )
        return ask(self.client, method, target, body, found)


def ask(
    client: TestClient, method: str, target: str, body: bytes, headers: dict[str, str]
) -> requests.Response:
    """One request; judged."""
    encoded = {name: value.encode("latin-1", "replace") for name, value in headers.items()}
    if currently_in_test_context():
        note(f"{method} {target}\n{encoded}\n{body[:2000]!r}")
    with no_hang():
        response = client.request(method, target, content=body, headers=encoded)
    judge(method, response)
    return response


def judge(method: str, response: Any) -> None:
    """Done, or a refusal that an agent can act on."""
    if response.status_code in {200, 206, 304}:
        return
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:500])
    assert response.headers["content-type"] == CONTENT_TYPE, response.text[:500]
    if method == "HEAD":
        return
    document = parse(ProblemDocument, response.content)
    assert document.status == response.status_code
    assert document.problem_type is not None
    assert document.problem_type.advice is document.advice


class Wire(BaseAdapter):
    """Carries an agent's requests to the application."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def send(self, request: requests.PreparedRequest, **_: object) -> requests.Response:
        body = request.body or b""
        answer = self._world.client.request(
            request.method or "",
            request.url or "",
            content=body.encode() if isinstance(body, str) else body,
            headers=dict(request.headers),
        )
        response = requests.Response()
        response.status_code = answer.status_code
        response.headers.update(answer.headers)
        response.raw = HTTPResponse(
            body=io.BytesIO(answer.content), status=answer.status_code, preload_content=False
        )
        return response

    def close(self) -> None:
        """Nothing is open."""


class Member:
    """An enrolled agent that can make each message of its round, sent or not."""

    def __init__(self, world: World) -> None:
        self.world, self.signer = world, Signer.generate()
        manifest = world.federation.charter.manifest
        self.transport = Transport(URL, clock=world.clock, signer=self.signer, patience_s=0.0)
        self.transport._session.mount("http://", Wire(world))
        self.transport.use_federation(manifest)
        enrolment = Enrolment(
            federation=manifest.federation,
            federation_digest=manifest.digest(),
            agent=self.signer.identity,
            invite=None,
        )
        self.enrolment = sign(self.signer, "enrolment", enrolment).signed
        self.credential: Signed[Credential] = self.transport.enrol(self.enrolment)
        self.round: RoundManifest | None = None
        self.secagg: SecAggAgent | None = None
        self.body = b""

    def poll(self) -> None:
        task = self.transport.task(after=0, wait_s=0.0).task
        assert isinstance(task, TrainTask), task
        self.round = task.round.body
        masked = self.world.federation.charter.masked
        if masked is not None:
            manifest = self.world.federation.charter.manifest
            policy = CellPolicy(
                federation=manifest.federation,
                round=self.round.round,
                round_digest=self.round.digest(),
                server=manifest.server,
                registrar=manifest.registrar,
                masking=masked.masking,
                body_n_bytes=masked.turns.plan_at(0).n_bytes,
                min_members=masked.masking.min_cell,
            )
            self.secagg = SecAggAgent.begin(
                self.signer,
                policy,
                credential=self.credential,
                attempt=1,
                expires_at=int(self.round.cap_at),
            )

    def revocation(self) -> Signed[Revocation]:
        federation = self.world.federation.charter.manifest.federation
        body = Revocation(federation=federation, agent=self.signer.identity)
        return sign(self.signer, "revocation", body).signed

    def withdrawal(self) -> Signed[Withdrawal]:
        body = Withdrawal(
            federation=self.world.federation.charter.manifest.federation,
            round=self.round.round,
            agent=self.signer.identity,
            reason=WithdrawalReason.OWNER_STOPPED,
        )
        return sign(self.signer, "withdrawal", body).signed

    def plain_head(self) -> Signed[UploadHeader]:
        charter = self.world.federation.charter
        self.body = bytes(charter.update_n_bytes)
        header = UploadHeader(
            federation=charter.manifest.federation,
            round=self.round.round,
            attempt=1,
            agent=self.signer.identity,
            round_digest=self.round.digest(),
            layout=charter.manifest.layout,
            weight=1,
            body_sha256=sha256(self.body),
            body_n_bytes=len(self.body),
        )
        return sign(self.signer, "upload", header).signed

    # The messages of a masked round; `make_*` sends nothing but the question before it

    def _news(self, kind: type[Any]) -> Any:
        answer = self.transport.cell_news(
            round_number=1, attempt=1, phase=self.secagg.state.phase, wait_s=0.0
        )
        assert isinstance(answer.news, kind), answer
        return answer.news

    def make_ready(self) -> Any:
        return self.secagg.state.ready

    def make_shares(self) -> Any:
        news = self._news(RosterNews)
        return self.secagg.receive_roster(news.ready_list, news.roster)

    def make_upload(self) -> Any:
        plan = self.world.federation.charter.turns.plan_at(0)
        masks = self.secagg.receive_bundle(self._news(BundleNews).bundle)
        vector = (self._values(plan.layout.n_values) * plan.clip_norm / 10).astype("f4")
        payload = encode(vector, weight=1, plan=plan, stream=SecureStream())
        words = with_checks(payload, masks.checks, plan, 0, plan.n_words)
        MaskAdder(masks.masks, word_bits=plan.word_bits).add(words)
        self.body = words.tobytes()
        return self.secagg.sign_upload(sha256(self.body))

    @staticmethod
    def _values(n: int) -> Any:
        import numpy as np

        return np.random.default_rng(n).uniform(-0.1, 0.1, n)

    def make_complaint(self) -> Any:
        """False, but well formed."""
        header = next(
            found for found in self.secagg.state.headers if found.body.agent != self.signer.identity
        )
        body = Complaint(
            transcript=self.secagg.transcript,
            agent=self.signer.identity,
            dealer=header,
            ciphertext=bytes(82),
        )
        return sign(self.signer, "complaint", body).signed

    def make_confirm(self) -> Any:
        return self.secagg.receive_survivors(self._news(SurvivorsNews).survivors)

    def make_reveal(self) -> Any:
        return self.secagg.receive_confirmed(self._news(ConfirmedNews).confirmed)

    def play(self, stage: str) -> None:
        """Make and send the message of a stage."""
        if stage == "ready":
            self.transport.ready(self.make_ready())
        elif stage == "shares":
            self.transport.shares(self.make_shares(), round_number=1)
        elif stage == "uploads":
            head = self.make_upload()
            self.transport.begin_masked_upload(head, round_number=1)
            upload = Upload(round=1, attempt=1, head=head.body)
            self.transport.put_part(upload, 0, self.body)
            self.transport.complete(upload)
            self.secagg.uploaded()
        elif stage == "confirm":
            self.transport.confirm(self.make_confirm(), round_number=1)
        else:
            self.transport.reveal(self.make_reveal(), round_number=1)


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    for module in (app_module, cells_module):
        monkeypatch.setattr(module, "LONG_POLL_S", 0.0)
    worlds: list[World] = []

    def make(masking: Masking) -> World:
        worlds.append(World(tmp_path / f"federation-{len(worlds)}", masking))
        return worlds[-1]

    yield make
    for world in worlds:
        world.federation.close()


def fuzzing(n_examples: int) -> Any:
    return settings(
        max_examples=n_examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# From the OpenAPI document


def fuzz_operations(
    app: FastAPI,
    mode: str,
    n_examples: int,
    send: Callable[..., object],
    steer: Callable[[Any, st.DataObject], None],
) -> int:
    """Requests of every operation of an application's own document; how many were sent."""
    schema = schemathesis.openapi.from_dict(app.openapi())
    n_sent = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @fuzzing(n_examples)
        @given(
            case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)),
            data=st.data(),
        )
        def try_it(case: Any, data: st.DataObject) -> None:
            nonlocal n_sent
            steer(case, data)
            with contextlib.suppress(requests.RequestException, ValueError):
                prepared = requests.Request(**case.as_transport_kwargs(base_url=URL)).prepare()
                body = prepared.body or b""
                send(
                    data,
                    prepared.method or "",
                    (prepared.url or "").removeprefix(URL),
                    body.encode() if isinstance(body, str) else body,
                    dict(prepared.headers),
                )
                n_sent += 1

        with contextlib.suppress(Unsatisfiable):  # nothing about it can be made wrong
            try_it()
    return n_sent


def fuzz_world(world: World, mode: str, n_examples: int) -> int:
    """Requests to a federation, with and without signatures."""

    def send(
        data: st.DataObject, method: str, target: str, body: bytes, headers: dict[str, str]
    ) -> None:
        signer = data.draw(st.sampled_from([world.members[0].signer] * 3 + [None]))
        world.send(method, target, body, signer=signer, headers=headers)

    return fuzz_operations(world.app, mode, n_examples, send, partial(steer, world))


def steer(world: World, case: Any, data: st.DataObject) -> None:
    """Mostly to things that exist, or might: a request for another federation ends at the door."""
    parameters = case.path_parameters or {}
    cells = world.federation._store.cells.of_round(1)
    real: dict[str, list[Any]] = {
        "federation": [world.federation.charter.path_id] * 9,
        "round_number": [1, 1, 1, 2],
        "attempt": [1, 1, 1, 2],
        "n": [0, 0, 1],
        "name": [world.federation.releases.get(0).adapter.sha256.hex(), "0" * 64, "0" * 63],
        "transcript": [
            *(b64u_encode(cell.transcript) for cell in cells),
            *("A" * 43, "A" * 42, "A" * 42 + "B", "+" * 43),
        ],
    }
    for name in parameters:
        if name in real and data.draw(st.sampled_from([True] * 9 + [False])):
            parameters[name] = data.draw(st.sampled_from(real[name]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masking", KINDS, ids=lambda masking: masking.value)
def test_no_request_that_the_document_allows_or_forbids_is_a_fault(
    make_world: Callable[..., World], masking: Masking, mode: str
) -> None:
    world = prepared(make_world(masking))
    assert fuzz_world(world, mode, FEW) > 10 * FEW
    still_works(world)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masking", KINDS, ids=lambda masking: masking.value)
def test_no_request_of_many_more_is_a_fault(
    make_world: Callable[..., World], masking: Masking, mode: str
) -> None:
    world = prepared(make_world(masking))
    fuzz_world(world, mode, MANY)
    still_works(world)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_no_request_is_a_fault_of_the_helper(tmp_path: Path, n_examples: int, mode: str) -> None:
    found_helper(tmp_path / "helper")
    service = HelperService(tmp_path / "helper")
    app = create_helper_app(service)
    client = TestClient(app, base_url=URL, follow_redirects=False, raise_server_exceptions=False)

    def send(
        _: st.DataObject, method: str, target: str, body: bytes, headers: dict[str, str]
    ) -> None:
        ask(client, method, target, body, headers)

    def steer(case: Any, data: st.DataObject) -> None:
        if "name" in (case.path_parameters or {}) and data.draw(st.booleans()):
            case.path_parameters["name"] = data.draw(st.sampled_from(["0" * 64, "..", "0" * 63]))

    assert fuzz_operations(app, mode, n_examples, send, steer)
    assert parse(HelperDescription, client.get("/v1/helper").content) == service.description
    service.close()


def prepared(world: World) -> World:
    """With an upload begun, or a cell at work, so that there is something to be found."""
    first, *rest = world.members
    if world.masking is Masking.OFF:
        world.members[1].transport.begin_upload(world.members[1].plain_head())
        return world
    for stage in ("ready", "shares"):
        for member in world.members:
            member.play(stage)
        world.federation.advance()
    rest[0].play("uploads")
    first.make_upload()
    return world


def still_works(world: World) -> None:
    world.federation.advance()
    status = world.federation.status()
    assert status.round.failure is None, status.round.failure
    assert world.client.get("/healthz").text == "ok\n"
    assert world.client.get("/v1/federation").status_code == 200


# Mutations of real messages


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=90)
    | st.binary(max_size=90).map(lambda raw: base64.urlsafe_b64encode(raw).rstrip(b"=").decode())
    | st.sampled_from(["A" * 43, "A" * 86, "\ud800", "\x00", "é" * 40, 2**53, 10**10, -1, 0.5]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=6,
)


def places_of(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be changed."""
    if path:
        yield path
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield from places_of(node[key], (*path, key))


def value_at(message: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        message = message[key]
    return message


def mutate(message: Any, data: st.DataObject) -> None:
    """One mutation, in place."""
    places = list(places_of(message))
    if not places:
        return
    path = data.draw(st.sampled_from(places))
    parent, last = value_at(message, path[:-1]), path[-1]
    how = data.draw(st.sampled_from(["junk", "swap", "drop", "more", "bit"]))
    if how == "swap":
        parent[last] = copy.deepcopy(value_at(message, data.draw(st.sampled_from(places))))
    elif how == "drop":
        del parent[last]
    elif how == "more" and isinstance(parent, list):
        parent.insert(last, copy.deepcopy(parent[last]))
    elif how == "more":
        parent[data.draw(st.text(max_size=9))] = data.draw(JUNK)
    elif how == "bit" and isinstance(parent[last], str) and parent[last]:
        text = parent[last]
        at = data.draw(st.integers(0, len(text) - 1))
        parent[last] = text[:at] + ("B" if text[at] == "A" else "A") + text[at + 1 :]
    else:
        parent[last] = data.draw(JUNK)


def changed(message: Any, data: st.DataObject) -> Any:
    """A message with one to three mutations."""
    found = copy.deepcopy(message)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(found, data)
    return found


def signed_again(message: Any, name: str, signer: Signer) -> Any:
    """The message with a signature that holds for what it says now, wherever that can be made."""
    where = message.get("header", message) if isinstance(message, dict) else message
    if isinstance(where, dict) and isinstance(where.get("body"), dict):
        with contextlib.suppress(EncodingError, RecursionError):
            signature = signer.sign_bytes(domain_hash(name, where["body"]))
            where |= {"key": b64u_encode(signer.identity), "signature": b64u_encode(signature)}
    return message


def mutate_and_send(
    world: World, target: str, message: Any, name: str, *, n_examples: int
) -> set[int]:
    """Mutations of a message by member 0, each under a transport signature that holds."""
    attacker = world.members[0].signer
    original = json.loads(message.canonical())
    statuses: set[int] = set()

    @fuzzing(n_examples)
    @given(data=st.data())
    def send(data: st.DataObject) -> None:
        found = changed(original, data)
        if data.draw(st.booleans()):
            found = signed_again(found, name, attacker)
        raw = json.dumps(found).encode()
        if not data.draw(st.integers(0, 9)):
            at = data.draw(st.integers(0, len(raw)))
            raw = raw[:at] + data.draw(st.binary(max_size=8)) + raw[at + 3 :]
        statuses.add(world.send("POST", target, raw, signer=attacker).status_code)

    send()
    return statuses


OPEN_MESSAGES = ["enrolment", "upload", "withdrawal", "revocation"]


def fuzz_open_message(world: World, name: str, n_examples: int) -> None:
    first, *rest = world.members
    message, target = {
        "enrolment": (first.enrolment, "/enrolments"),
        "upload": (first.plain_head(), "/uploads"),
        "withdrawal": (first.withdrawal(), "/withdrawals"),
        "revocation": (first.revocation(), "/enrolments/revoke"),
    }[name]
    statuses = mutate_and_send(world, world.prefix + target, message, name, n_examples=n_examples)
    assert statuses - {200}, "nothing was refused"
    still_works(world)
    for member in rest:
        head = member.plain_head()
        member.transport.begin_upload(head)
        upload = Upload(round=1, attempt=1, head=head.body)
        member.transport.put_part(upload, 0, member.body)
        member.transport.complete(upload)
    world.clock.time += world.federation.charter.manifest.rounds.cap_s
    world.federation.advance()
    assert world.federation.releases.newest().aggregation.n_agents >= len(rest)


@pytest.mark.parametrize("name", OPEN_MESSAGES)
def test_no_mutation_of_a_message_stops_an_open_round(
    make_world: Callable[..., World], name: str
) -> None:
    fuzz_open_message(make_world(Masking.OFF), name, FEW_MUTATIONS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OPEN_MESSAGES)
def test_no_mutation_of_many_more_stops_an_open_round(
    make_world: Callable[..., World], name: str
) -> None:
    fuzz_open_message(make_world(Masking.OFF), name, MANY_MUTATIONS)


STAGES = ["ready", "shares", "uploads", "confirm", "reveal"]
MASKED_MESSAGES = [*STAGES, "complaints"]


def fuzz_masked_message(world: World, what: str, n_examples: int) -> None:
    """Mutations of member 0's message at its stage; the others' round goes on to its sum."""
    first, *rest = world.members
    stage = "uploads" if what == "complaints" else what
    for done in STAGES[: STAGES.index(stage)]:
        for member in world.members:
            member.play(done)
        world.federation.advance()
    if what == "complaints":
        first.make_upload()
    makers: dict[str, tuple[Callable[[], Any], str]] = {
        "ready": (first.make_ready, "ready"),
        "shares": (first.make_shares, "shares"),
        "uploads": (first.make_upload, "masked-upload"),
        "complaints": (first.make_complaint, "complaint"),
        "confirm": (first.make_confirm, "confirm"),
        "reveal": (first.make_reveal, "reveal"),
    }
    make, name = makers[what]
    message = make()
    if what == "ready":
        target = f"{world.prefix}/readies"
    else:
        target = f"{world.prefix}/cells/{b64u_encode(first.secagg.transcript)}/{what}"
    statuses = mutate_and_send(world, target, message, name, n_examples=n_examples)
    assert statuses - {200}, "nothing was refused"
    still_works(world)
    for left in STAGES[STAGES.index(stage) :]:
        for member in rest:
            member.play(left)
        if left == "ready" and world.phase is RoundPhase.OPEN:
            world.clock.time = first.round.deadline_at
            for member in rest:  # present again
                member.transport.task(after=0, wait_s=0.0)
        else:
            world.clock.time += world.federation.charter.masked.masking.stage_s
        world.federation.advance()
    release = world.federation.releases.newest()
    assert release.number == 1, world.federation.status().round.failure
    assert release.aggregation.n_agents >= len(rest)


@pytest.mark.parametrize("what", MASKED_MESSAGES)
def test_no_mutation_of_a_members_message_stops_the_others_round(
    make_world: Callable[..., World], what: str
) -> None:
    fuzz_masked_message(make_world(Masking.CELLS), what, FEW_MUTATIONS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", MASKED_MESSAGES)
def test_no_mutation_of_many_more_stops_the_others_round(
    make_world: Callable[..., World], what: str
) -> None:
    fuzz_masked_message(make_world(Masking.CELLS), what, MANY_MUTATIONS)


# What no document speaks of


LATIN = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))


def fuzz_headers(world: World, n_examples: int) -> None:
    member = world.members[0]
    target = f"{world.prefix}/task"
    names = ["signature", "signature-input", "content-digest", "content-length", "range"]

    @fuzzing(n_examples)
    @given(data=st.data())
    def send(data: st.DataObject) -> None:
        headers = sign_request(
            member.signer,
            method="GET",
            url=URL + target,
            body=b"",
            created=int(world.clock.now()),
            nonce=secrets.token_bytes(NONCE_BYTES),
        )
        known = {name.lower(): value for name, value in headers.items()}
        for name in data.draw(st.sets(st.sampled_from(names), min_size=1)):
            value = known.get(name, "")
            at = data.draw(st.integers(0, len(value)))
            known[name] = value[:at] + data.draw(LATIN) + value[at + data.draw(st.integers(0, 9)) :]
        for name in data.draw(st.sets(st.sampled_from(["signature", "signature-input"]))):
            if data.draw(st.booleans()):
                known.pop(name, None)
        world.send("GET", target, headers=known)

    send()


@pytest.mark.parametrize("n_examples", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_header_is_a_fault(make_world: Callable[..., World], n_examples: int) -> None:
    world = make_world(Masking.CELLS)
    fuzz_headers(world, n_examples)
    still_works(world)


@pytest.mark.parametrize("masking", KINDS, ids=lambda masking: masking.value)
def test_every_method_on_every_path_is_answered(
    make_world: Callable[..., World], masking: Masking
) -> None:
    world = make_world(masking)
    schema = world.app.openapi()
    values = {
        "federation": world.federation.charter.path_id,
        "round_number": "1",
        "attempt": "1",
        "n": "0",
        "name": "0" * 64,
        "transcript": "A" * 43,
    }
    for path in [*schema["paths"], "/", "/v1", "/nothing", "/v1/federations/{federation}/nothing"]:
        target = path.format_map(values)
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
            for signer in (None, world.members[0].signer):
                world.send(method, target, signer=signer)
    still_works(world)


@pytest.mark.parametrize(
    "tail", ["/", "//", "/..", "/%2e%2e", "/%00", "/%ff", "?", "?wait=", "?wait=nan", "?after=1e3"]
)
def test_no_strange_target_is_a_fault(make_world: Callable[..., World], tail: str) -> None:
    world = make_world(Masking.CELLS)
    for path in ("/task", "/cells/1/1", "/releases", "/blobs/" + "0" * 64, "/uploads/1/1"):
        for signer in (None, world.members[0].signer):
            world.send("GET", world.prefix + path + tail, signer=signer)


@pytest.mark.parametrize("depth", [100, 20_000])
def test_deeply_nested_json_is_refused(make_world: Callable[..., World], depth: int) -> None:
    world = make_world(Masking.CELLS)
    body = b"[" * depth + b"]" * depth
    for target in ("/readies", "/enrolments", "/cells/" + "A" * 43 + "/shares"):
        response = world.send("POST", world.prefix + target, body, signer=world.members[0].signer)
        assert response.status_code == 400
