# ruff: noqa: INP001 - a script beside the pages it writes, part of no package
"""Writes the tables of protocol.md that are the code's own: phases, problem types, limits.

    python docs/tables.py            # rewrites docs/protocol.md in place

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. A test renders them again
and refuses a page that differs.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeVar

from protocol import limits
from protocol.checks import Check
from protocol.phases import AGENT_TRANSITIONS, CELL_TRANSITIONS, ROUND_TRANSITIONS
from protocol.problems import ProblemType

PAGE: Final = Path(__file__).parent / "protocol.md"
_TABLE: Final = re.compile(
    r"(?P<head><!-- table: (?P<name>[a-z-]+) -->\n).*?(?P<foot><!-- end of table -->)", re.DOTALL
)
_EventT = TypeVar("_EventT", bound=StrEnum)
_PhaseT = TypeVar("_PhaseT", bound=StrEnum)

_LIMITS: Final[Mapping[str, str]] = {
    "MAX_JSON_BYTES": "bytes of a JSON body, request or reply",
    "PART_BYTES": "bytes of each part of an upload but the last",
    "MAX_UPDATE_BYTES": "bytes of an update, and of a file of a release",
    "MAX_TENSORS": "tensors of an adapter",
    "MAX_TENSOR_NAME_CHARS": "characters of a tensor's name",
    "MAX_TARGET_MODULES": "entries of `lora.target_modules`",
    "MAX_TEXT_CHARS": "characters of a free text: a description, a reason",
    "MAX_ROUNDS": "rounds of a federation",
    "MAX_COHORT": "agents of a cohort",
    "MAX_WEIGHT": "FedAvg weight that a manifest may allow",
    "MIN_CELL": "members of a masked cell, at least",
    "MAX_CELL": "members of a masked cell, at most",
    "MAX_WAVE": "agents of a READY LIST",
    "MAX_READY_ATTEMPTS": "READY messages of an agent in a round",
    "MAX_HELPER_REQUEST_BYTES": "bytes of a request to a helper",
    "MAX_RELEASES_PER_REPLY": "releases in one reply",
    "LONG_POLL_S": "seconds that the server holds a poll",
    "SIGNATURE_WINDOW_S": "seconds that a transport signature may be old",
    "NONCE_BYTES": "bytes of a nonce, exactly",
    "INVITE_CODE_BYTES": "bytes of an invite code, exactly",
    "CREDENTIAL_LIFETIME_S": "seconds that a credential holds",
}


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str) -> str:
    """The page with each table as the code has it.

    Args:
        page: Markdown with markers; a name that is not in `tables` is a KeyError.
    """
    made = tables()
    return _TABLE.sub(lambda hit: f"{hit['head']}\n{made[hit['name']]}\n{hit['foot']}", page)


def tables() -> dict[str, str]:
    """Every table by the name in its marker."""
    return {
        "round-phases": _transitions(ROUND_TRANSITIONS),
        "cell-phases": _transitions(CELL_TRANSITIONS),
        "agent-phases": _transitions(AGENT_TRANSITIONS),
        "checks": _checks(),
        "problems": _problems(),
        "limits": _limits(),
    }


def _transitions(table: Mapping[tuple[_PhaseT, _EventT], _PhaseT]) -> str:
    rows = [(phase, event, after) for (phase, event), after in table.items()]
    return _markdown(("phase", "event", "next phase"), [_code(*row) for row in rows])


def _problems() -> str:
    rows = [
        (*_code(problem), str(problem.status), *_code(problem.advice), problem.sentence)
        for problem in ProblemType
    ]
    return _markdown(("type", "status", "advice", "in words"), rows)


def _checks() -> str:
    rows = [(str(check.number), *_code(check), check.sentence) for check in Check]
    return _markdown(("check", "code", "what the owner is told"), rows)


def _limits() -> str:
    rows = [(*_code(name), f"{getattr(limits, name):,}", of) for name, of in _LIMITS.items()]
    return _markdown(("name", "value", "of what"), rows)


def _code(*texts: str) -> tuple[str, ...]:
    return tuple(f"`{text}`" for text in texts)


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
