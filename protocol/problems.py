"""Every refusal that the server can make: URN, HTTP status, and what the agent does next.

A refused request always gets a problem document (RFC 9457) of one of these types; the agent acts
on its `advice`, never on its text.
"""

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import Field

from protocol.limits import MAX_TEXT_CHARS
from protocol.numbers import UnixTime
from protocol.wire import WireModel

CONTENT_TYPE: Final = "application/problem+json"
_URN: Final = "urn:sheepfold:problem:"


class Advice(StrEnum):
    """What the agent does next."""

    RETRY = "retry"
    """Send the same body again, after `retry_after_s` if given."""
    RE_SIGN = "re-sign"
    """Correct the clock by `server_time`, sign anew, send the same body."""
    DISCARD = "discard"
    """Drop this round's work and poll."""
    RE_ENROL = "re-enrol"
    """The membership no longer holds; ask the owner."""
    STOP = "stop"
    """A fault that repeating cannot mend; tell the owner."""


class ProblemType(StrEnum):
    """The name after `urn:sheepfold:problem:`."""

    BAD_REQUEST = "bad-request"
    TOO_LARGE = "too-large"
    UNSIGNED = "unsigned"
    BAD_SIGNATURE = "bad-signature"
    STALE = "stale"
    REPLAYED = "replayed"
    UNKNOWN_AGENT = "unknown-agent"
    REVOKED = "revoked"
    INVITE_REFUSED = "invite-refused"
    UNKNOWN_FEDERATION = "unknown-federation"
    NOT_FOUND = "not-found"
    BAD_RANGE = "bad-range"
    NOT_SELECTED = "not-selected"
    ROUND_CLOSED = "round-closed"
    STAGE_CLOSED = "stage-closed"
    BAD_MESSAGE = "bad-message"
    CONFLICT = "conflict"
    CONSUMED = "consumed"
    DIGEST_MISMATCH = "digest-mismatch"
    NOT_FINITE = "not-finite"
    INCOMPLETE = "incomplete"
    BUSY = "busy"
    NO_SPACE = "no-space"
    INTERNAL = "internal"

    @property
    def urn(self) -> str:
        """The `type` member of the document."""
        return _URN + self.value

    @property
    def status(self) -> int:
        """The HTTP status."""
        return _TABLE[self][0]

    @property
    def advice(self) -> Advice:
        """What the agent does next."""
        return _TABLE[self][1]

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return _TABLE[self][2]


_TABLE: Final[dict[ProblemType, tuple[int, Advice, str]]] = {
    ProblemType.BAD_REQUEST: (400, Advice.STOP, "The request cannot be understood."),
    ProblemType.TOO_LARGE: (413, Advice.STOP, "The body exceeds the limit."),
    ProblemType.UNSIGNED: (401, Advice.STOP, "The request carries no transport signature."),
    ProblemType.BAD_SIGNATURE: (401, Advice.STOP, "The signature does not hold."),
    ProblemType.STALE: (401, Advice.RE_SIGN, "The signature is too old or too new."),
    ProblemType.REPLAYED: (401, Advice.RE_SIGN, "This signature was already used."),
    ProblemType.UNKNOWN_AGENT: (403, Advice.RE_ENROL, "This agent is not enrolled."),
    ProblemType.REVOKED: (403, Advice.RE_ENROL, "This membership was revoked."),
    ProblemType.INVITE_REFUSED: (403, Advice.STOP, "A valid, unused invite is needed."),
    ProblemType.UNKNOWN_FEDERATION: (404, Advice.STOP, "No such federation here."),
    ProblemType.NOT_FOUND: (404, Advice.DISCARD, "No such thing here."),
    ProblemType.BAD_RANGE: (416, Advice.STOP, "The range is outside the file."),
    ProblemType.NOT_SELECTED: (403, Advice.DISCARD, "This agent is not in the round's cohort."),
    ProblemType.ROUND_CLOSED: (409, Advice.DISCARD, "The round no longer takes uploads."),
    ProblemType.STAGE_CLOSED: (409, Advice.DISCARD, "The cell has gone on without this message."),
    ProblemType.BAD_MESSAGE: (422, Advice.DISCARD, "The message contradicts the cell."),
    ProblemType.CONFLICT: (409, Advice.STOP, "Another body was already accepted for this key."),
    ProblemType.CONSUMED: (409, Advice.DISCARD, "An update of this agent was already accepted."),
    ProblemType.DIGEST_MISMATCH: (422, Advice.RETRY, "The bytes do not match their digest."),
    ProblemType.NOT_FINITE: (422, Advice.DISCARD, "The update has values that are not finite."),
    ProblemType.INCOMPLETE: (409, Advice.RETRY, "Parts of the upload are missing."),
    ProblemType.BUSY: (503, Advice.RETRY, "The server cannot take this now."),
    ProblemType.NO_SPACE: (507, Advice.RETRY, "The server has no space; nothing was stored."),
    ProblemType.INTERNAL: (500, Advice.RETRY, "The server failed; nothing was acknowledged."),
}


class ProblemDocument(WireModel):
    """The body of a refusal (RFC 9457)."""

    type: Annotated[str, Field(pattern=r"^urn:sheepfold:problem:[a-z-]+$")]
    title: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
    status: Annotated[int, Field(ge=400, le=599)]
    detail: Annotated[str, Field(max_length=MAX_TEXT_CHARS)] = ""
    advice: Advice
    server_time: UnixTime
    retry_after_s: Annotated[float, Field(ge=0.0)] | None = None
    protocol: Literal[1] = 1

    @property
    def problem_type(self) -> ProblemType | None:
        """The type, or None when a newer server sent one that this version does not know."""
        name = self.type.removeprefix(_URN)
        return ProblemType(name) if name in ProblemType._value2member_map_ else None


def problem_document(
    problem: ProblemType,
    *,
    detail: str,
    server_time: float,
    retry_after_s: float | None = None,
) -> ProblemDocument:
    """The document for a refusal.

    Args:
        problem: Its type.
        detail: What, where, the limit, what to do; no secrets. Cut at `MAX_TEXT_CHARS`.
        server_time: Seconds since the Unix epoch, for agents whose clock is off.
        retry_after_s: Least wait before the next try.
    """
    return ProblemDocument(
        type=problem.urn,
        title=problem.sentence,
        status=problem.status,
        detail=detail[:MAX_TEXT_CHARS],
        advice=problem.advice,
        server_time=server_time,
        retry_after_s=retry_after_s,
    )
