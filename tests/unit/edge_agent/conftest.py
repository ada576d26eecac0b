"""A clock moved by hand, and a server that does what a test's script says."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from protocol.problems import CONTENT_TYPE, ProblemType, problem_document

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
