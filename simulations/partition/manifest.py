"""The manifest of a partition: which record went where. It is the truth; a seed is not.

A seed gives the same split only with the same code, numpy and files. The manifest holds the indices
themselves, the digest of each file that they count in, and a digest over all of it.

Version 1 speaks of one file that was split by category, version 2 of several files or another
column. What version 1 can say is still saved as it, so its bytes and its digest stay the same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from edge_agent.data.reading import read_records
from edge_agent.data.records import UNCATEGORIZED, Record
from edge_agent.data.sources import detect_format, open_unpacked
from protocol.wire import Digest, JsonValue, WireModel, domain_hash, explain, is_none
from simulations.errors import OutputError, PartitionError
from simulations.files import appearing
from simulations.partition.columns import (
    CATEGORY,
    FILE,
    check_by,
    checked_value,
    column_of,
    file_label,
    filled,
)
from simulations.partition.schemes import Partition, PartitionRecipe, Scheme

_CHUNK_BYTES = 2**20
_OPENING = b'{"clients":['
"""How every manifest begins: canonical JSON sorts its keys."""
_Count = Annotated[int, Field(ge=0, le=2**53 - 1)]


class SourceFile(WireModel):
    """A file whose records were split.

    Attributes:
        name: Its name, without folders.
        sha256: Of its bytes, unpacked: a packed copy is the same file.
        n_records: Usable records in it; indices count these from 0, over all files in order.
        label: The value of the split column for all of its records; None: theirs, or its name.
    """

    name: str
    sha256: Digest
    n_records: _Count
    label: Annotated[str | None, Field(exclude_if=is_none)] = None


class _Parameters(WireModel):
    n_clients: int
    seed: int
    n_held_out: int
    alpha: float
    min_records: int
    max_tries: int


class _Version(BaseModel):
    version: int = 1


class _Document(WireModel):
    scheme: str
    parameters: _Parameters
    n_tries: Annotated[int, Field(ge=1)]
    held_out: tuple[_Count, ...]
    clients: tuple[tuple[_Count, ...], ...]
    digest: Digest

    def digest_over(self) -> bytes:
        """The digest that `digest` must be."""
        content: dict[str, JsonValue] = self.as_json()
        del content["digest"]
        return domain_hash("partition", content)


class _DocumentOfOne(_Document):
    version: Literal[1] = 1
    source: SourceFile

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The one file."""
        return (self.source,)

    @property
    def by(self) -> str:
        """The category: version 1 knows no other column."""
        return CATEGORY


class _DocumentOfMany(_Document):
    version: Literal[2]
    column: Annotated[str, Field(min_length=1)]
    sources: Annotated[tuple[SourceFile, ...], Field(min_length=1)]

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The files, in order."""
        return self.sources

    @property
    def by(self) -> str:
        """The name of the column."""
        return self.column


@dataclass(frozen=True, kw_only=True)
class SourceData:
    """A data set as read.

    Attributes:
        files: What it was read from, in order.
        records: The usable records of all files, in order.
        n_malformed: Entries that were left out.
        by: The name of `column`.
        column: What is split: of each record its category, its language, its file, …
    """

    files: tuple[SourceFile, ...]
    records: tuple[Record, ...]
    n_malformed: int
    by: str
    column: tuple[str, ...]

    @property
    def file(self) -> SourceFile:
        """What it was read from, where that is one file.

        Raises:
            PartitionError: It was read from several.
        """
        if len(self.files) != 1:
            msg = f"these records are of {len(self.files)} files, not of one"
            raise PartitionError(msg)
        return self.files[0]

    @property
    def categories(self) -> tuple[str, ...]:
        """The column of categories; `UNCATEGORIZED` where a record has none."""
        return tuple(record.category or UNCATEGORIZED for record in self.records)


@dataclass(frozen=True, kw_only=True)
class PartitionManifest:
    """A partition and what it is a partition of.

    Guarantees:
        1. `load(save(m)) == m` in every index, and the same manifest gives the same bytes.
        2. `load` refuses a file of which any byte of content was changed.
        3. With `data`, `load` refuses a manifest of other bytes than those files', of the same
           files in another order, or of another number of usable records in one of them.
        4. One file that is split by category has the bytes and the digest of version 1.

    Attributes:
        sources: The files, in the order in which indices count.
        partition: Who has which of their records.
        by: The name of the column that was split.
    """

    sources: tuple[SourceFile, ...]
    partition: Partition
    by: str = CATEGORY

    @classmethod
    def of(cls, data: SourceData, partition: Partition) -> Self:
        """The manifest of a partition of `data.column`.

        Raises:
            PartitionError: The partition is of another number of records.
        """
        if partition.n_records != len(data.records):
            msg = f"a partition of {partition.n_records} records for {len(data.records)} of them"
            raise PartitionError(msg)
        return cls(sources=data.files, partition=partition, by=data.by)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """What `read_source` needs to read the same column again; None: nothing."""
        found = [file.label for file in self.sources if file.label is not None]
        return tuple(found) if found else None

    def save(self, path: Path) -> str:
        """Write the manifest as canonical JSON (RFC 8785).

        Args:
            path: A new file, or an earlier manifest, which is replaced.

        Returns:
            The digest over all of it, in hexadecimal.

        Raises:
            OutputError: It cannot be written, or a file of another kind is in the way, such as the
                data themselves.
        """
        parameters = asdict(self.partition.recipe)
        scheme: Scheme = parameters.pop("scheme")
        content = _Document(
            scheme=scheme.value,
            parameters=_Parameters(**parameters),
            n_tries=self.partition.n_tries,
            held_out=tuple(self.partition.held_out.tolist()),
            clients=tuple(tuple(share.tolist()) for share in self.partition.clients),
            digest=bytes(32),
        )
        document = self._document(dict(content))
        document = document.model_copy(update={"digest": document.digest_over()})
        _refuse_to_replace(path)
        with appearing(path) as file:
            file.write(document.canonical() + b"\n")
        return document.digest.hex()

    def _document(self, content: dict[str, Any]) -> _DocumentOfOne | _DocumentOfMany:
        if len(self.sources) == 1 and self.by == CATEGORY and self.labels is None:
            return _DocumentOfOne(source=self.sources[0], **content)
        return _DocumentOfMany(version=2, column=self.by, sources=self.sources, **content)

    @classmethod
    def load(cls, path: Path, *, data: SourceFile | Sequence[SourceFile] | None = None) -> Self:
        """Read a manifest.

        Args:
            path: The manifest, of version 1 or 2.
            data: The file that its indices will be used on, or all files in order, as
                `SourceData.files` has them; None: not checked here.

        Raises:
            PartitionError: It cannot be read, is no manifest, was changed, is no partition, or
                belongs to other files than `data`, or to these in another order.
        """
        try:
            document = _parse(path, path.read_bytes())
            scheme = Scheme(document.scheme)
        except OSError as error:
            msg = f"cannot read the manifest {path}: {error.strerror}"
            raise PartitionError(msg) from error
        except ValidationError as error:
            msg = f"{path} is no manifest of a partition: {explain('manifest', error)}"
            raise PartitionError(msg) from error
        except ValueError as error:
            msg = f"{path}: {error}; known schemes are {', '.join(Scheme)}"
            raise PartitionError(msg) from error
        if document.digest_over() != document.digest:
            msg = (
                f"{path} was changed after it was saved: its digest is not that of its content; "
                "fetch it again, or make the partition anew"
            )
            raise PartitionError(msg)
        recipe = PartitionRecipe(scheme=scheme, **document.parameters.model_dump())
        partition = Partition(
            recipe=recipe,
            held_out=np.array(document.held_out, np.int64),
            clients=tuple(np.array(share, np.int64) for share in document.clients),
            n_tries=document.n_tries,
        )
        _check_fit(path, document.files, partition)
        if data is not None:
            given = (data,) if isinstance(data, SourceFile) else tuple(data)
            _check_data(path, document.files, given)
        return cls(sources=document.files, partition=partition, by=document.by)


def _parse(path: Path, text: bytes) -> _DocumentOfOne | _DocumentOfMany:
    """Read a manifest of either version; `ValidationError` where it is none."""
    version = _Version.model_validate_json(text).version
    if version not in {1, 2}:
        msg = f"{path} is a manifest of version {version}; this program reads 1 and 2"
        raise PartitionError(msg)
    model = _DocumentOfOne if version == 1 else _DocumentOfMany
    return model.model_validate_json(text)


def _refuse_to_replace(path: Path) -> None:
    """Refuse a file that holds something else than a manifest."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            begins = file.read(len(_OPENING))
    except OSError as error:
        msg = f"cannot read {path}, which would be replaced: {error.strerror}"
        raise OutputError(msg) from error
    if begins not in {b"", _OPENING}:
        msg = f"{path} exists, and is no manifest of a partition; name another file"
        raise OutputError(msg)


def _check_fit(path: Path, sources: tuple[SourceFile, ...], partition: Partition) -> None:
    n_clients = partition.recipe.n_clients
    if len(partition.clients) != n_clients:
        msg = f"{path} has {len(partition.clients)} clients and speaks of {n_clients}"
        raise PartitionError(msg)
    n_records = sum(file.n_records for file in sources)
    if partition.n_records != n_records:
        has = "a file that has" if len(sources) == 1 else f"{len(sources)} files that have"
        msg = (
            f"{path} splits {partition.n_records} records of {has} {n_records}; make the "
            "partition anew"
        )
        raise PartitionError(msg)


def _check_data(path: Path, sources: tuple[SourceFile, ...], given: tuple[SourceFile, ...]) -> None:
    """Refuse files in which the indices would name other records."""
    if len(sources) != len(given):
        msg = (
            f"{path} counts in {len(sources)} files ({_names(sources)}), and {len(given)} are "
            f"given ({_names(given)})"
        )
        raise PartitionError(msg)
    pairs = list(zip(sources, given, strict=True))
    other = next((pair for pair in pairs if pair[0].sha256 != pair[1].sha256), None)
    if other is not None and {file.sha256 for file in sources} == {file.sha256 for file in given}:
        msg = (
            f"{path} counts in these files in another order, so its indices would name other "
            f"records; give them as {_names(sources)}"
        )
        raise PartitionError(msg)
    if other is not None:
        wanted, found = other
        msg = (
            f"{path} counts in a file {wanted.name!r} with SHA-256 {wanted.sha256.hex()[:16]}…; "
            f"{found.name!r} has {found.sha256.hex()[:16]}…, so its indices would name other "
            "records"
        )
        raise PartitionError(msg)
    for wanted, found in pairs:
        if wanted.n_records != found.n_records:
            msg = (
                f"{path} counts {wanted.n_records} usable records in {wanted.name!r}, and now "
                f"there are {found.n_records}: the file is the same, but it is read otherwise; "
                "make the partition anew"
            )
            raise PartitionError(msg)


def _names(files: Sequence[SourceFile]) -> str:
    return ", ".join(file.name for file in files)


def read_source(
    *paths: Path, by: str = CATEGORY, labels: Sequence[str] | None = None
) -> SourceData:
    """Read a data set, with the digests that a manifest names it by, and the column to split.

    Args:
        paths: Files that `edge_agent.data.reading.read_records` reads; at least one. Indices count
            their records in this order.
        by: Which column is split: `category`, `language`, `file`, or a field of the records; see
            `columns`.
        labels: For each file the value of that column for all its records, such as its language;
            equal ones join files. None: records say it themselves.

    Raises:
        DataError: A file does not exist, or holds nothing that can be used.
        PartitionError: No file, two of the same bytes, a column that no record has or whose values
            are not text, labels that do not fit, or `file` with two files of one name.
    """
    check_by(by)
    _check_paths(paths, by, labels)
    files: list[SourceFile] = []
    records: list[Record] = []
    n_malformed = 0
    column: list[str | None] = []
    for number, path in enumerate(paths):
        found, report = read_records(path)
        label = None if labels is None else labels[number]
        file = SourceFile(name=path.name, sha256=_sha256(path), n_records=len(found), label=label)
        twin = next((other for other in files if other.sha256 == file.sha256), None)
        if twin is not None:
            msg = f"{twin.name} and {path} hold the same bytes: every record would count twice"
            raise PartitionError(msg)
        files.append(file)
        records += found
        n_malformed += report.n_malformed
        column += column_of(path, found, by) if label is None else [label] * len(found)
    return SourceData(
        files=tuple(files),
        records=tuple(records),
        n_malformed=n_malformed,
        by=by,
        column=filled(column, by, paths),
    )


def _check_paths(paths: Sequence[Path], by: str, labels: Sequence[str] | None) -> None:
    if not paths:
        msg = "no file to read records of"
        raise PartitionError(msg)
    if labels is None:
        called = [file_label(path.name) for path in paths] if by == FILE else []
        twice = next((name for name in called if called.count(name) > 1), None)
        if twice is not None:
            msg = f"two files are called {twice!r}; rename one, or label the files to join them"
            raise PartitionError(msg)
        return
    if by == CATEGORY:
        msg = (
            "labels are the values of another column than the records' own category; name it, "
            "such as by language"
        )
        raise PartitionError(msg)
    if len(labels) != len(paths):
        msg = f"{len(labels)} labels for {len(paths)} files; each file needs one"
        raise PartitionError(msg)
    for path, label in zip(paths, labels, strict=True):
        if checked_value(label, f"the label of {path.name}") is None:
            msg = f"the label of {path.name} is blank"
            raise PartitionError(msg)


def _sha256(path: Path) -> bytes:
    """The digest of a file's unpacked bytes."""
    digest = hashlib.sha256()
    with open_unpacked(path, detect_format(path.name)[1]) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()


def selected(records: Sequence[Record], indices: Sequence[int]) -> list[Record]:
    """The records that indices name, in their order.

    Args:
        records: As read from the manifest's files, in order.
        indices: Of a client, or those held out.

    Raises:
        PartitionError: An index beyond the records.
    """
    beyond = [index for index in indices if not 0 <= index < len(records)]
    if beyond:
        msg = f"index {beyond[0]} names no record: there are {len(records)}"
        raise PartitionError(msg)
    return [records[index] for index in indices]
