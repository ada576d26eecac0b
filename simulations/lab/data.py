"""Records of a run: who has which, and what nobody trains on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edge_agent.data.hub import HuggingFaceHub, choose_files
from edge_agent.data.records import UNCATEGORIZED, Record
from edge_agent.data.sources import FileSource, parse_source
from quant.tiny.instructions import make_records
from quant.tiny.world import Split, make_world
from simulations.errors import ExperimentError
from simulations.lab.chance import RunChance
from simulations.lab.experiment import WORLD, DataSection
from simulations.partition.manifest import PartitionManifest, SourceData, read_source, selected
from simulations.partition.schemes import (
    IndexArray,
    Partition,
    PartitionRecipe,
    default_min_records,
    make_partition,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabData:
    """Who has which records.

    Attributes:
        clients: The records of each client, at least one.
        held_out: Records that nobody trains on; the category of each is its value of the column
            that the partition splits, by which scores are told.
        partition: What `clients` was cut by, before the cap of `max_records`.
        kept: Indices of the records that the cap left each client; None: there was none.
        column: What the partition splits, of each record.
        manifest: Of the partition, where the records come from files.
        sha256: Of the data, hexadecimal.
    """

    clients: tuple[tuple[Record, ...], ...]
    held_out: tuple[Record, ...]
    partition: Partition
    kept: tuple[IndexArray, ...] | None
    column: tuple[str, ...]
    manifest: PartitionManifest | None
    sha256: str

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many records each client has."""
        return tuple(len(client) for client in self.clients)

    @property
    def everything(self) -> tuple[Record, ...]:
        """All clients' records, client by client."""
        return tuple(record for client in self.clients for record in client)

    @property
    def n_repeated(self) -> int:
        """How many held-out records ask what a client's record asks, in the same context.

        White space and capitals make no difference. Datasets repeat themselves; a model may know
        such a record by heart.
        """
        trained = {_asked(record) for record in self.everything}
        return sum(_asked(record) in trained for record in self.held_out)

    def client_named(self, name: str) -> int:
        """The client of a number, or that of the smallest, median or largest number of records.

        Args:
            name: Such as "7" or "median".

        Raises:
            ExperimentError: There is no such client.
        """
        order = sorted(range(len(self.clients)), key=lambda client: self.sizes[client])
        places = {"smallest": 0, "median": len(order) // 2, "largest": -1}
        if name in places:
            return order[places[name]]
        if not name.isdecimal() or int(name) >= len(order):
            msg = (
                f"there is no client {name!r}; a client is smallest, median, largest, or a number "
                f"from 0 to {len(order) - 1}"
            )
            raise ExperimentError(msg)
        return int(name)


def prepare_data(section: DataSection, *, seed: int) -> LabData:
    """Read records, or make those of the embedded world, and split them.

    Args:
        section: Of the experiment.
        seed: Of the run.

    Raises:
        DataError: Records that cannot be read.
        PartitionError: Records that cannot be split so.
    """
    chance = RunChance(seed)
    recipe = PartitionRecipe(
        scheme=section.scheme,
        n_clients=section.n_clients,
        seed=seed,
        n_held_out=0 if section.source == (WORLD,) else section.held_out,
        alpha=section.alpha,
        min_records=default_min_records(section.scheme)
        if section.min_records is None
        else section.min_records,
    )
    manifest: PartitionManifest | None = None
    if section.source == (WORLD,):
        records, held_out = _world(section, chance)
        column = tuple(record.category or UNCATEGORIZED for record in records)
        partition = make_partition(column, recipe)
        sha256 = _digest([*records, *held_out])
    else:
        source = _read(section)
        records, column = list(source.records), source.column
        partition = make_partition(column, recipe)
        places = partition.held_out.tolist()
        held_out = [
            replace(record, category=column[place])
            for place, record in zip(places, selected(records, places), strict=True)
        ]
        manifest = PartitionManifest.of(source, partition)
        sha256 = _digest_of_files(source)
    kept = _capped(partition, section.max_records, chance)
    return LabData(
        clients=tuple(tuple(selected(records, share.tolist())) for share in kept),
        held_out=tuple(held_out),
        partition=partition,
        kept=None if kept is partition.clients else kept,
        column=column,
        manifest=manifest,
        sha256=sha256,
    )


def data_sha256(section: DataSection, *, seed: int) -> str:
    """The digest that `prepare_data` would give, without the split.

    Args:
        section: Of the experiment.
        seed: Of the run.

    Raises:
        DataError: Records that cannot be read.
    """
    if section.source == (WORLD,):
        records, held_out = _world(section, RunChance(seed))
        return _digest([*records, *held_out])
    return _digest_of_files(_read(section))


def _read(section: DataSection) -> SourceData:
    paths = [path for name in section.source for path in _local(name)]
    return read_source(*paths, by=section.by)


def _world(section: DataSection, chance: RunChance) -> tuple[list[Record], list[Record]]:
    """Records to train on, and those to hold out."""
    return (
        _of_world(section.per_category, Split.TRAIN, chance),
        _of_world(section.held_out, Split.TEST, chance),
    )


def _of_world(n_per_category: int, split: Split, chance: RunChance) -> list[Record]:
    rows = make_records(
        make_world(),
        n_per_category=n_per_category,
        split=split,
        rng=chance.generator(f"records of the world, {split.value}"),
        courteous=True,
    )
    return [
        Record(**row, messages=None, source=f"{WORLD}:{split.value}:{number}")
        for number, row in enumerate(rows, start=1)
    ]


def _capped(partition: Partition, most: int | None, chance: RunChance) -> tuple[IndexArray, ...]:
    """Each client's indices; where there are too many in all, the same share of each, at random."""
    share = 1.0 if most is None else min(1.0, most / int(partition.sizes.sum()))
    if share == 1.0:
        return partition.clients
    kept = []
    for number, indices in enumerate(partition.clients):
        rng = chance.generator("records that a client keeps", number)
        count = max(1, round(share * indices.size))
        kept.append(np.sort(rng.choice(indices, count, replace=False)))
    return tuple(kept)


def _asked(record: Record) -> tuple[str, ...]:
    """What a record asks, without what is chance in it."""
    turns = () if record.messages is None else (turn.content for turn in record.messages[:-1])
    return tuple(
        " ".join(text.casefold().split()) for text in (record.instruction, record.context, *turns)
    )


def _local(name: str) -> list[Path]:
    """Files on this machine: those of the hub are fetched, or found in the hub's cache."""
    source = parse_source(name)
    if isinstance(source, FileSource):
        return [source.path]
    hub = HuggingFaceHub()
    listing = hub.list_files(source.repo_id, source.revision)
    files = choose_files(source, listing.files)
    return [hub.download(source.repo_id, listing.commit, file) for file in files]


def _digest(records: Sequence[Record]) -> str:
    """Of the rows' canonical JSON: of texts and null, as of the world's records, this is it."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    rows = (
        f"[{','.join(map(encode, (one.instruction, one.context, one.response, one.category)))}]"
        for one in records
    )
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def _digest_of_files(source: SourceData) -> str:
    digest = hashlib.sha256()
    for file in source.files:
        digest.update(file.sha256)
    return digest.hexdigest()
