"""What an onlooker sees of a masked round: real agents behind a proxy that writes sizes down.

Within a cell every agent's requests of one type have one size, whatever its data. (PROTOCOL, claim
of equal sizes: nothing that depends on the data leaves in clear, lengths included.)
"""

import http.client
import importlib.util
import json
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from edge_agent import masked as masked_module
from protocol.phases import RoundPhase
from protocol.wire import b64u_encode
from simulations.processes import Process, command_of, run_command, start_server

N_AGENTS = 5
WITHIN_S = 200.0
KEY_ID = re.compile(r'keyid="([^"]+)"')
ONCE = {"readies", "shares", "uploads", "parts", "complete", "confirm", "reveal"}
"""The requests of a masked round that every agent of a cell makes once."""


@dataclass(frozen=True)
class Seen:
    """A request as the network sees it; `n_bytes` is its line, headers and body."""

    agent: str
    what: str
    n_bytes: int
    body: bytes


@dataclass
class Onlooker:
    """A forwarding proxy on loopback and what it has seen."""

    port: int
    seen: list[Seen]


def type_of(method: str, target: str) -> str:
    """A request without what names a round, a cell, a part or a phase."""
    words = [word for word in urlsplit(target).path.split("/") if word.isalpha()]
    return " ".join((method, words[-1] if words else ""))


@pytest.fixture
def onlooker() -> Iterator[Onlooker]:
    seen: list[Seen] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            target = urlsplit(self.path)
            path = target.path + (f"?{target.query}" if target.query else "")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            signature = KEY_ID.search(self.headers.get("Signature-Input", ""))
            if signature is not None:
                n_bytes = len(self.requestline) + len(bytes(self.headers)) + len(body)
                seen.append(Seen(signature[1], type_of(self.command, self.path), n_bytes, body))
            connection = http.client.HTTPConnection(str(target.hostname), target.port or 80)
            try:
                connection.request(self.command, path, body or None, dict(self.headers.items()))
                answer = connection.getresponse()
                data = answer.read()
            except OSError:
                self.close_connection = True
                return
            finally:
                connection.close()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                    self.send_header(name, value)
            if answer.status not in {204, 304}:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _forward  # noqa: N815 - names of http.server

        def log_message(self, *_: object) -> None:
            """Nothing: the list is the log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Onlooker(server.server_address[1], seen)
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_requests_of_a_cell_have_equal_sizes(
    tmp_path: Path, onlooker: Onlooker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import protocol

    monkeypatch.setenv("PYTHONPATH", str(Path(protocol.__file__).parents[1]))
    folder = tmp_path / "server"
    run_command(
        "aggregator_server.cli",
        *("init", str(folder), "--embedded", "--open-enrolment", "--rounds", "1"),
        *("--cohort", str(N_AGENTS), "--min-cohort", str(N_AGENTS), "--local-steps", "2"),
        *("--batch-size", "4", "--learning-rate", "0.005", "--masking", "cells"),
        *("--ready-delay-s", "0"),
    )
    server, url = start_server(folder, tmp_path / "server.log")
    processes = [server]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{onlooker.port}")
    monkeypatch.setenv("no_proxy", "")
    try:
        agents = []
        for number in range(N_AGENTS):
            data = tmp_path / f"data-{number}.jsonl"
            # From 3 to 1,203 records: numbers of one to four digits, texts of many lengths.
            rows = [
                {"instruction": f"Name {k}.", "input": "", "output": "thing " * (number + 1)}
                for k in range(3 + 300 * number)
            ]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            command = command_of(
                "edge_agent.cli",
                *("join", url, "--data", str(data), "--home", str(tmp_path / f"home-{number}")),
                *("--yes", "--until-finished", "--threads", "1", "--device", "cpu"),
            )
            agents.append(Process.start(f"agent {number}", command, tmp_path / f"{number}.log"))
        processes += agents
        until = time.monotonic() + WITHIN_S
        while True in [agent.check() for agent in agents]:
            assert time.monotonic() < until, server.tail()
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()

    sizes: dict[str, Counter[int]] = defaultdict(Counter)
    agents_of: dict[str, set[str]] = defaultdict(set)
    for request in onlooker.seen:
        if request.what.split()[-1] in ONCE:
            sizes[request.what][request.n_bytes] += 1
            agents_of[request.what].add(request.agent)
    assert {what.split()[-1] for what in sizes} == ONCE, sizes
    for what, found in sizes.items():
        assert len(agents_of[what]) == N_AGENTS, (what, found)
        assert len(found) == 1, f"requests of one type differ in size: {what}: {dict(found)}"
    vectors = [seen.body for seen in onlooker.seen if seen.what == "PUT parts"]
    assert len(set(vectors)) == len(vectors), "two agents sent one vector"


# The same in one process, where what the agents keep to themselves is known


def _faults() -> Any:
    # By its path: there is no tests package.
    path = Path(__file__).with_name("test_faults.py")
    spec = importlib.util.spec_from_file_location("sequences_of_faults", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


faults = _faults()
N_EXAMPLES = [3, 37, 113, 241, 97, 1058, 20_011]
"""Of each agent; the weights follow from it, up to the cap."""


@dataclass(frozen=True)
class Sent:
    """A request of a member of the cell."""

    agent: str
    what: str
    n_bytes: int
    target: str
    body: bytes


@dataclass(frozen=True)
class Overheard:
    """All requests of a masked round's members, and what nobody may learn from them."""

    members: frozenset[str]
    sent: tuple[Sent, ...]
    encoded: tuple[bytes, ...]
    """The updates as words, before they were masked."""
    figures: frozenset[float]
    """Counts, weights and losses."""

    def by_type(self) -> dict[str, list[Sent]]:
        found: dict[str, list[Sent]] = defaultdict(list)
        for request in self.sent:
            found[request.what].append(request)
        return found


@pytest.fixture(scope="module")
def overheard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overheard]:
    """A round of agents whose data, weights, losses and training times differ."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for make_world in faults.making_worlds(tmp_path_factory.mktemp("round"), monkeypatch):
            yield overhear(make_world, monkeypatch)


def overhear(make_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Overheard:
    encoded: list[bytes] = []
    real = masked_module.encode

    def encode(*args: Any, **options: Any) -> Any:
        words = real(*args, **options)
        encoded.append(words.tobytes())
        return words

    monkeypatch.setattr(masked_module, "encode", encode)
    monkeypatch.setattr(faults, "uniform", lambda config: config)  # weights by examples
    world = make_world(3, masked=True, n_rounds=1)
    world.fault_chance = world.kill_chance = 0.0
    for agent, n_examples in zip(world.agents, N_EXAMPLES, strict=True):
        agent.agent._data = faults.FakeData(tuple(range(n_examples)))
    world.settle()
    store = world.server.federation._store
    assert store.rounds.get(1).phase is RoundPhase.PUBLISHED
    (cell,) = store.cells.of_round(1)
    identities = {member.agent for member in store.cells.members(cell.transcript)}
    members = {
        b64u_encode(agent.home.load_or_create_signer().identity)
        for agent in world.agents
        if agent.home.load_or_create_signer().identity in identities
    }
    assert len(members) >= 5
    sent = []
    for method, url, headers, body in world.seen:
        found = KEY_ID.search(headers.get("Signature-Input", ""))
        if found is None or found[1] not in members or "/enrolments" in url:
            continue
        target = url.removeprefix(faults.URL)
        head = sum(len(name) + len(value) for name, value in headers.items())
        phase = "".join(parse_qs(urlsplit(target).query).get("phase", []))
        sent.append(
            Sent(
                agent=found[1],
                what=f"{type_of(method, target)} {phase}".strip(),
                n_bytes=len(method) + len(target) + head + len(body),
                target=target,
                body=body,
            )
        )
    cap = world.manifest.max_weight
    figures = {float(n) for n in N_EXAMPLES} | {float(min(n, cap)) for n in N_EXAMPLES}
    return Overheard(frozenset(members), tuple(sent), tuple(encoded), frozenset(figures))


def figures_in(node: Any) -> Iterator[tuple[str, float]]:
    """Every number of a message, with the name of its field."""
    if isinstance(node, dict):
        for name, value in node.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield name, float(value)
            else:
                yield from figures_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from figures_in(value)


def shape_of(node: Any) -> Any:
    """A message without what is random in it: texts by their length, numbers as they are."""
    if isinstance(node, dict):
        return {name: shape_of(value) for name, value in node.items()}
    if isinstance(node, list):
        return [shape_of(value) for value in node]
    return len(node) if isinstance(node, str) else node


def test_requests_of_one_type_have_one_size_whatever_data_weight_and_time(
    overheard: Overheard,
) -> None:
    polls = {"GET cells " + phase for phase in ("ready", "shared", "uploaded", "confirmed")}
    found = overheard.by_type()
    assert polls | {"POST readies", "POST shares", "POST uploads"} <= found.keys()
    assert {"PUT parts", "POST complete", "POST confirm", "POST reveal"} <= found.keys()
    for what, requests in found.items():
        senders = {request.agent for request in requests}
        # Enough members revealed before the last ones came to it.
        assert len(senders) >= 4 if what == "POST reveal" else senders == overheard.members
        assert len({request.n_bytes for request in requests}) == 1, what
        assert len({len(request.body) for request in requests}) == 1, what


def test_messages_of_one_type_differ_in_nothing_but_what_looks_random(
    overheard: Overheard,
) -> None:
    for what, requests in overheard.by_type().items():
        if what == "PUT parts":
            continue
        shapes = {
            json.dumps(shape_of(json.loads(request.body)), sort_keys=True)
            for request in requests
            if request.body
        }
        assert len(shapes) <= 1, what


def test_no_figure_of_the_data_leaves_in_clear(overheard: Overheard) -> None:
    forbidden = re.compile(r"weight|example|loss|count|step|time|duration|length", re.IGNORECASE)
    for request in overheard.sent:
        path = urlsplit(request.target)
        numbers = {float(word) for word in path.path.split("/") if word.isdecimal()}
        assert not numbers & overheard.figures, request.target
        if request.what == "PUT parts" or not request.body:
            continue
        for name, value in figures_in(json.loads(request.body)):
            assert value not in overheard.figures, (request.what, name)
            assert not forbidden.search(name), (request.what, name)


def test_no_unmasked_word_of_an_update_leaves(overheard: Overheard) -> None:
    assert len(overheard.encoded) >= 5
    for request in overheard.sent:
        for words in overheard.encoded:
            # The last ones are weight, count and flag; sixteen bytes are in noise by chance never.
            assert words[:16] not in request.body
            assert words[-16:] not in request.body


def test_a_masked_vector_looks_like_noise(overheard: Overheard) -> None:
    for request in overheard.by_type()["PUT parts"]:
        assert len(set(request.body)) > len(request.body) // 4, "bytes repeat too often"
