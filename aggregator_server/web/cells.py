"""The routes of masked rounds; see `protocol.masked` for the table."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from aggregator_server.errors import Refusal
from aggregator_server.masking.cells import Cells
from aggregator_server.web.admission import (
    MAX_MESSAGE_BYTES,
    AttemptInPath,
    Here,
    RoundInPath,
    admit,
    poll,
    threads_of,
)
from aggregator_server.web.edge import ProblemRoute, in_thread, parse_body, reply
from aggregator_server.web.openapi import body_of, reply_of
from protocol.errors import EncodingError
from protocol.helped import HelperUpload
from protocol.limits import LONG_POLL_S
from protocol.masked import (
    CellNews,
    Complaint,
    Confirm,
    MaskedHeader,
    NewsPhase,
    NoNews,
    Ready,
    Reveal,
    Shares,
)
from protocol.messages import Acknowledged, UploadStatus
from protocol.phases import AgentPhase
from protocol.problems import ProblemType
from protocol.signing import Signed
from protocol.wire import ModelT, b64u_decode


def cell_router() -> APIRouter:
    """READY, news of one's cell, and what its members send."""
    router = APIRouter(prefix="/v1/federations/{federation}", route_class=ProblemRoute)
    _add_forming(router)
    _add_messages(router)
    return router


def _add_forming(router: APIRouter) -> None:
    @router.post("/readies", responses=reply_of(Acknowledged), openapi_extra=body_of(Signed[Ready]))
    async def ready(request: Request, service: Here) -> Response:
        """Ask for a cell, with a finished update in hand; signed."""
        identity, body = await admit(service, request, limit=MAX_MESSAGE_BYTES)

        def call() -> Acknowledged:
            service.ready(identity, parse_body(Signed[Ready], body))
            return Acknowledged()

        return await in_thread(call)

    @router.get("/cells/{round_number}/{attempt}", responses=reply_of(CellNews))
    async def news(
        request: Request,
        service: Here,
        round_number: RoundInPath,
        attempt: AttemptInPath,
        phase: Annotated[NewsPhase, Query()],
        wait: Annotated[float, Query(ge=0.0, le=3600.0, allow_inf_nan=False)] = 0.0,
    ) -> Response:
        """What there is for a READY's agent that stands at `phase`; signed. Held like `task`."""
        identity, _ = await admit(service, request)
        look = partial(
            service.masked().news,
            identity,
            round_number=round_number,
            attempt=attempt,
            phase=AgentPhase(phase),
        )
        answer = await poll(service, look, is_news=_is_news, wait_s=min(wait, LONG_POLL_S))
        return reply(answer)


def _add_messages(router: APIRouter) -> None:
    @router.post("/helped", responses=reply_of(UploadStatus), openapi_extra=body_of(HelperUpload))
    async def begin_helped(request: Request, service: Here) -> Response:
        """Announce an upload under a helper's mask; its parts go where plain ones go; signed."""
        identity, body = await admit(service, request, limit=MAX_MESSAGE_BYTES)

        def call() -> UploadStatus:
            return service.begin_helped_upload(identity, parse_body(HelperUpload, body))

        return await in_thread(call, threads_of(request).uploads)

    @router.post(
        "/cells/{transcript}/shares",
        responses=reply_of(Acknowledged),
        openapi_extra=body_of(Shares),
    )
    async def shares(request: Request, service: Here, transcript: str) -> Response:
        """Deal one's shares to the members of the cell; signed."""
        return await _take(request, service, transcript, Shares, Cells.shares)

    @router.post(
        "/cells/{transcript}/complaints",
        responses=reply_of(Acknowledged),
        openapi_extra=body_of(Signed[Complaint]),
    )
    async def complain(request: Request, service: Here, transcript: str) -> Response:
        """Tell of a dealer whose shares do not open; signed."""
        return await _take(request, service, transcript, Signed[Complaint], Cells.complain)

    @router.post(
        "/cells/{transcript}/uploads",
        responses=reply_of(UploadStatus),
        openapi_extra=body_of(Signed[MaskedHeader]),
    )
    async def begin_upload(request: Request, service: Here, transcript: str) -> Response:
        """Announce a masked upload; its parts go where plain ones go; signed."""
        identity, body = await admit(service, request, limit=MAX_MESSAGE_BYTES)

        def call() -> UploadStatus:
            signed = parse_body(Signed[MaskedHeader], body)
            if signed.body.transcript != _transcript(transcript):
                raise Refusal(ProblemType.BAD_REQUEST, "path and header name different cells")
            return service.begin_masked_upload(identity, signed)

        return await in_thread(call, threads_of(request).uploads)

    @router.post(
        "/cells/{transcript}/confirm",
        responses=reply_of(Acknowledged),
        openapi_extra=body_of(Confirm),
    )
    async def confirm(request: Request, service: Here, transcript: str) -> Response:
        """Confirm who survived; signed."""
        return await _take(request, service, transcript, Confirm, Cells.confirm)

    @router.post(
        "/cells/{transcript}/reveal",
        responses=reply_of(Acknowledged),
        openapi_extra=body_of(Signed[Reveal]),
    )
    async def reveal(request: Request, service: Here, transcript: str) -> Response:
        """Reveal what removes the masks of the survivors' sum; signed."""
        return await _take(request, service, transcript, Signed[Reveal], Cells.reveal)


async def _take(
    request: Request,
    service: Here,
    transcript: str,
    model: type[ModelT],
    method: Callable[[Cells, bytes, bytes, ModelT], None],
) -> Response:
    identity, body = await admit(service, request, limit=MAX_MESSAGE_BYTES)

    def call() -> Acknowledged:
        method(service.masked(), identity, _transcript(transcript), parse_body(model, body))
        service.work.notify()
        return Acknowledged()

    return await in_thread(call)


def _transcript(text: str) -> bytes:
    try:
        return b64u_decode(text, n_bytes=32)
    except EncodingError as error:
        message = "there is no such cell: one is named by 43 characters of base64url"
        raise Refusal(ProblemType.NOT_FOUND, message) from error


def _is_news(answer: CellNews) -> bool:
    return not isinstance(answer.news, NoNews)
