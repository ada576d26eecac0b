"""Which column of the records is split: their category, a field of theirs, or their file.

The column is a choice of its own, beside the scheme: any scheme splits any column.

| by | the value of a record |
| --- | --- |
| `category` | its category, as the agent reads it |
| `language` | its field `language`, or else `lang` |
| `file` | the name of the file that it stands in, without endings |
| another name | its field of that name |

The reader keeps no further fields, so those are read here, in a second pass over the same entries.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from edge_agent.data.entries import Entry, iterate_entries
from edge_agent.data.fields import parse_entry
from edge_agent.data.records import UNCATEGORIZED, Record
from edge_agent.data.sources import Compression, detect_format
from edge_agent.errors import MalformedRecordError
from simulations.errors import PartitionError

CATEGORY: Final = "category"
FILE: Final = "file"
LANGUAGE: Final = "language"

_ALIASES: Final = {LANGUAGE: (LANGUAGE, "lang")}
_TEXTS: Final = frozenset(
    {
        *("instruction", "prompt", "question", "context", "input"),
        *("response", "output", "completion", "answer", "messages", "instances"),
    }
)
"""Fields that are what a record says. No scheme looks at them."""
_MOST_SHOWN: Final = 8


def check_by(by: str) -> None:
    """Refuse a name that is no column to split by.

    Raises:
        PartitionError: It is blank, or a field that holds a record's text.
    """
    if not by.strip():
        msg = "the column to split by has no name; take category, language, file or a field"
        raise PartitionError(msg)
    if by in _TEXTS:
        msg = (
            f"{by!r} is text of a record, and no column to split by; take a field such as category"
        )
        raise PartitionError(msg)


def checked_value(value: object, what: str) -> str | None:
    """A value of a column, None where it is absent or blank.

    Args:
        value: As it stands.
        what: Where, for the error.

    Raises:
        PartitionError: It is not text, holds NUL, or is not valid Unicode.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        msg = f"{what} is not text but of type {type(value).__name__}, so it is no column to split"
        raise PartitionError(msg)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        msg = f"{what} is not valid Unicode (place {error.start})"
        raise PartitionError(msg) from error
    if "\0" in value:
        msg = f"{what} holds a NUL character"
        raise PartitionError(msg)
    return value if value.strip() else None


def file_label(name: str) -> str:
    """What a file is called without the endings of its format and its packing.

    Raises:
        DataError: The ending is none that can be read.
    """
    packed = detect_format(name)[1] is not Compression.NONE
    short = Path(name).with_suffix("")
    return str(short.with_suffix("") if packed else short)


def column_of(path: Path, records: Sequence[Record], by: str) -> list[str | None]:
    """One file's part of a column.

    Args:
        path: The file.
        records: What `edge_agent.data.reading.read_records` made of it.
        by: Which column.

    Returns:
        For each record its value, None where it has none.

    Raises:
        PartitionError: A value is not text, or the file was changed since `records` were read.
        DataError: The file cannot be read.
    """
    if by == CATEGORY:
        return [record.category or None for record in records]
    if by == FILE:
        return [file_label(path.name)] * len(records)
    column: list[str | None] = []
    for entry in iterate_entries(path, path.name):
        if isinstance(entry, MalformedRecordError):
            continue
        try:
            n_records = len(parse_entry(entry))
        except MalformedRecordError:
            continue
        column += [_value(entry, by)] * n_records
    if len(column) != len(records):
        msg = f"{path.name} was changed while it was read; try again"
        raise PartitionError(msg)
    return column


def _value(entry: Entry, by: str) -> str | None:
    if not isinstance(entry.value, Mapping):  # then it is no record, so it does not come here
        return None
    for name in _ALIASES.get(by, (by,)):
        value = checked_value(entry.value.get(name), f"{entry.location}: its {name!r}")
        if value is not None:
            return value
    return None


def filled(column: Sequence[str | None], by: str, paths: Sequence[Path]) -> tuple[str, ...]:
    """A column of all files, with a group of their own for the records without a value.

    Raises:
        PartitionError: No record has a value, unless `by` is the category, which may be missing.
    """
    if by != CATEGORY and not any(column):
        names = " or ".join(repr(name) for name in _ALIASES.get(by, (by,)))
        msg = (
            f"no record of {', '.join(path.name for path in paths)} has a field {names}"
            f"{_fields_there(paths[0])}; name another column, split by file, or give each file a "
            "label"
        )
        raise PartitionError(msg)
    return tuple(value or UNCATEGORIZED for value in column)


def _fields_there(path: Path) -> str:
    """The fields that the first entry of a file has beside its texts, in words."""
    first = next(iter(iterate_entries(path, path.name)), None)
    if not isinstance(first, Entry) or not isinstance(first.value, Mapping):
        return ""
    names = sorted(str(name) for name in first.value.keys() - _TEXTS)
    shown = ", ".join(repr(name) for name in names[:_MOST_SHOWN])
    return f" (the first has {shown})" if shown else " (the first has nothing but texts)"
