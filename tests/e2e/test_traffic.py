"""What an onlooker sees of a masked round: real agents behind a proxy that writes sizes down.

Within a cell every agent's requests of one type have one size, whatever its data. (PROTOCOL, claim
of equal sizes: nothing that depends on the data leaves in clear, lengths included.)
"""

import http.client
import json
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

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
