"""What a record is, what reading reports, and the digest that names a set of records."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from edge_agent.errors import MalformedRecordError

N_REASONS_KEPT: Final = 10
"""How many malformed records a report describes; the rest are only counted."""

UNCATEGORIZED: Final = "uncategorized"
"""Where records without a category are counted."""

_DIGEST_DOMAIN: Final = b"sheepfold data set v1\n"


class OnMalformed(StrEnum):
    """What to do with a record that cannot be used."""

    SKIP = "skip"
    FAIL = "fail"


class Role(StrEnum):
    """Who speaks in a chat."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatMessage:
    """One turn of a chat.

    Attributes:
        role: who speaks.
        content: what is said; never empty.
    """

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One instruction with the response it should get.

    Texts are kept as they stand in the file, blanks at their ends included; only a context of
    nothing but white space counts as empty. Valid Unicode without NUL.

    Attributes:
        instruction: what is asked; not blank. Of a chat: its first user turn.
        context: the text it is asked about, or "".
        response: the wanted answer; not blank. Of a chat: its last assistant turn.
        category: Dolly's kind of task, where the file says so.
        messages: the turns of a chat that is more than one question and one answer, else None.
            An optional system turn, then user and assistant in turn, an assistant last.
        source: where it stands, such as `records.jsonl:12` or `records.json[3]`.
    """

    instruction: str
    context: str
    response: str
    category: str | None
    messages: tuple[ChatMessage, ...] | None
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Malformed:
    """A record that was left out.

    Attributes:
        location: where it stands.
        reason: what is wrong with it.
    """

    location: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadReport:
    """What reading a source gave.

    Attributes:
        source: what was read, in words.
        n_read: entries seen, malformed ones included.
        n_records: records returned (one entry of several instances gives several).
        n_malformed: entries left out.
        n_no_input_markers: contexts such as `<noinput>` that were taken as empty.
        malformed: the first `N_REASONS_KEPT` of those left out.
    """

    source: str
    n_read: int
    n_records: int
    n_malformed: int
    n_no_input_markers: int
    malformed: tuple[Malformed, ...]


class MalformedLog:
    """Counts malformed records and keeps the first few; raises at the first one if asked to."""

    def __init__(self, on_malformed: OnMalformed) -> None:
        """Start empty.

        Args:
            on_malformed: whether `add` counts or raises.
        """
        self._on_malformed = on_malformed
        self._first: list[Malformed] = []
        self.n_malformed = 0

    def add(self, error: MalformedRecordError) -> None:
        """Count a malformed record.

        Args:
            error: where it stands and what is wrong.

        Raises:
            MalformedRecordError: the owner asked to stop at the first one.
        """
        if self._on_malformed is OnMalformed.FAIL:
            raise error
        self.n_malformed += 1
        if len(self._first) < N_REASONS_KEPT:
            self._first.append(Malformed(location=error.location, reason=error.reason))

    @property
    def first(self) -> tuple[Malformed, ...]:
        """The first `N_REASONS_KEPT` malformed records."""
        return tuple(self._first)


def dataset_digest(records: Iterable[Record]) -> str:
    """Name a set of records by what it teaches.

    Guarantees:
        1. The same texts give the same digest from any file format, in any order, with or without
           categories.
        2. Another text, one record more or less, or a text moved to another field gives another
           digest.

    A privacy ledger keyed by it therefore survives a conversion or a shuffle of the file, and
    cannot be reset by one.

    Args:
        records: the records; repeated ones count.

    Returns:
        SHA-256 in hexadecimal, 64 characters.
    """
    digests = sorted(_record_digest(record) for record in records)
    whole = hashlib.sha256(_DIGEST_DOMAIN)
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def _record_digest(record: Record) -> bytes:
    if record.messages is None:
        return _digest_texts("record", (record.instruction, record.context, record.response))
    turns = [text for turn in record.messages for text in (turn.role.value, turn.content)]
    return _digest_texts("chat", turns)


def _digest_texts(kind: str, texts: Sequence[str]) -> bytes:
    """Hash texts with their lengths in front, so that none can flow into its neighbour."""
    digest = hashlib.sha256()
    for text in (kind, *texts):
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()
