"""Who has which records, and what nobody trains on."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from edge_agent.errors import DataError
from quant.tiny.world import Split, make_world
from simulations.errors import ExperimentError, PartitionError
from simulations.lab.data import LabData, prepare_data
from simulations.lab.experiment import DataSection
from simulations.partition.manifest import PartitionManifest, read_source
from simulations.partition.schemes import Scheme

WORLD = DataSection(per_category=40, n_clients=10, held_out=5, min_records=4)


@pytest.fixture(scope="module")
def world() -> LabData:
    return prepare_data(WORLD, seed=1)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Four categories of 60 records each."""
    path = tmp_path / "records.jsonl"
    rows = [
        {"instruction": f"Question {n}?", "response": f"Answer {n}.", "category": f"kind {n % 4}"}
        for n in range(240)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def section_of(path: Path, **values: object) -> DataSection:
    fields: dict[str, object] = {
        "source": (str(path),),
        "scheme": Scheme.SKEWED,
        "n_clients": 6,
        "held_out": 5,
        "min_records": 10,
    }
    return DataSection(**fields | values)  # type: ignore[arg-type]


def words(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"[A-Z][a-z]+", text)}


def test_the_world_s_held_out_records_are_of_subjects_that_nobody_trains_on(
    world: LabData,
) -> None:
    world_of_names = make_world()
    names = {
        split: {person.name for person in world_of_names.residents_of(split)}
        | set(world_of_names.stranger_names_of(split))
        for split in Split
    }
    trained = words([f"{r.instruction} {r.context}" for r in world.everything])
    held_out = words([f"{r.instruction} {r.context}" for r in world.held_out])
    assert held_out & names[Split.TEST]
    assert not trained & names[Split.TEST]
    assert not held_out & names[Split.TRAIN]


def test_the_world_s_records_are_those_that_were_asked_for(world: LabData) -> None:
    assert len(world.everything) == 8 * 40
    assert Counter(record.category for record in world.held_out) == dict.fromkeys(
        set(world.column), 5
    )
    assert len(set(world.column)) == 8
    assert len(world.clients) == 10
    assert min(world.sizes) >= 4
    assert sum(world.sizes) == len(world.column)
    sources = [record.source for record in world.everything]
    assert len(set(sources)) == len(sources)
    assert world.manifest is None


def test_equal_seeds_give_equal_data_and_others_give_others(world: LabData) -> None:
    again, other = prepare_data(WORLD, seed=1), prepare_data(WORLD, seed=2)
    assert again.sha256 == world.sha256 != other.sha256
    assert again.clients == world.clients
    assert again.held_out == world.held_out
    assert other.clients != world.clients


def test_a_file_s_records_are_split_and_each_is_somewhere_once(jsonl: Path) -> None:
    found = prepare_data(section_of(jsonl), seed=1)
    everything = [*found.everything, *found.held_out]
    assert len(everything) == 240
    assert len({record.instruction for record in everything}) == 240
    assert Counter(record.category for record in found.held_out) == {
        f"kind {n}": 5 for n in range(4)
    }
    assert min(found.sizes) >= 10
    assert found.sha256 == hashlib.sha256(hashlib.sha256(jsonl.read_bytes()).digest()).hexdigest()


def test_the_manifest_of_a_file_s_partition_says_who_has_what(jsonl: Path, tmp_path: Path) -> None:
    found = prepare_data(section_of(jsonl), seed=1)
    assert found.manifest is not None
    found.manifest.save(tmp_path / "partition.json")
    source = read_source(jsonl, by="category")
    loaded = PartitionManifest.load(tmp_path / "partition.json", data=source.files)
    for client, indices in zip(found.clients, loaded.partition.clients, strict=True):
        assert client == tuple(source.records[index] for index in indices.tolist())
    held_out = tuple(source.records[index] for index in loaded.partition.held_out.tolist())
    assert found.held_out == held_out


def test_a_cap_keeps_the_same_share_of_every_client(jsonl: Path) -> None:
    whole = prepare_data(section_of(jsonl), seed=1)
    capped = prepare_data(section_of(jsonl, max_records=110), seed=1)
    share = 110 / sum(whole.sizes)
    assert capped.sizes == tuple(max(1, round(share * size)) for size in whole.sizes)
    assert abs(sum(capped.sizes) - 110) <= len(whole.sizes) / 2
    assert capped.held_out == whole.held_out
    assert capped.manifest is not None
    assert whole.manifest is not None
    assert capped.manifest.partition.recipe == whole.manifest.partition.recipe
    for kept, all_of_them in zip(capped.clients, whole.clients, strict=True):
        places = [all_of_them.index(record) for record in kept]
        assert places == sorted(set(places))  # in the order of the file, none twice
    assert prepare_data(section_of(jsonl, max_records=110), seed=1).clients == capped.clients
    assert prepare_data(section_of(jsonl, max_records=10_000), seed=1).clients == whole.clients


def test_the_smallest_cap_leaves_every_client_one(jsonl: Path) -> None:
    assert min(prepare_data(section_of(jsonl, max_records=6), seed=1).sizes) == 1


def test_several_files_can_be_split_by_another_column(tmp_path: Path) -> None:
    paths = []
    for language in ("cs", "de"):
        paths.append(tmp_path / f"{language}.jsonl")
        rows = [
            {"instruction": f"{language} {n}", "response": "x", "language": language}
            for n in range(30)
        ]
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(
        source=tuple(map(str, paths)), by="language", n_clients=3, held_out=2, min_records=5
    )
    found = prepare_data(section, seed=1)
    assert Counter(found.column) == {"cs": 30, "de": 30}
    assert len(found.held_out) == 4
    assert found.manifest is not None
    assert [file.name for file in found.manifest.sources] == ["cs.jsonl", "de.jsonl"]


def test_clients_are_known_by_their_volume(world: LabData) -> None:
    sizes = sorted(world.sizes)
    named = {name: world.sizes[world.client_named(name)] for name in ("smallest", "largest")}
    assert named == {"smallest": sizes[0], "largest": sizes[-1]}
    assert world.sizes[world.client_named("median")] == sizes[len(sizes) // 2]
    last = len(sizes) - 1
    assert (world.client_named("0"), world.client_named(str(last))) == (0, last)
    for name in (str(last + 1), "-1", "largish", ""):
        with pytest.raises(ExperimentError, match=f"there is no client '{name}'.* to {last}$"):
            world.client_named(name)


def test_scores_are_told_by_the_column_that_is_split(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    rows = [
        {"instruction": f"Q {n}", "response": "x", "category": f"kind {n % 3}", "language": name}
        for n, name in enumerate(["cs", "de"] * 40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare_data(section_of(path, by="language", min_records=1), seed=1)
    assert Counter(record.category for record in found.held_out) == {"cs": 5, "de": 5}
    assert {record.category for record in found.everything} == {"kind 0", "kind 1", "kind 2"}


def test_a_cap_s_indices_are_those_that_clients_train_on(jsonl: Path) -> None:
    found = prepare_data(section_of(jsonl, max_records=60), seed=1)
    assert found.kept is not None
    records = read_source(jsonl).records
    for share, client, whole in zip(
        found.kept, found.clients, found.partition.clients, strict=True
    ):
        assert [records[index].instruction for index in share] == [
            record.instruction for record in client
        ]
        assert set(share) <= set(whole)
    assert prepare_data(section_of(jsonl), seed=1).kept is None


def test_what_cannot_be_read_or_split_is_said(tmp_path: Path, jsonl: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl"):
        prepare_data(section_of(tmp_path / "gone.jsonl"), seed=1)
    with pytest.raises(PartitionError):
        prepare_data(section_of(jsonl, n_clients=100, min_records=40), seed=1)


def test_held_out_records_that_a_client_s_record_repeats_are_counted(
    world: LabData, tmp_path: Path, jsonl: Path
) -> None:
    assert world.n_repeated == 0
    assert prepare_data(section_of(jsonl), seed=1).n_repeated == 0

    twice = tmp_path / "twice.jsonl"
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    again = [
        row | {"instruction": f" {row['instruction'].upper()}  ", "response": "Another answer."}
        for row in rows[:120]
    ]
    elsewhere = [row | {"context": "Somewhere else."} for row in rows[120:]]
    twice.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again, *elsewhere]))
    data = prepare_data(section_of(twice, held_out=10), seed=1)
    trained = {" ".join(one.instruction.lower().split()) for one in data.everything}
    numbers = [int(re.findall(r"\d+", one.instruction)[0]) for one in data.held_out]
    expected = sum(n < 120 and f"question {n}?" in trained for n in numbers)
    assert data.n_repeated == expected > 0
