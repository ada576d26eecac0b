"""Between HTTP and the federation: bodies within their caps, signatures, problem documents.

Nothing here knows what a request means, and nothing behind it knows HTTP.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog
from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from aggregator_server.errors import NoSpaceError, Refusal, StaleWriteError, StoreBusyError
from aggregator_server.federation import Federation
from aggregator_server.metrics import Metrics
from protocol.errors import EncodingError, ManifestError, SignatureError
from protocol.problems import CONTENT_TYPE, ProblemType, problem_document
from protocol.transport_signing import BodyDigestError, VerifiedRequest, verify_request
from protocol.wire import ModelT, WireModel, parse

_log = structlog.get_logger(__name__)
_BUSY_RETRY_S: Final = 1.0
_NO_SPACE_RETRY_S: Final = 30.0
_SLOT_WAIT_S: Final = 20.0
_AUTHORITY: Final = "http://sheepfold.invalid"
"""Stands for the authority, which a transport signature does not cover."""


async def read_body(request: Request, *, limit: int) -> bytes:
    """The whole body of a request.

    Args:
        request: Its body is read once.
        limit: Most bytes; judged by Content-Length before anything is read, and by what arrives.

    Raises:
        Refusal: `too-large`.
    """
    declared = request.headers.get("content-length")
    if declared is not None and (not declared.isdecimal() or int(declared) > limit):
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


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

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold one slot.

        Raises:
            Refusal: `busy`, when none came free in time.
        """
        try:
            async with asyncio.timeout(_SLOT_WAIT_S):
                await self._free.acquire()
        except TimeoutError as error:
            raise Refusal(
                ProblemType.BUSY, "too many uploads at once", retry_after_s=_BUSY_RETRY_S
            ) from error
        try:
            yield
        finally:
            self._free.release()


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
                response = _problem(request, _framework_refusal(error))
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
        return _problem(request, _framework_refusal(error))

    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(RequestValidationError, refuse)


async def in_thread(call: Callable[[], WireModel]) -> Response:
    """Run a blocking call of the federation off the loop, and encode its answer."""
    return reply(await to_thread.run_sync(call))


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


def _framework_refusal(error: Exception) -> Refusal:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Refusal(ProblemType.BAD_REQUEST, f"{where}: {first['msg']}")
    if isinstance(error, HTTPException) and error.status_code == ProblemType.NOT_FOUND.status:
        return Refusal(ProblemType.NOT_FOUND, "there is nothing at this path")
    detail = str(error.detail) if isinstance(error, HTTPException) else "it cannot be understood"
    return Refusal(ProblemType.BAD_REQUEST, detail)


def _too_large(limit: int) -> Refusal:
    return Refusal(ProblemType.TOO_LARGE, f"the body may have at most {limit} bytes")


def _url_as_received(request: Request) -> str:
    # Built from the raw bytes: what was percent-encoded must stay so, or the signature breaks.
    raw_path: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    query: bytes = request.scope["query_string"]
    suffix = b"?" + query if query else b""
    return _AUTHORITY + (raw_path + suffix).decode("latin-1")
