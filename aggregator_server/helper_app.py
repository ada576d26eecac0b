"""The helper's routes: its keys, one answer for each round, the sums."""

from typing import Final

import structlog
from anyio import to_thread
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from aggregator_server.errors import Refusal
from aggregator_server.helper.service import HelperService
from aggregator_server.web.edge import framework_refusal, read_body, reply
from aggregator_server.web.openapi import body_of, install_openapi, reply_of
from protocol.clock import Clock, SystemClock
from protocol.errors import ProtocolError
from protocol.helped import HelperAnswer, HelperDescription, HelperRequest
from protocol.limits import MAX_HELPER_REQUEST_BYTES
from protocol.problems import CONTENT_TYPE, ProblemType, problem_document
from protocol.signing import Signed
from protocol.version import PROTOCOL_VERSION
from protocol.wire import parse

_log = structlog.get_logger(__name__)
_RETRY_S: Final = 5.0


def create_helper_app(service: HelperService, clock: Clock | None = None) -> FastAPI:
    """The web application of a helper.

    Args:
        service: Open; closed by the caller.
        clock: Time for problem documents.
    """
    app = FastAPI(
        title="Sheepfold helper",
        version=str(PROTOCOL_VERSION),
        redoc_url=None,
        redirect_slashes=False,  # a signature holds for one path
    )
    time = clock or SystemClock()

    async def refuse(request: Request, error: Exception) -> Response:
        del request
        if isinstance(error, HTTPException):
            error = framework_refusal(error)
        elif not isinstance(error, Refusal):
            _log.error("internal error", exc_info=error)
            error = Refusal(ProblemType.INTERNAL, "the helper failed", retry_after_s=_RETRY_S)
        document = problem_document(error.problem, detail=error.detail, server_time=time.now())
        return Response(document.canonical(), document.status, media_type=CONTENT_TYPE)

    app.add_exception_handler(Refusal, refuse)
    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(Exception, refuse)
    app.include_router(_router(service))
    install_openapi(app)
    return app


def _router(service: HelperService) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/helper", responses=reply_of(HelperDescription))
    def describe() -> Response:
        """The two keys that a manifest pins."""
        return reply(service.description)

    @router.post(
        "/v1/helper/sums",
        responses=reply_of(Signed[HelperAnswer]),
        openapi_extra=body_of(Signed[HelperRequest]),
    )
    async def sums(request: Request) -> Response:
        """Add up the masks of a closed round's cells, once; signed by the round's server."""
        body = await read_body(request, limit=MAX_HELPER_REQUEST_BYTES)

        def call() -> Signed[HelperAnswer]:
            try:
                signed = parse(Signed[HelperRequest], body, max_bytes=MAX_HELPER_REQUEST_BYTES)
            except ProtocolError as error:
                raise Refusal(ProblemType.BAD_REQUEST, str(error)) from error
            return service.answer(signed)

        return reply(await to_thread.run_sync(call))

    @router.get("/v1/helper/sums/{name}", response_class=FileResponse)
    def mask_sum(name: str) -> Response:
        """A mask sum by its SHA-256 in hexadecimal."""
        return FileResponse(service.sum_path(name), media_type="application/octet-stream")

    return router
