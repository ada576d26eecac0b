"""The evaluator's routes: its task, the candidates' files, its report."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response

from aggregator_server.web.admission import (
    MAX_MESSAGE_BYTES,
    Here,
    admit_evaluator,
    poll,
)
from aggregator_server.web.edge import ProblemRoute, in_thread, parse_body, reply
from aggregator_server.web.files import NOBODY, parse_name, send_file
from aggregator_server.web.openapi import body_of, reply_of
from protocol.gating import EvaluationReport
from protocol.limits import LONG_POLL_S
from protocol.messages import Acknowledged, EvaluationReply
from protocol.signing import Signed


def evaluation_router() -> APIRouter:
    """The routes of the gate."""
    router = APIRouter(prefix="/v1/federations/{federation}/evaluation", route_class=ProblemRoute)

    @router.get("", responses=reply_of(EvaluationReply))
    async def task(
        request: Request,
        service: Here,
        wait: Annotated[float, Query(ge=0.0, le=3600.0, allow_inf_nan=False)] = 0.0,
    ) -> Response:
        """What the evaluator is to judge; signed by it. Holds the answer while there is nothing."""
        await admit_evaluator(service, request)
        answer = await poll(
            service,
            service.evaluations.reply,
            is_news=lambda found: found.task is not None or found.finished,
            wait_s=min(wait, LONG_POLL_S),
        )
        return reply(answer)

    @router.get("/candidates/{name}")
    async def candidate(request: Request, service: Here, name: str) -> Response:
        """The adapter file of a candidate, by its SHA-256; signed by the evaluator."""
        await admit_evaluator(service, request)
        evaluations = service.evaluations

        def call() -> Response:
            ref = evaluations.candidate(parse_name(name))
            return send_file(service, request, ref, evaluations.chunks, cache=NOBODY)

        return await to_thread.run_sync(call)

    @router.post(
        "/reports",
        responses=reply_of(Acknowledged),
        openapi_extra=body_of(Signed[EvaluationReport]),
    )
    async def report(request: Request, service: Here) -> Response:
        """What the evaluator found; signed by it."""
        identity, body = await admit_evaluator(service, request, limit=MAX_MESSAGE_BYTES)

        def call() -> Acknowledged:
            service.judge(identity, parse_body(Signed[EvaluationReport], body))
            return Acknowledged()

        return await in_thread(call)

    return router
