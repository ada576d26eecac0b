"""The routes: decode, call, encode. See `protocol.messages` for the table."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Final

import structlog
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, FastAPI, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from aggregator_server import metrics as metrics_module
from aggregator_server.errors import ServerError
from aggregator_server.federation import Federation
from aggregator_server.metrics import Metrics
from aggregator_server.web.admission import (
    MAX_MESSAGE_BYTES,
    Anywhere,
    AttemptInPath,
    Here,
    RoundInPath,
    admit,
    expect,
    poll,
    threads_of,
)
from aggregator_server.web.cells import cell_router
from aggregator_server.web.edge import (
    BodySlots,
    ProblemRoute,
    Threads,
    in_thread,
    install_problem_handlers,
    parse_body,
    read_body,
    reply,
    verify_transport,
)
from aggregator_server.web.evaluations import evaluation_router
from aggregator_server.web.files import parse_name, send_file
from aggregator_server.web.openapi import body_of, install_openapi, reply_of
from protocol.chain import BlobRef
from protocol.limits import LONG_POLL_S, PART_BYTES
from protocol.messages import (
    Acknowledged,
    Credential,
    Discovery,
    Enrolment,
    FederationStatus,
    ReleasePage,
    Revocation,
    TaskReply,
    TrainTask,
    UploadHeader,
    UploadStatus,
    WaitReason,
    Withdrawal,
)
from protocol.signing import Signed
from protocol.version import PROTOCOL_VERSION

_log = structlog.get_logger(__name__)
_TICK_S: Final = 1.0
"""Longest time between two looks at the clock, and at what other processes wrote."""
_N_PARTS_IN_MEMORY: Final = 64
"""Parts received at once: 64 times 4 MiB."""
_BLOB_NAME: Final = re.compile(r"[0-9a-f]{64}")
_MAX_INT: Final = 2**31 - 1

PartInPath = Annotated[int, Path(ge=0, le=_MAX_INT)]


def create_app(federation: Federation) -> FastAPI:
    """The web application of a federation.

    Its lifespan runs the clockwork, which moves rounds on; without it (as in tests) call
    `federation.advance` by hand.

    Args:
        federation: Open; closed by the caller.
    """
    app = FastAPI(
        title="Sheepfold aggregator",
        version=str(PROTOCOL_VERSION),
        lifespan=_clockwork,
        redoc_url=None,
        redirect_slashes=False,  # a signature holds for one path
    )
    app.state.federation = federation
    app.state.metrics = Metrics()
    app.state.part_slots = BodySlots(_N_PARTS_IN_MEMORY)
    app.state.threads = Threads()
    install_problem_handlers(app)
    app.include_router(_public_router())
    app.include_router(_member_router())
    app.include_router(_release_router())
    app.include_router(_upload_router())
    app.include_router(cell_router())
    app.include_router(evaluation_router())
    install_openapi(app)
    return app


@asynccontextmanager
async def _clockwork(app: FastAPI) -> AsyncIterator[None]:
    threads: Threads = app.state.threads
    task = asyncio.create_task(_tick(app.state.federation, threads.clockwork))
    try:
        yield
    finally:
        app.state.federation.stop_waiting()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _tick(federation: Federation, limiter: CapacityLimiter) -> None:
    work = federation.work
    while not work.closed:
        ticket = work.ticket()
        try:
            await to_thread.run_sync(federation.advance, limiter=limiter)
        except ServerError as error:
            _log.warning("the clockwork waits", error=str(error))
            await asyncio.sleep(_TICK_S)
        except Exception as error:  # noqa: BLE001 - the clockwork never stops
            _log.error("the clockwork failed and goes on", exc_info=error)
            await asyncio.sleep(_TICK_S)
        await work.wait(ticket, _TICK_S)


def _public_router() -> APIRouter:
    router = APIRouter(route_class=ProblemRoute)

    @router.get("/v1/federation", responses=reply_of(Discovery))
    def discover(service: Anywhere) -> Response:
        """The federation of this server."""
        return reply(service.discovery())

    @router.get("/healthz")
    async def health(request: Request, service: Anywhere) -> Response:
        """Whether the database answers."""
        await to_thread.run_sync(service.check, limiter=threads_of(request).probes)
        return Response("ok\n", media_type="text/plain")

    @router.get("/metrics")
    async def metrics(request: Request, service: Anywhere) -> Response:
        """Counters and gauges for Prometheus."""
        rendered: Metrics = request.app.state.metrics
        status = await to_thread.run_sync(service.status, limiter=threads_of(request).probes)
        return Response(rendered.render(status), media_type=metrics_module.CONTENT_TYPE)

    return router


def _member_router() -> APIRouter:
    router = APIRouter(prefix="/v1/federations/{federation}", route_class=ProblemRoute)

    @router.post(
        "/enrolments",
        responses=reply_of(Signed[Credential]),
        openapi_extra=body_of(Signed[Enrolment]),
    )
    async def enrol(request: Request, service: Here) -> Response:
        """Become a member; signed."""
        body = await read_body(request, limit=MAX_MESSAGE_BYTES)

        def call() -> Signed[Credential]:
            verified = verify_transport(request, body)
            return service.enrol(verified, parse_body(Signed[Enrolment], body))

        return await in_thread(call)

    @router.post(
        "/enrolments/revoke",
        responses=reply_of(Acknowledged),
        openapi_extra=body_of(Signed[Revocation]),
    )
    async def revoke(request: Request, service: Here) -> Response:
        """End one's membership; signed."""
        identity, body = await admit(service, request, limit=MAX_MESSAGE_BYTES, even_revoked=True)

        def call() -> Acknowledged:
            service.revoke(identity, parse_body(Signed[Revocation], body))
            return Acknowledged()

        return await in_thread(call)

    @router.get("/task", responses=reply_of(TaskReply))
    async def task(
        request: Request,
        service: Here,
        after: Annotated[int, Query(ge=0, le=_MAX_INT)] = 0,
        wait: Annotated[float, Query(ge=0.0, le=3600.0, allow_inf_nan=False)] = 0.0,
    ) -> Response:
        """What to do now; signed. Holds the answer for `wait` seconds while there is nothing."""
        identity, _ = await admit(service, request)
        look = partial(service.task, identity, after=after)
        answer = await poll(service, look, is_news=_is_news, wait_s=min(wait, LONG_POLL_S))
        return reply(answer)

    @router.post(
        "/withdrawals", responses=reply_of(Acknowledged), openapi_extra=body_of(Signed[Withdrawal])
    )
    async def withdraw(request: Request, service: Here) -> Response:
        """Give one's place in a round to another; signed."""
        identity, body = await admit(service, request, limit=MAX_MESSAGE_BYTES)

        def call() -> Acknowledged:
            service.withdraw(identity, parse_body(Signed[Withdrawal], body))
            return Acknowledged()

        return await in_thread(call)

    return router


def _release_router() -> APIRouter:
    router = APIRouter(prefix="/v1/federations/{federation}", route_class=ProblemRoute)

    @router.get("/status", responses=reply_of(FederationStatus))
    def status(service: Here) -> Response:
        """The federation as anyone may see it."""
        return reply(service.status())

    @router.get("/releases", responses=reply_of(ReleasePage))
    def releases(service: Here, after: Annotated[int, Query(ge=-1, le=_MAX_INT)] = -1) -> Response:
        """The releases after a number, oldest first."""
        return Response(service.releases.page(after=after), media_type="application/json")

    @router.get("/blobs/{name}", response_class=StreamingResponse)
    def blob(request: Request, service: Here, name: str) -> Response:
        """A file that a release names, by its SHA-256 in hexadecimal; one range is honoured."""
        sha = parse_name(name)
        releases = service.releases
        ref = BlobRef(sha256=sha, n_bytes=releases.blob_n_bytes(sha))
        return send_file(service, request, ref, releases.blob_chunks)

    return router


def _upload_router() -> APIRouter:
    router = APIRouter(
        prefix="/v1/federations/{federation}/uploads",
        route_class=ProblemRoute,
        responses=reply_of(UploadStatus),
    )

    @router.post("", openapi_extra=body_of(Signed[UploadHeader]))
    async def begin(request: Request, service: Here) -> Response:
        """Announce an upload by its signed header; signed."""
        identity, body = await admit(service, request, limit=MAX_MESSAGE_BYTES)

        def call() -> UploadStatus:
            return service.begin_upload(identity, parse_body(Signed[UploadHeader], body))

        return await in_thread(call, threads_of(request).uploads)

    @router.get("/{round_number}/{attempt}")
    async def status(
        request: Request, service: Here, round_number: RoundInPath, attempt: AttemptInPath
    ) -> Response:
        """Where an upload stands; signed."""
        identity, _ = await admit(service, request)
        return await in_thread(partial(service.uploads.status, identity, round_number, attempt))

    @router.put("/{round_number}/{attempt}/parts/{n}", openapi_extra=body_of(None))
    async def put_part(
        request: Request,
        service: Here,
        round_number: RoundInPath,
        attempt: AttemptInPath,
        n: PartInPath,
    ) -> Response:
        """Store one part, raw; signed."""
        slots: BodySlots = request.app.state.part_slots
        async with slots.one(await to_thread.run_sync(expect, service, request)):
            identity, body = await admit(service, request, limit=PART_BYTES)
            call = partial(service.uploads.put_part, identity, round_number, attempt, n, body)
            return await in_thread(call, threads_of(request).uploads)

    @router.post("/{round_number}/{attempt}/complete")
    async def complete(
        request: Request, service: Here, round_number: RoundInPath, attempt: AttemptInPath
    ) -> Response:
        """Have a whole upload verified and accepted; signed."""
        identity, _ = await admit(service, request)
        call = partial(service.complete_upload, identity, round_number, attempt)
        return await in_thread(call, threads_of(request).uploads)

    return router


def _is_news(answer: TaskReply) -> bool:
    task = answer.task
    return isinstance(task, TrainTask) or task.reason is WaitReason.FINISHED
