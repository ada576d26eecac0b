"""From an entry to records, by the field names that instruction data sets use.

| form | instruction | context | response |
| --- | --- | --- | --- |
| Dolly | `instruction` | `context` | `response` |
| Alpaca | `instruction` | `input` | `output` |
| Self-Instruct | `instruction` | `instances[].input` | `instances[].output` |
| prompt and completion | `prompt` | none | `completion` or `response` |
| question and answer | `question` | none | `answer` |
| chat | `messages[].role`, `messages[].content` | | |

Names may be mixed (`instruction`, `input`, `response`); two that mean the same with different
texts are refused. `category` is taken where it stands; other fields are ignored. A chat of one
question and one answer is an ordinary record. No message repeats a text of the record.
"""

import re
from collections.abc import Mapping
from typing import Final

from edge_agent.data.entries import Entry
from edge_agent.data.records import ChatMessage, Record, Role
from edge_agent.errors import MalformedRecordError

_INSTRUCTION_KEYS: Final = ("instruction", "prompt", "question")
_CONTEXT_KEYS: Final = ("context", "input")
_RESPONSE_KEYS: Final = ("response", "output", "completion", "answer")

_NO_INPUT: Final = re.compile(
    r"\W*no ?inputs?(?: (?:is )?(?:required|needed|provided|given|necessary))?\W*", re.IGNORECASE
)
"""How Alpaca's authors (and their model) wrote an empty input; the whole text, nothing more."""

_N_KEYS_SHOWN: Final = 8


class _UnusableError(Exception):
    """Why an entry is no record; the caller adds where it stands."""


def is_no_input_marker(text: str) -> bool:
    """Tell whether an Alpaca input only says that there is none, as `<noinput>` does.

    Args:
        text: the `input` field.

    Returns:
        True if the whole of it is such a remark.
    """
    return _NO_INPUT.fullmatch(text) is not None


def parse_entry(entry: Entry) -> tuple[Record, ...]:
    """Make records of an entry: one, or one for each Self-Instruct instance.

    Args:
        entry: an entry, parsed but unchecked.

    Returns:
        Its records, at least one.

    Raises:
        MalformedRecordError: it is no record of a known form, or a text is missing, blank, not
            text or not valid Unicode.
    """
    try:
        return _parse(entry.value, entry.location)
    except _UnusableError as error:
        raise MalformedRecordError(entry.location, str(error)) from error


def has_no_input_marker(entry: Entry) -> bool:
    """Tell whether `parse_entry` takes a remark such as `<noinput>` as an empty context.

    Args:
        entry: an entry that parses.

    Returns:
        True if its `input`, or that of one of its instances, is such a remark.
    """
    if not isinstance(entry.value, Mapping):
        return False
    instances = entry.value.get("instances")
    holders = [entry.value, *(instances if isinstance(instances, list) else [])]
    texts = [holder.get("input") for holder in holders if isinstance(holder, Mapping)]
    return any(isinstance(text, str) and is_no_input_marker(text) for text in texts)


def _parse(value: object, source: str) -> tuple[Record, ...]:
    if not isinstance(value, Mapping):
        msg = f"not an object but JSON of type {type(value).__name__}"
        raise _UnusableError(msg)
    category = _optional_text(value, "category")
    if value.get("messages") is not None:
        return (_chat_record(value["messages"], category, source),)
    key = next((k for k in _INSTRUCTION_KEYS if value.get(k) is not None), None)
    if key is None:
        keys = sorted(str(k) for k in value)
        shown = ", ".join(repr(k) for k in keys[:_N_KEYS_SHOWN])
        msg = f"no instruction, prompt, question or messages among its fields ({shown or 'none'})"
        raise _UnusableError(msg)
    instruction = _required_text(value, (key,))
    instances = value.get("instances")
    if instances is None:
        return (_plain_record(instruction, value, category, source),)
    if not isinstance(instances, list) or not instances:
        msg = "'instances' is not a list with something in it"
        raise _UnusableError(msg)
    records = []
    for index, instance in enumerate(instances):
        if not isinstance(instance, Mapping):
            msg = f"instances[{index}] is not an object"
            raise _UnusableError(msg)
        place = source if len(instances) == 1 else f"{source}#{index}"
        records.append(_plain_record(instruction, instance, category, place))
    return tuple(records)


def _plain_record(
    instruction: str, value: Mapping[str, object], category: str | None, source: str
) -> Record:
    context = _one_of(value, _CONTEXT_KEYS) or ""
    if not context.strip() or ("input" in value and is_no_input_marker(context)):
        context = ""
    return Record(
        instruction=instruction,
        context=context,
        response=_required_text(value, _RESPONSE_KEYS),
        category=category,
        messages=None,
        source=source,
    )


def _chat_record(value: object, category: str | None, source: str) -> Record:
    if not isinstance(value, list) or not value:
        msg = "'messages' is not a list with something in it"
        raise _UnusableError(msg)
    turns = [_chat_message(index, item) for index, item in enumerate(value)]
    spoken = turns[1:] if turns[0].role is Role.SYSTEM else turns
    wanted = (Role.USER, Role.ASSISTANT)
    for index, turn in enumerate(spoken):
        if turn.role is not wanted[index % 2]:
            msg = (
                f"messages[{index + len(turns) - len(spoken)}] is of role '{turn.role.value}' "
                f"where '{wanted[index % 2].value}' is due"
            )
            raise _UnusableError(msg)
    if not spoken or spoken[-1].role is not Role.ASSISTANT:
        msg = "the last of its messages is not the assistant's: there is nothing to learn"
        raise _UnusableError(msg)
    return Record(
        instruction=spoken[0].content,
        context="",
        response=spoken[-1].content,
        category=category,
        messages=None if len(turns) == len(wanted) else tuple(turns),
        source=source,
    )


def _chat_message(index: int, value: object) -> ChatMessage:
    if not isinstance(value, Mapping):
        msg = f"messages[{index}] is not an object"
        raise _UnusableError(msg)
    roles = [role.value for role in Role]
    if value.get("role") not in roles:
        msg = f"the role of messages[{index}] is none of {', '.join(roles)}"
        raise _UnusableError(msg)
    content = _text(value.get("content"), f"the content of messages[{index}]")
    if not content.strip():
        msg = f"the content of messages[{index}] is blank"
        raise _UnusableError(msg)
    return ChatMessage(role=Role(value["role"]), content=content)


def _required_text(value: Mapping[str, object], keys: tuple[str, ...]) -> str:
    """Return the text under one of these names; missing or blank is refused."""
    text = _one_of(value, keys)
    if text is None:
        msg = f"no {' or '.join(keys)}"
        raise _UnusableError(msg)
    if not text.strip():
        key = next(k for k in keys if value.get(k) is not None)
        msg = f"its {key} is blank"
        raise _UnusableError(msg)
    return text


def _one_of(value: Mapping[str, object], keys: tuple[str, ...]) -> str | None:
    """Return the text under one of these names, None where all are absent or null."""
    texts = {key: text for key in keys if (text := _optional_text(value, key)) is not None}
    filled = {key: text for key, text in texts.items() if text.strip()}
    if len(set(filled.values())) > 1:
        msg = f"both {' and '.join(filled)}, which mean the same, with different texts"
        raise _UnusableError(msg)
    return next(iter((filled or texts).values()), None)


def _optional_text(value: Mapping[str, object], key: str) -> str | None:
    """Return the text under a name, None where it is absent or null."""
    return None if value.get(key) is None else _text(value[key], f"its {key}")


def _text(value: object, what: str) -> str:
    """Return a value that is valid text."""
    if not isinstance(value, str):
        msg = f"{what} is not text but of type {type(value).__name__}"
        raise _UnusableError(msg)
    if "\0" in value:
        msg = f"{what} holds a NUL character: is the file of another encoding?"
        raise _UnusableError(msg)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        msg = f"{what} holds a lone surrogate or bytes that are not UTF-8 (place {error.start})"
        raise _UnusableError(msg) from error
    return value
