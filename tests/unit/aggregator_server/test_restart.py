"""The real process, killed with SIGKILL in the middle of an upload."""

import datetime
import ipaddress
import json
import os
import secrets
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from aggregator_server.federation import open_federation
from aggregator_server.lock import served_at
from protocol.chain import Release
from protocol.limits import NONCE_BYTES, PART_BYTES
from protocol.messages import (
    Discovery,
    Enrolment,
    ReleasePage,
    TaskReply,
    UploadHeader,
    UploadState,
    UploadStatus,
)
from protocol.problems import ProblemDocument, ProblemType
from protocol.signing import Signed, Signer, sign, verify
from protocol.transport_signing import sign_request
from protocol.wire import b64u_encode, parse, sha256

MAIN = "from aggregator_server.cli import main; main()"
READY_S = 5.0


@dataclass
class ServerProcess:
    """`sheepfold-server serve` on a free port."""

    directory: Path
    process: subprocess.Popen[bytes]
    url: str
    ready_after_s: float

    @classmethod
    def start(cls, directory: Path, *flags: str, main: str = MAIN) -> "ServerProcess":
        ready = directory.parent / f"ready-{secrets.token_hex(4)}.json"
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", main, "serve", str(directory), "--port", "0",
             "--json", str(ready), *flags],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        assert line.startswith("ready http"), line
        listening = json.loads(ready.read_text())
        return cls(directory, process, listening["url"], time.monotonic() - started)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=30)
        return self.process.returncode


@dataclass
class Volunteer:
    """An agent over real HTTP, which signs anew when the server's clock says so."""

    server: ServerProcess
    signer: Signer
    discovery: Discovery

    def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        federation = self.discovery.federation.body.federation
        url = f"{self.server.url}/v1/federations/{b64u_encode(federation)}{path}"
        for _ in range(40):
            headers = sign_request(
                self.signer,
                method=method,
                url=url,
                body=body,
                created=int(time.time()),
                nonce=secrets.token_bytes(NONCE_BYTES),
            )
            response = httpx2.request(method, url, content=body, headers=headers, timeout=30)
            if response.status_code == 200:
                return response.content
            problem = parse(ProblemDocument, response.content)
            assert problem.problem_type is ProblemType.STALE, problem
            time.sleep(0.25)
        pytest.fail("the server never took the request's time")

    def enrol(self) -> None:
        manifest = self.discovery.federation.body
        body = Enrolment(
            federation=manifest.federation,
            federation_digest=manifest.digest(),
            agent=self.signer.identity,
            invite=None,
        )
        self.call("POST", "/enrolments", sign(self.signer, "enrolment", body).signed.canonical())

    def header(self, data: bytes) -> UploadHeader:
        task = parse(TaskReply, self.call("GET", "/task?wait=15")).task
        assert task.kind == "train"
        manifest = task.round.body
        return UploadHeader(
            federation=manifest.federation,
            round=manifest.round,
            attempt=1,
            agent=self.signer.identity,
            round_digest=manifest.digest(),
            layout=self.discovery.federation.body.layout,
            weight=1,
            body_sha256=sha256(data),
            body_n_bytes=len(data),
        )

    def begin(self, header: UploadHeader) -> UploadStatus:
        data = sign(self.signer, "upload", header).signed.canonical()
        return parse(UploadStatus, self.call("POST", "/uploads", data))

    def put(self, header: UploadHeader, n: int, data: bytes) -> UploadStatus:
        part = data[n * PART_BYTES : (n + 1) * PART_BYTES]
        path = f"/uploads/{header.round}/{header.attempt}/parts/{n}"
        return parse(UploadStatus, self.call("PUT", path, part))

    def complete(self, header: UploadHeader) -> UploadStatus:
        path = f"/uploads/{header.round}/{header.attempt}/complete"
        return parse(UploadStatus, self.call("POST", path))


@pytest.fixture
def founded(make_case, make_base_of) -> Path:
    """A federation on disk whose updates have three parts; nobody serves it yet."""
    case = make_case(
        base=make_base_of(size=20_000), rank=16, cohort_target=2, min_cohort=2, n_rounds=1
    )
    case.federation.close()
    return case.directory


@pytest.fixture
def serve(founded) -> Iterator[list[ServerProcess]]:
    running: list[ServerProcess] = []
    yield running
    for server in running:
        server.kill()


def make_volunteer(server: ServerProcess) -> Volunteer:
    discovery = parse(Discovery, httpx2.get(f"{server.url}/v1/federation").content)
    verify(discovery.federation, "federation", key=discovery.federation.body.server)
    return Volunteer(server, Signer.generate(), discovery)


def newest_release(server: ServerProcess, volunteer: Volunteer) -> Signed[Release] | None:
    federation = b64u_encode(volunteer.discovery.federation.body.federation)
    url = f"{server.url}/v1/federations/{federation}/releases?after=0"
    releases = parse(ReleasePage, httpx2.get(url).content).releases
    return releases[0] if releases else None


def test_a_server_killed_in_the_middle_of_an_upload_finishes_the_same_round(founded, serve):
    server = ServerProcess.start(founded)
    serve.append(server)
    assert server.ready_after_s < READY_S
    volunteers = [make_volunteer(server) for _ in range(2)]
    for volunteer in volunteers:
        volunteer.enrol()
    n_values = open_layout_n_values(founded)
    bodies = [np.full(n_values, value, "<f4").tobytes() for value in (1.0, 3.0)]
    first, second = volunteers
    headers = [volunteer.header(data) for volunteer, data in zip(volunteers, bodies, strict=True)]
    first.begin(headers[0])
    for n in range(3):
        first.put(headers[0], n, bodies[0])
    assert first.complete(headers[0]).state is UploadState.ACCEPTED
    second.begin(headers[1])
    assert second.put(headers[1], 1, bodies[1]).missing == (0, 2)

    server.kill()
    server = ServerProcess.start(founded)
    serve.append(server)
    for volunteer in volunteers:
        volunteer.server = server

    # The part that was acknowledged is still there, and so is the accepted upload.
    assert second.begin(headers[1]).missing == (0, 2)
    assert first.complete(headers[0]).state is UploadState.ACCEPTED
    for n in (0, 2):
        second.put(headers[1], n, bodies[1])
    assert second.complete(headers[1]).state is UploadState.ACCEPTED
    deadline = time.monotonic() + 30
    while (published := newest_release(server, second)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert published.body.round == headers[0].round
    assert published.body.aggregation.n_agents == 2
    assert server.stop() == 0

    federation = open_federation(founded, environment={})
    releases = federation.releases
    moved = releases.vector(releases.get(1)) - releases.vector(releases.get(0))
    federation.close()
    np.testing.assert_allclose(moved, 2.0, rtol=1e-5)


def test_a_server_that_is_asked_to_stop_answers_its_long_polls_and_exits_0(founded, serve):
    import threading

    server = ServerProcess.start(founded)
    serve.append(server)
    volunteer = make_volunteer(server)
    volunteer.enrol()
    answers = []
    poll = threading.Thread(target=lambda: answers.append(volunteer.call("GET", "/task?wait=20")))
    poll.start()
    time.sleep(1.5)
    started = time.monotonic()
    assert server.stop() == 0
    poll.join(20)
    assert time.monotonic() - started < 8
    assert parse(TaskReply, answers[0]).task.kind == "wait"


def test_a_server_tells_where_it_listens_for_as_long_as_it_runs(founded, serve):
    server = ServerProcess.start(founded)
    serve.append(server)
    assert served_at(founded) == server.url
    server.kill()
    assert served_at(founded) is None


def test_a_server_opens_as_many_connections_as_the_system_allows(founded, serve):
    lowered = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (256, 2000)); " + MAIN
    server = ServerProcess.start(founded, main=lowered)
    serve.append(server)
    limits = Path(f"/proc/{server.process.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    assert line.split()[3:5] == ["2000", "2000"]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


def test_tls_is_served_with_the_operators_certificate(founded, serve, tmp_path):
    certificate, key = make_certificate(tmp_path)
    server = ServerProcess.start(founded, "--tls-cert", str(certificate), "--tls-key", str(key))
    serve.append(server)
    assert server.url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cafile=str(certificate))
    assert httpx2.get(f"{server.url}/healthz", verify=context).text == "ok\n"


def open_layout_n_values(directory: Path) -> int:
    federation = open_federation(directory, environment=dict(os.environ))
    n_values = federation.charter.layout.n_values
    federation.close()
    return n_values
