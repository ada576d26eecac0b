"""Which data are meant: a local file, or a data set of the hub; its format; how it is opened."""

import gzip
import lzma
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, Final, cast

from edge_agent.errors import DataError

HUB_PREFIX: Final = "hub:"

_HUB_PATTERN: Final = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:]+))?"
)
_BARE_HUB_PATTERN: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class DataFormat(StrEnum):
    """How a file holds its records."""

    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


class Compression(StrEnum):
    """How a file is packed."""

    NONE = "none"
    XZ = "xz"
    GZIP = "gz"


_FORMATS: Final = {
    ".json": DataFormat.JSON,
    ".jsonl": DataFormat.JSONL,
    ".ndjson": DataFormat.JSONL,
    ".csv": DataFormat.CSV,
    ".parquet": DataFormat.PARQUET,
}
_COMPRESSIONS: Final = {".xz": Compression.XZ, ".gz": Compression.GZIP}


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSource:
    """A file on this machine: nothing is contacted to read it.

    Attributes:
        path: where it lies.
    """

    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """A data set of the hub: reading it contacts the hub, unless it is cached.

    Attributes:
        repo_id: `owner/name`.
        revision: branch, tag or commit; None is the newest.
        filename: one file of it; None leaves the choice to `hub.choose_files`.
    """

    repo_id: str
    revision: str | None
    filename: str | None

    def __str__(self) -> str:
        """Return the form that `parse_source` reads."""
        revision = f"@{self.revision}" if self.revision else ""
        filename = f":{self.filename}" if self.filename else ""
        return f"{HUB_PREFIX}{self.repo_id}{revision}{filename}"


def parse_source(source: str | Path) -> FileSource | HubSource:
    """Tell what a `--data` argument means, without touching the network.

    A path is a file; `hub:owner/name`, `hub:owner/name@revision` and `hub:owner/name:file` are
    data sets of the hub. The prefix is asked for, so that a mistyped path never contacts a host.

    Args:
        source: the argument.

    Returns:
        The file or the hub data set. That a file exists is checked.

    Raises:
        DataError: there is no such file, it is a folder, or the hub's form is not kept to.
    """
    text = str(source)
    if isinstance(source, str) and text.startswith(HUB_PREFIX):
        match = _HUB_PATTERN.fullmatch(text.removeprefix(HUB_PREFIX))
        if match is None:
            msg = f"{text!r} is not of the form hub:owner/name[@revision][:file]"
            raise DataError(msg)
        return HubSource(repo_id=match["repo"], revision=match["revision"], filename=match["file"])
    path = Path(source)
    if path.is_file():
        return FileSource(path=path)
    if path.is_dir():
        msg = f"{text} is a folder: name one file in it"
        raise DataError(msg)
    hint = ""
    if _BARE_HUB_PATTERN.fullmatch(text) and path.suffix not in {*_FORMATS, *_COMPRESSIONS}:
        hint = f"; for the data set of that name on the hub write {HUB_PREFIX}{text}"
    msg = f"there is no file {text}{hint}"
    raise DataError(msg)


def detect_format(name: str) -> tuple[DataFormat, Compression]:
    """Tell a file's format by its name.

    Args:
        name: file name or path, such as `records.jsonl.xz`.

    Returns:
        The format and how it is packed.

    Raises:
        DataError: the ending is none that can be read.
    """
    path = Path(name.lower())
    compression = _COMPRESSIONS.get(path.suffix, Compression.NONE)
    if compression is not Compression.NONE:
        path = path.with_suffix("")
    if path.suffix not in _FORMATS:
        known = ", ".join(_FORMATS)
        msg = f"{name}: unknown ending; known are {known}, each also with .xz or .gz"
        raise DataError(msg)
    return _FORMATS[path.suffix], compression


def open_unpacked(path: Path, compression: Compression) -> BinaryIO:
    """Open a file for reading its unpacked bytes.

    Args:
        path: the file.
        compression: how it is packed.

    Returns:
        A stream of bytes, to be closed by the caller.

    Raises:
        OSError: it cannot be opened.
    """
    if compression is Compression.XZ:
        return cast("BinaryIO", lzma.open(path, "rb"))
    if compression is Compression.GZIP:
        return cast("BinaryIO", gzip.open(path, "rb"))
    return path.open("rb")
