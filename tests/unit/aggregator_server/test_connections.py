"""Peers that keep a connection waiting, byte by byte, are not waited for for ever."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from aggregator_server.web import connections

SHORT_S = 0.4
LONG_S = 5 * SHORT_S
HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def application(scope, receive, send) -> None:
    """`/slow` answers late, `/flood` with more than buffers hold, `/never` without its body."""
    if scope["path"] == "/slow":
        await asyncio.sleep(LONG_S)
    body = scope["path"].encode()
    start = {"type": "http.response.start", "status": 200}
    if scope["path"] == "/flood":
        await send(start)
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
        await send({"type": "http.response.body"})
    else:
        length = [(b"content-length", str(len(body)).encode())]
        await send({**start, "headers": length})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def address(monkeypatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connections, "_OWED_S", SHORT_S)
    monkeypatch.setattr(connections, "_STALLED_S", SHORT_S)
    config = uvicorn.Config(
        application, http=connections.Connection, ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield listening.getsockname()
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def peer(address) -> Iterator[socket.socket]:
    with socket.create_connection(address, timeout=10) as connection:
        yield connection


def answer(peer: socket.socket, path: str) -> None:
    data = b""
    while not data.endswith(b"\r\n\r\n" + path.encode()):
        received = peer.recv(4096)
        assert received, data
        data += received


def closed_within(peer: socket.socket, drip: bytes = b"") -> float:
    """Seconds until the server closes, while a byte goes out every now and then."""
    started = time.monotonic()
    peer.settimeout(0.05)
    for byte in (drip or bytes(1)) * 1000:
        with contextlib.suppress(TimeoutError):
            try:
                if drip:
                    peer.sendall(bytes([byte]))
                if not peer.recv(1):
                    return time.monotonic() - started
            except (ConnectionError, BrokenPipeError):
                return time.monotonic() - started
        if time.monotonic() > started + 10:
            break
    pytest.fail("the server still waits")


def test_a_connection_that_says_nothing_is_closed(peer):
    assert SHORT_S / 2 < closed_within(peer) < 8


def test_a_head_that_comes_byte_by_byte_is_closed(peer):
    assert SHORT_S / 2 < closed_within(peer, b"G") < 8


def test_a_second_head_that_comes_byte_by_byte_is_closed(peer):
    peer.sendall(HEAD)
    answer(peer, "/")
    assert SHORT_S / 2 < closed_within(peer, b"G") < 8


def test_the_rest_of_a_body_that_was_answered_is_not_waited_for(peer):
    peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
    answer(peer, "/")
    assert SHORT_S / 2 < closed_within(peer, b"x") < 8


def test_chunks_without_end_after_the_answer_are_not_waited_for(peer):
    peer.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    answer(peer, "/")
    assert SHORT_S / 2 < closed_within(peer, b"1\r\nx\r\n") < 8


def test_a_peer_that_takes_no_bytes_is_dropped(address):
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.settimeout(10)
        peer.connect(address)
        peer.sendall(HEAD.replace(b"/", b"/flood", 1))
        time.sleep(LONG_S)
        n_bytes = 0
        with contextlib.suppress(ConnectionError):
            while received := peer.recv(1 << 20):
                n_bytes += len(received)
        assert n_bytes < 1000 * 65536


def test_a_long_poll_is_left_alone(peer):
    peer.sendall(HEAD.replace(b"/", b"/slow", 1))
    answer(peer, "/slow")


def test_an_idle_connection_is_left_alone(peer):
    for _ in range(2):
        peer.sendall(HEAD)
        answer(peer, "/")
        time.sleep(2 * SHORT_S)


def test_a_body_under_way_is_left_to_its_own_limit(peer):
    peer.sendall(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
    answer(peer, "/slow")


def test_requests_sent_ahead_are_answered_in_order(peer):
    heads = [HEAD.replace(b"/", path, 1) for path in (b"/one", b"/two", b"/three")]
    peer.sendall(b"".join(heads))
    for path in ("/one", "/two", "/three"):
        data = b""
        while not data.endswith(path.encode()):
            received = peer.recv(1)
            assert received
            data += received
