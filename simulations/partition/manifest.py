"""The manifest of a partition: which record went where. It is the truth; a seed is not.

A seed gives the same split only with the same code, numpy and file. The manifest holds the indices
themselves, the digest of the file that they count in, and a digest over all of it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from edge_agent.data.reading import read_records
from edge_agent.data.records import UNCATEGORIZED, Record
from edge_agent.data.sources import detect_format, open_unpacked
from protocol.wire import Digest, JsonValue, WireModel, domain_hash, explain
from simulations.errors import OutputError, PartitionError
from simulations.partition.schemes import Partition, PartitionRecipe, Scheme

_CHUNK_BYTES = 2**20
_OPENING = b'{"clients":['
"""How every manifest begins: canonical JSON sorts its keys."""
_Count = Annotated[int, Field(ge=0, le=2**53 - 1)]


class SourceFile(WireModel):
    """The file whose records were split.

    Attributes:
        name: Its name, without folders.
        sha256: Of its bytes, unpacked: a packed copy is the same file.
        n_records: Usable records in it; indices count these from 0.
    """

    name: str
    sha256: Digest
    n_records: _Count


class _Parameters(WireModel):
    n_clients: int
    seed: int
    n_held_out: int
    alpha: float
    min_records: int
    max_tries: int


class _Document(WireModel):
    version: Literal[1] = 1
    scheme: str
    parameters: _Parameters
    n_tries: Annotated[int, Field(ge=1)]
    source: SourceFile
    held_out: tuple[_Count, ...]
    clients: tuple[tuple[_Count, ...], ...]
    digest: Digest

    def digest_over(self) -> bytes:
        """The digest that `digest` must be."""
        content: dict[str, JsonValue] = self.as_json()
        del content["digest"]
        return domain_hash("partition", content)


@dataclass(frozen=True, kw_only=True)
class SourceData:
    """A data set as read.

    Attributes:
        file: What it was read from.
        records: Its usable records.
        n_malformed: Entries that were left out.
    """

    file: SourceFile
    records: tuple[Record, ...]
    n_malformed: int

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
        3. With `data`, `load` refuses a manifest of other bytes than that file's.
    """

    source: SourceFile
    partition: Partition

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
        document = _Document(
            scheme=scheme.value,
            parameters=_Parameters(**parameters),
            n_tries=self.partition.n_tries,
            source=self.source,
            held_out=tuple(self.partition.held_out.tolist()),
            clients=tuple(tuple(share.tolist()) for share in self.partition.clients),
            digest=bytes(32),
        )
        document = document.model_copy(update={"digest": document.digest_over()})
        try:
            _refuse_to_replace(path)
            path.write_bytes(document.canonical() + b"\n")
        except OSError as error:
            msg = f"cannot write the manifest {path}: {error.strerror}"
            raise OutputError(msg) from error
        return document.digest.hex()

    @classmethod
    def load(cls, path: Path, *, data: SourceFile | None = None) -> Self:
        """Read a manifest.

        Args:
            path: The manifest.
            data: The file that its indices will be used on; None: not checked here.

        Raises:
            PartitionError: It cannot be read, is no manifest, was changed, is no partition, or
                belongs to another file than `data`.
        """
        try:
            document = _Document.model_validate_json(path.read_bytes())
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
        _check_fit(path, document, partition, data)
        return cls(source=document.source, partition=partition)


def _refuse_to_replace(path: Path) -> None:
    """Refuse a file that holds something else than a manifest."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        begins = file.read(len(_OPENING))
    if begins not in {b"", _OPENING}:
        msg = f"{path} exists, and is no manifest of a partition; name another file"
        raise OutputError(msg)


def _check_fit(
    path: Path, document: _Document, partition: Partition, data: SourceFile | None
) -> None:
    n_clients = document.parameters.n_clients
    if len(partition.clients) != n_clients:
        msg = f"{path} has {len(partition.clients)} clients and speaks of {n_clients}"
        raise PartitionError(msg)
    if partition.n_records != document.source.n_records:
        msg = (
            f"{path} splits {partition.n_records} records of a file that has "
            f"{document.source.n_records}; make the partition anew"
        )
        raise PartitionError(msg)
    if data is not None and data.sha256 != document.source.sha256:
        msg = (
            f"{path} counts in a file {document.source.name!r} with SHA-256 "
            f"{document.source.sha256.hex()[:16]}…; {data.name!r} has {data.sha256.hex()[:16]}…, "
            "so its indices would name other records"
        )
        raise PartitionError(msg)


def read_source(path: Path) -> SourceData:
    """Read a data set, with the digest that a manifest names it by.

    Args:
        path: A file that `edge_agent.data.reading.read_records` reads.

    Raises:
        DataError: It does not exist, or holds nothing that can be used.
    """
    records, report = read_records(path)
    digest = hashlib.sha256()
    with open_unpacked(path, detect_format(path.name)[1]) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return SourceData(
        file=SourceFile(name=path.name, sha256=digest.digest(), n_records=len(records)),
        records=tuple(records),
        n_malformed=report.n_malformed,
    )


def selected(records: Sequence[Record], indices: Sequence[int]) -> list[Record]:
    """The records that indices name, in their order.

    Args:
        records: As read from the manifest's file.
        indices: Of a client, or those held out.

    Raises:
        PartitionError: An index beyond the records.
    """
    beyond = [index for index in indices if not 0 <= index < len(records)]
    if beyond:
        msg = f"index {beyond[0]} names no record: there are {len(records)}"
        raise PartitionError(msg)
    return [records[index] for index in indices]
