"""Between HTTP and the federation: bodies within their caps, signatures, problem documents.

Nothing here knows what a request means, and nothing behind it knows HTTP.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from aggregator_server.errors import NoSpaceError, Refusal, StaleWriteError, StoreBusyError
from aggregator_server.federation import Federation
from aggregator_server.metrics import Metrics
from protocol.errors import EncodingError, ManifestError, SignatureError
from protocol.limits import KIB
from protocol.problems import CONTENT_TYPE, ProblemType, problem_document
from protocol.transport_signing import BodyDigestError, VerifiedRequest, verify_request
from protocol.wire import ModelT, WireModel, b64u_decode, parse

_log = structlog.get_logger(__name__)
_BUSY_RETRY_S: Final = 1.0
_NO_SPACE_RETRY_S: Final = 30.0
_SLOT_WAIT_S: Final = 20.0
_N_SLOTS_EACH: Final = 2
"""One for a body, and one while its sender has given up on it and the server not yet."""
_BODY_GRACE_S: Final = 30.0
_MIN_BODY_BYTES_PER_S: Final = 4 * KIB
_MAX_LENGTH_DIGITS: Final = 18
_KEY_ID: Final = re.compile(r'keyid="([A-Za-z0-9_-]{43})"')
_AUTHORITY: Final = "http://sheepfold.invalid"
"""Stands for the authority, which a transport signature does not cover."""


async def read_body(request: Request, *, limit: int) -> bytes:
    """The whole body of a request.

    Args:
        request: Its body is read once.
        limit: Most bytes; judged by Content-Length before anything is read, and by what arrives.

    Raises:
        Refusal: `too-large`, or `busy` for a body that comes so slowly that it would be in the
            way of others.
    """
    declared = request.headers.get("content-length", "")
    if declared and (not _is_length(declared) or int(declared) > limit):
        raise _too_large(limit)
    longest_s = _BODY_GRACE_S + int(declared or limit) / _MIN_BODY_BYTES_PER_S
    body = bytearray()
    try:
        async with asyncio.timeout(longest_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError as error:
        raise Refusal(
            ProblemType.BUSY,
            f"{len(body)} bytes of the body came in {longest_s:.0f} s; send it faster",
            retry_after_s=_BUSY_RETRY_S,
        ) from error
    return bytes(body)


def verify_head(request: Request) -> bytes:
    """Who signed a request whose body is still to come: a stranger's is not worth reading.

    The digest of the body is signed in the head; `verify_transport` compares it with the body.

    Raises:
        Refusal: `unsigned` or `bad-signature`.
    """
    try:
        return verify_transport(request, b"").identity
    except Refusal as refusal:
        if refusal.problem is not ProblemType.DIGEST_MISMATCH:
            raise
    # The digest is compared last, so the signature holds. Exactly one key may be named beside it,
    # or the one that is read here might not be the one that was checked there.
    named = _KEY_ID.findall(request.headers["signature-input"])
    if len(named) != 1:
        raise Refusal(ProblemType.BAD_SIGNATURE, "Signature-Input must name one key")
    return b64u_decode(named[0])


def verify_transport(request: Request, body: bytes) -> VerifiedRequest:
    """Check the transport signature of a request.

    Raises:
        Refusal: `unsigned`, `bad-signature`, or `digest-mismatch` for a body damaged on its way.
    """
    headers = {name.lower(): value for name, value in request.headers.items()}
    if "signature" not in headers or "signature-input" not in headers:
        raise Refusal(
            ProblemType.UNSIGNED, "this request needs Signature-Input and Signature (RFC 9421)"
        )
    try:
        return verify_request(
            method=request.method, url=_url_as_received(request), headers=headers, body=body
        )
    except BodyDigestError as error:
        raise Refusal(ProblemType.DIGEST_MISMATCH, str(error)) from error
    except SignatureError as error:
        raise Refusal(ProblemType.BAD_SIGNATURE, str(error)) from error


def parse_body(model: type[ModelT], body: bytes) -> ModelT:
    """Read a message.

    Raises:
        Refusal: `bad-request`, naming the first field that is wrong.
    """
    try:
        return parse(model, body)
    except (EncodingError, ManifestError) as error:
        raise Refusal(ProblemType.BAD_REQUEST, str(error)) from error


def reply(message: WireModel) -> Response:
    """A message as canonical JSON."""
    return Response(message.canonical(), media_type="application/json")


class BodySlots:
    """How many large bodies are in memory at once; who finds no room waits, then is told so.

    Args:
        n_slots: Bodies at a time.
    """

    def __init__(self, n_slots: int) -> None:
        """Begin with all of them free."""
        self._free = asyncio.Semaphore(n_slots)
        self._held: Counter[bytes] = Counter()

    @asynccontextmanager
    async def one(self, identity: bytes) -> AsyncIterator[None]:
        """Hold one slot, of which an agent has few, so that a slow one is in its own way alone.

        Args:
            identity: Who sends the body.

        Raises:
            Refusal: `busy`, when none came free in time.
        """
        if self._held[identity] >= _N_SLOTS_EACH:
            raise _too_many("this agent already sends as many bodies as it may")
        self._held[identity] += 1
        try:
            await self._acquire()
            try:
                yield
            finally:
                self._free.release()
        finally:
            self._held[identity] -= 1
            if not self._held[identity]:
                del self._held[identity]

    async def _acquire(self) -> None:
        try:
            async with asyncio.timeout(_SLOT_WAIT_S):
                await self._free.acquire()
        except TimeoutError as error:
            raise _too_many("too many uploads at once") from error


@dataclass(frozen=True)
class Threads:
    """Threads for what must not wait behind other work, and for what others must not wait behind.

    All else shares the pool of the framework.
    """

    clockwork: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))
    probes: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(2))
    uploads: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(16))
    """A slow disk holds these; polls and downloads go on."""


class ProblemRoute(APIRoute):
    """A route whose every fault becomes a problem document."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        """The handler, wrapped."""
        handler = super().get_route_handler()
        route = self.path

        async def handle(request: Request) -> Response:
            federation: Federation = request.app.state.federation
            metrics: Metrics = request.app.state.metrics
            started = federation.clock.monotonic()
            try:
                response = await handler(request)
            except (HTTPException, RequestValidationError) as error:
                response = _problem(request, framework_refusal(error))
            except ClientDisconnect:
                response = _problem(
                    request, Refusal(ProblemType.BAD_REQUEST, "the connection ended early")
                )
            except Exception as error:  # noqa: BLE001 - whatever fails, the agent gets a document
                response = _problem(request, _as_refusal(error, route))
            elapsed_s = federation.clock.monotonic() - started
            metrics.requests.labels(route, response.status_code).inc()
            metrics.latency_s.labels(route).observe(elapsed_s)
            _log.debug(
                "request",
                method=request.method,
                route=route,
                status=response.status_code,
                elapsed_s=round(elapsed_s, 4),
            )
            return response

        return handle


def install_problem_handlers(app: FastAPI) -> None:
    """Make problem documents of what the framework refuses before a route is reached."""

    async def refuse(request: Request, error: Exception) -> Response:
        return _problem(request, framework_refusal(error))

    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(RequestValidationError, refuse)


def framework_refusal(error: Exception) -> Refusal:
    """What to say of an error of the web framework: no such path, or nothing that it can parse."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Refusal(ProblemType.BAD_REQUEST, f"{where}: {first['msg']}")
    if isinstance(error, HTTPException) and error.status_code == ProblemType.NOT_FOUND.status:
        return Refusal(ProblemType.NOT_FOUND, "there is nothing at this path")
    detail = str(error.detail) if isinstance(error, HTTPException) else "it cannot be understood"
    return Refusal(ProblemType.BAD_REQUEST, detail)


def _is_length(text: str) -> bool:
    return text.isdecimal() and len(text) <= _MAX_LENGTH_DIGITS


def _too_many(detail: str) -> Refusal:
    return Refusal(ProblemType.BUSY, detail, retry_after_s=_BUSY_RETRY_S)


def _too_large(limit: int) -> Refusal:
    return Refusal(ProblemType.TOO_LARGE, f"the body may have at most {limit} bytes")


def _url_as_received(request: Request) -> str:
    # Built from the raw bytes: what was percent-encoded must stay so, or the signature breaks.
    raw_path: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    query: bytes = request.scope["query_string"]
    suffix = b"?" + query if query else b""
    return _AUTHORITY + (raw_path + suffix).decode("latin-1")


async def in_thread(
    call: Callable[[], WireModel], limiter: CapacityLimiter | None = None
) -> Response:
    """Run a blocking call of the federation off the loop, and encode its answer."""
    return reply(await to_thread.run_sync(call, limiter=limiter))


def _problem(request: Request, refusal: Refusal) -> Response:
    federation: Federation = request.app.state.federation
    metrics: Metrics = request.app.state.metrics
    metrics.refusals.labels(refusal.problem.value).inc()
    document = problem_document(
        refusal.problem,
        detail=refusal.detail,
        server_time=federation.clock.now(),
        retry_after_s=refusal.retry_after_s,
    )
    headers = {"Cache-Control": "no-store"}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(refusal.retry_after_s)))
    return Response(
        document.canonical(),
        status_code=document.status,
        media_type=CONTENT_TYPE,
        headers=headers,
    )


def _as_refusal(error: Exception, route: str) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, NoSpaceError):
        _log.warning("no space", route=route, error=str(error))
        return Refusal(
            ProblemType.NO_SPACE,
            "the server's disk is full; nothing was stored",
            retry_after_s=_NO_SPACE_RETRY_S,
        )
    if isinstance(error, (StoreBusyError, StaleWriteError)):
        _log.warning("busy", route=route, error=str(error))
        return Refusal(
            ProblemType.BUSY, "the server cannot take this now", retry_after_s=_BUSY_RETRY_S
        )
    _log.error("internal error", route=route, exc_info=error)
    return Refusal(
        ProblemType.INTERNAL,
        "the server failed; nothing was acknowledged",
        retry_after_s=_BUSY_RETRY_S,
    )
