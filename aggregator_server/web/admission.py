"""Who makes a request, to which federation, and how an answer is waited for."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Final, TypeVar

from anyio import to_thread
from fastapi import Depends, Path, Request

from aggregator_server.errors import Refusal
from aggregator_server.federation import Federation
from aggregator_server.web.edge import Threads, read_body, verify_head, verify_transport
from protocol.limits import KIB
from protocol.problems import ProblemType
from protocol.wire import WireModel

AnswerT = TypeVar("AnswerT", bound=WireModel)

MAX_MESSAGE_BYTES: Final = 64 * KIB
"""Of a request; the largest message that an agent sends, its shares for a cell of 32, has 8 kB."""
MAX_INT: Final = 2**31 - 1

RoundInPath = Annotated[int, Path(ge=1, le=MAX_INT)]
AttemptInPath = Annotated[int, Path(ge=1, le=MAX_INT)]


# Both are coroutines, or the framework would run them in its threads, where they would wait.
async def _federation(request: Request) -> Federation:
    federation: Federation = request.app.state.federation
    return federation


async def _this_federation(request: Request, federation: str) -> Federation:
    service = await _federation(request)
    if federation != service.charter.path_id:
        raise Refusal(
            ProblemType.UNKNOWN_FEDERATION, f"here is only the federation {service.charter.path_id}"
        )
    return service


Anywhere = Annotated[Federation, Depends(_federation)]
Here = Annotated[Federation, Depends(_this_federation)]


async def admit(
    service: Federation, request: Request, *, limit: int = 0, even_revoked: bool = False
) -> tuple[bytes, bytes]:
    """The member that makes a request, and the body.

    Args:
        service: The federation.
        request: Its body is read here.
        limit: Most bytes of the body.
        even_revoked: Whether a former member may make it.

    Raises:
        Refusal: Not signed by a member, not fresh, or too large.
    """
    body = await read_body(request, limit=limit)

    def check() -> bytes:
        verified = verify_transport(request, body)
        return service.membership.admit(verified, even_revoked=even_revoked)

    return await to_thread.run_sync(check), body


async def admit_evaluator(
    service: Federation, request: Request, *, limit: int = 0
) -> tuple[bytes, bytes]:
    """The evaluator that makes a request, and the body.

    Raises:
        Refusal: Not signed by the evaluator, not fresh, or too large.
    """
    body = await read_body(request, limit=limit)

    def check() -> bytes:
        return service.admit_evaluator(verify_transport(request, body))

    return await to_thread.run_sync(check), body


def expect(service: Federation, request: Request) -> bytes:
    """The member whose large body is about to be read; `admit` has the last word on it.

    Raises:
        Refusal: Not signed by a member.
    """
    identity = verify_head(request)
    service.membership.require_member(identity)
    return identity


def threads_of(request: Request) -> Threads:
    """The threads of the application."""
    threads: Threads = request.app.state.threads
    return threads


async def poll(
    service: Federation,
    look: Callable[[], AnswerT],
    *,
    is_news: Callable[[AnswerT], bool],
    wait_s: float,
) -> AnswerT:
    """Look until there is news or the time is up.

    Args:
        service: Whose wakeups end a wait.
        look: Gives the answer as it stands; may block.
        is_news: Whether it is worth answering at once.
        wait_s: Longest wait.
    """
    until = service.clock.monotonic() + wait_s
    while True:
        ticket = service.wakeups.ticket()
        answer = await to_thread.run_sync(look)
        left_s = until - service.clock.monotonic()
        if left_s <= 0 or is_news(answer) or service.wakeups.closed:
            return answer
        if not await service.wakeups.wait(ticket, left_s):
            return await to_thread.run_sync(partial(look))
