"""From a file's bytes to its entries, each with its location, not yet checked.

| format | location | read | an error inside it |
| --- | --- | --- | --- |
| JSON Lines | `file:line` | line by line | spoils its line |
| CSV | `file:line`, the record's first | row by row | spoils its row; broken quoting, the file |
| Parquet | `file[index]` | batch by batch | spoils the file |
| JSON | `file[index]` | whole | spoils the file |

"Spoils the file" is a `DataError` with the place: where the next record begins is then unknown.
A JSON array under the name of `.jsonl` is read as JSON, and lines of objects under the name of
`.json` as JSON Lines; both are common. A byte order mark is dropped. Blank lines are no records.
"""

import codecs
import csv
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from edge_agent.data.sources import Compression, DataFormat, detect_format, open_unpacked
from edge_agent.errors import DataError, MalformedRecordError

if TYPE_CHECKING:
    import _csv

MAX_CSV_FIELD_CHARS: Final = 2**24
"""Longest text in a CSV cell; Python's own limit is 131,072."""

PARQUET_BATCH_ROWS: Final = 1024

_RECORD_KEYS: Final = frozenset({"instruction", "messages", "prompt", "question"})
_UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry as parsed: usually a mapping from field names to texts, but not checked to be.

    Attributes:
        value: what the parser returned.
        location: where it stands.
    """

    value: object
    location: str


class _NotOneDocumentError(Exception):
    """Text that begins with a JSON document and goes on after it: probably JSON Lines."""


def iterate_entries(path: Path, name: str) -> Iterator[Entry | MalformedRecordError]:
    """Yield the entries of a file, in order.

    Args:
        path: the file.
        name: what locations call it; its ending tells the format.

    Yields:
        Each entry, or, where it cannot even be parsed, the error that says so.

    Raises:
        DataError: the file cannot be read any further.
    """
    data_format, compression = detect_format(name)
    try:
        with open_unpacked(path, compression) as stream:
            if data_format is DataFormat.PARQUET:
                yield from _parquet_entries(stream, compression, name)
            elif data_format is DataFormat.CSV:
                yield from _csv_entries(stream, name)
            else:
                yield from _json_entries(stream, data_format, name)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        msg = f"{name} cannot be read: {error}"
        raise DataError(msg) from error


def _json_entries(
    stream: BinaryIO, data_format: DataFormat, name: str
) -> Iterator[Entry | MalformedRecordError]:
    """Yield the entries of a JSON document or of JSON Lines, whichever the content is."""
    _skip_mark(stream, name)
    start = stream.tell()
    first = b""
    while not first.strip() and (first := stream.read(1)):
        pass  # blanks before the first character of the content
    stream.seek(start)
    if data_format is DataFormat.JSONL and first != b"[":
        yield from _line_entries(stream, name)
        return
    content = stream.read()
    try:
        document = _parse_document(content, name)
    except _NotOneDocumentError:
        yield from _line_entries(io.BytesIO(content), name)
    else:
        yield from _document_entries(document, name)


def _parse_document(content: bytes, name: str) -> object:
    """Parse one JSON document; bytes that are not UTF-8 become lone surrogates, refused later."""
    try:
        return json.loads(content.decode("utf-8", errors="surrogateescape"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise _NotOneDocumentError from error
        if not content.strip():
            msg = f"{name} is empty"
        else:
            msg = f"{name}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        raise DataError(msg) from error
    except (RecursionError, ValueError) as error:
        msg = f"{name}: JSON that cannot be parsed: {error}"
        raise DataError(msg) from error


def _document_entries(document: object, name: str) -> Iterator[Entry]:
    """Yield the items of an array, of the one array in an object, or the object if a record."""
    items = document
    if isinstance(document, dict):
        lists = {key: value for key, value in document.items() if isinstance(value, list)}
        if _RECORD_KEYS & document.keys():
            items = [document]
        elif len(lists) == 1:
            items = next(iter(lists.values()))
        elif lists:
            msg = f"{name} holds several lists ({', '.join(sorted(lists))}): keep one of them"
            raise DataError(msg)
    if not isinstance(items, list):
        msg = f"{name} holds no list of records, but JSON of type {type(items).__name__}"
        raise DataError(msg)
    for index, item in enumerate(items):
        yield Entry(value=item, location=f"{name}[{index}]")


def _line_entries(lines: Iterable[bytes], name: str) -> Iterator[Entry | MalformedRecordError]:
    """Yield the entry of each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        location = f"{name}:{number}"
        try:
            yield Entry(value=json.loads(line.decode("utf-8")), location=location)
        except UnicodeDecodeError as error:
            yield MalformedRecordError(location, f"not valid UTF-8 (byte {error.start})")
        except json.JSONDecodeError as error:
            reason = f"not valid JSON: {error.msg} (column {error.colno})"
            yield MalformedRecordError(location, reason)
        except (RecursionError, ValueError) as error:
            yield MalformedRecordError(location, f"JSON that cannot be parsed: {error}")


def _csv_entries(stream: BinaryIO, name: str) -> Iterator[Entry | MalformedRecordError]:
    """Yield a mapping for each row under the header; rows may span lines."""
    _skip_mark(stream, name)
    with (
        io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="") as text,
        _long_csv_fields(),
    ):
        # Strict: else a quote that is never closed swallows the rest of the file as one cell.
        reader = csv.reader(text, strict=True)
        header = None
        while (row := _next_row(reader, name)) is not None:
            start, cells = row
            location = f"{name}:{start}"
            if header is None:
                header = _check_header(cells, location)
            elif len(cells) == len(header):
                yield Entry(value=dict(zip(header, cells, strict=True)), location=location)
            else:
                reason = f"{len(cells)} cells under a header of {len(header)}"
                yield MalformedRecordError(location, reason)


def _next_row(reader: "_csv.Reader", name: str) -> tuple[int, list[str]] | None:
    """Return the first line and the cells of the next row that is not blank, None at the end."""
    cells: list[str] | None = []
    start = reader.line_num + 1
    while cells == []:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            msg = f"{name}:{start}: broken CSV in the record that begins here: {error}"
            raise DataError(msg) from error
    return None if cells is None else (start, cells)


def _check_header(cells: list[str], location: str) -> list[str]:
    if len(set(cells)) != len(cells):
        msg = f"{location}: a column name stands twice in the header"
        raise DataError(msg)
    return cells


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    """Raise the csv module's limit, which is the process's, and put it back afterwards."""
    before = csv.field_size_limit(MAX_CSV_FIELD_CHARS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_entries(stream: BinaryIO, compression: Compression, name: str) -> Iterator[Entry]:
    """Yield a mapping for each row."""
    # Here and not above: pyarrow takes a third of a second and few agents read Parquet.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    # The index of a Parquet file is at its end, and seeking in a packed stream unpacks it anew.
    packed = compression is not Compression.NONE
    index = 0
    try:
        with pq.ParquetFile(pa.BufferReader(stream.read()) if packed else stream) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield Entry(value=row, location=f"{name}[{index}]")
                    index += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        msg = f"{name} is not a readable Parquet file (after {index} rows): {error}"
        raise DataError(msg) from error


def _skip_mark(stream: BinaryIO, name: str) -> None:
    """Step over a UTF-8 byte order mark; refuse UTF-16."""
    head = stream.read(len(codecs.BOM_UTF8))
    if head.startswith(_UTF16_MARKS):
        msg = f"{name} is UTF-16: save it as UTF-8"
        raise DataError(msg)
    stream.seek(len(head) if head == codecs.BOM_UTF8 else 0)
