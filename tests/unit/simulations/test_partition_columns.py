"""What is split: categories, languages, files; and the manifests of several files."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_agent.data.records import UNCATEGORIZED
from simulations.cli import app
from simulations.errors import PartitionError
from simulations.partition.manifest import PartitionManifest, SourceData, read_source, selected
from simulations.partition.schemes import Partition, PartitionRecipe, Scheme, make_partition

OLD_DATA = "".join(
    json.dumps({"instruction": f"Say {i}.", "response": str(i), "category": ["a", "b"][i % 2]})
    + "\n"
    for i in range(12)
)
OLD_MANIFEST = (
    '{"clients":[[0,2,4,6,10],[3,5,7,9,11]],"digest":"DV5-XI5B3KE8_HitO3065Kyo2eiH0VEgLUBlMxsoZWY",'
    '"held_out":[1,8],"n_tries":1,"parameters":{"alpha":0.5,"max_tries":1000,"min_records":1,'
    '"n_clients":2,"n_held_out":1,"seed":3},"scheme":"by-category","source":{"n_records":12,'
    '"name":"records.jsonl","sha256":"8YS3xeOxbzGx65H30Ds0PrdGfQpCOSRyHFTRx3UNb9A"},"version":1}\n'
)
"""Saved by the code before there was a version 2."""
OLD_DIGEST = "0d5e7e5c8e41dca13cfc78ad3b7d3ae4aca8d9e887d151202d4065331b286566"


def write_records(path: Path, n: int, **fields: Callable[[int], Any]) -> Path:
    """A file of records with further fields, each a function of the record's number."""
    rows = [
        {"instruction": f"{path.name} asks {i}.", "response": str(i)}
        | {name: value(i) for name, value in fields.items()}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def split(source: SourceData, scheme: Scheme = Scheme.BY_CATEGORY, n_clients: int = 2) -> Partition:
    recipe = PartitionRecipe(
        scheme=scheme, n_clients=n_clients, seed=1, n_held_out=2, min_records=1
    )
    return make_partition(source.column, recipe)


@pytest.fixture
def english(tmp_path: Path) -> Path:
    return write_records(tmp_path / "en.jsonl", 30, category=lambda i: "ab"[i % 2])


@pytest.fixture
def finnish(tmp_path: Path) -> Path:
    return write_records(tmp_path / "fi.jsonl", 20, category=lambda i: "ab"[i % 2])


@pytest.fixture
def french(tmp_path: Path) -> Path:
    return write_records(tmp_path / "fr.jsonl", 10)


# --- the column -------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["language", "lang"])
def test_by_language_gives_clients_of_one_language(tmp_path: Path, field: str) -> None:
    tongues = ["en", "fi", "fr"]
    path = write_records(tmp_path / "mixed.jsonl", 60, **{field: lambda i: tongues[i % 3]})
    source = read_source(path, by="language")
    partition = split(source, n_clients=6)
    spoken = [{source.column[index] for index in client} for client in partition.clients]
    assert all(len(of_one) == 1 for of_one in spoken)
    assert set.union(*spoken) == {"en", "fi", "fr"}
    held_out = Counter(source.column[index] for index in partition.held_out)
    assert held_out == {"en": 2, "fi": 2, "fr": 2}


def test_the_language_of_a_record_is_its_field_of_that_name_before_the_short_one(
    tmp_path: Path,
) -> None:
    path = write_records(
        tmp_path / "a.jsonl", 3, language=lambda i: ["fi", "", None][i], lang=lambda _: "en"
    )
    assert read_source(path, by="language").column == ("fi", "en", "en")
    assert read_source(path, by="lang").column == ("en", "en", "en")


def test_any_field_of_text_is_a_column_and_records_without_it_are_a_group_of_their_own(
    tmp_path: Path,
) -> None:
    path = write_records(tmp_path / "a.jsonl", 4, domain=lambda i: ["law", " ", None, "law"][i])
    source = read_source(path, by="domain")
    assert source.column == ("law", UNCATEGORIZED, UNCATEGORIZED, "law")
    assert source.by == "domain"


def test_a_column_passes_over_what_is_no_record_and_repeats_for_each_instance(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    instances = [{"input": "", "output": "x"}, {"input": "", "output": "y"}]
    rows = [
        {"instruction": "One.", "response": "1", "lang": "en"},
        {"instruction": "No answer.", "lang": "de"},
        {"instruction": "Two.", "instances": instances, "lang": "fr"},
    ]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([lines[0], "{broken", *lines[1:]]), encoding="utf-8")
    source = read_source(path, by="language")
    assert source.column == ("en", "fr", "fr")
    assert [record.response for record in source.records] == ["1", "x", "y"]
    assert source.n_malformed == 2


def test_by_file_gives_each_record_the_name_of_its_file(english: Path, french: Path) -> None:
    source = read_source(english, french, by="file")
    assert Counter(source.column) == {"en": 30, "fr": 10}
    assert [file.n_records for file in source.files] == [30, 10]
    assert [record.source.split(":")[0] for record in source.records] == [
        *["en.jsonl"] * 30,
        *["fr.jsonl"] * 10,
    ]
    assert source.categories.count(UNCATEGORIZED) == 10


def test_labels_are_the_languages_of_files_and_equal_ones_join_them(
    english: Path, finnish: Path, french: Path
) -> None:
    source = read_source(english, finnish, french, by="language", labels=["en", "x", "x"])
    assert Counter(source.column) == {"en": 30, "x": 30}
    partition = split(source)
    sizes = {source.column[client[0]]: client.size for client in partition.clients}
    assert sizes == {"en": 28, "x": 28}


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("language", r"no record of fr\.jsonl has a field 'language' or 'lang' \(the first has"),
        ("domain", "has a field 'domain' .*nothing but texts"),
        ("instruction", "'instruction' is text of a record"),
        (" ", "has no name"),
    ],
)
def test_a_column_that_is_not_there_is_refused(french: Path, by: str, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        read_source(french, by=by)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "a.jsonl:2: its 'lang' is not text but of type int"),
        (["en"], "not text but of type list"),
        ("e\0n", "holds a NUL"),
        ("\ud800", "not valid Unicode"),
    ],
    ids=["number", "list", "NUL", "surrogate"],
)
def test_a_value_that_is_no_text_is_refused(tmp_path: Path, value: object, message: str) -> None:
    path = write_records(tmp_path / "a.jsonl", 2, lang=lambda i: ["en", value][i])
    with pytest.raises(PartitionError, match=message):
        read_source(path, by="language")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "language", "labels": ["en"]}, "1 labels for 2 files"),
        ({"by": "language", "labels": ["en", " "]}, r"the label of fr\.jsonl is blank"),
        ({"labels": ["en", "fr"]}, "of another column than the records' own category"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    english: Path, french: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        read_source(english, french, **changes)


def test_files_that_would_count_twice_or_are_called_alike_are_refused(
    english: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(english.read_bytes())
    with pytest.raises(PartitionError, match=r"en\.jsonl and .*copy\.jsonl hold the same bytes"):
        read_source(english, copy)
    namesake = write_records(tmp_path / "other" / "en.jsonl", 5)
    with pytest.raises(PartitionError, match="two files are called 'en'"):
        read_source(english, namesake, by="file")
    assert len(read_source(english, namesake, by="file", labels=["en", "xx"]).files) == 2
    with pytest.raises(PartitionError, match="no file to read"):
        read_source()


def test_several_files_are_not_one(english: Path, french: Path) -> None:
    assert read_source(english).file.name == "en.jsonl"
    with pytest.raises(PartitionError, match="of 2 files, not of one"):
        _ = read_source(english, french).file


# --- manifests --------------------------------------------------------------------------------


def test_an_old_manifest_loads_and_saves_with_its_old_digest(tmp_path: Path) -> None:
    path, data = tmp_path / "old.json", tmp_path / "records.jsonl"
    path.write_text(OLD_MANIFEST, encoding="utf-8")
    data.write_text(OLD_DATA, encoding="utf-8")
    source = read_source(data)
    for given in (source.file, source.files, None):
        loaded = PartitionManifest.load(path, data=given)
        assert loaded.sources == source.files
        assert loaded.by == "category"
        assert loaded.labels is None
    assert loaded.save(tmp_path / "new.json") == OLD_DIGEST
    assert (tmp_path / "new.json").read_text(encoding="utf-8") == OLD_MANIFEST


def test_the_old_partition_is_still_the_one_that_is_made(tmp_path: Path) -> None:
    data = tmp_path / "records.jsonl"
    data.write_text(OLD_DATA, encoding="utf-8")
    source = read_source(data)
    recipe = PartitionRecipe(
        scheme=Scheme.BY_CATEGORY, n_clients=2, seed=3, n_held_out=1, min_records=1
    )
    manifest = PartitionManifest.of(source, make_partition(source.column, recipe))
    assert manifest.save(tmp_path / "a.json") == OLD_DIGEST


@pytest.fixture
def manifest(english: Path, finnish: Path, french: Path) -> PartitionManifest:
    labels = ["en", "fi", "fr"]
    source = read_source(english, finnish, french, by="language", labels=labels)
    return PartitionManifest.of(source, split(source, Scheme.DIRICHLET))


def test_a_manifest_of_several_files_names_each_and_comes_back(
    manifest: PartitionManifest, english: Path, finnish: Path, french: Path, tmp_path: Path
) -> None:
    digest = manifest.save(tmp_path / "a.json")
    loaded = PartitionManifest.load(tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert document["version"] == 2
    assert document["column"] == "language"
    assert [file["n_records"] for file in document["sources"]] == [30, 20, 10]
    source = read_source(english, finnish, french, by=loaded.by, labels=loaded.labels)
    assert source.files == loaded.sources == manifest.sources
    PartitionManifest.load(tmp_path / "a.json", data=source.files)
    pairs = zip(loaded.partition.clients, manifest.partition.clients, strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert loaded.save(tmp_path / "a.json") == digest  # it replaces a manifest of version 2, too


def test_indices_count_over_all_files_in_order(english: Path, french: Path) -> None:
    source = read_source(english, french, by="file")
    chosen = selected(source.records, [29, 30, 39])
    assert [record.source for record in chosen] == ["en.jsonl:30", "fr.jsonl:1", "fr.jsonl:10"]


def test_files_in_another_order_or_number_are_refused(
    manifest: PartitionManifest, english: Path, finnish: Path, french: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    manifest.save(path)
    with pytest.raises(PartitionError, match=r"another order.*en\.jsonl, fi\.jsonl, fr\.jsonl"):
        PartitionManifest.load(path, data=read_source(finnish, english, french).files)
    with pytest.raises(PartitionError, match=r"counts in 3 files .* and 1 are given"):
        PartitionManifest.load(path, data=read_source(english).file)
    write_records(finnish, 20, category=lambda _: "c")
    with pytest.raises(PartitionError, match=r"'fi\.jsonl' with SHA-256 .* name other records"):
        PartitionManifest.load(path, data=read_source(english, finnish, french).files)


def test_the_same_file_with_another_number_of_usable_records_is_refused(
    manifest: PartitionManifest, tmp_path: Path
) -> None:
    manifest.save(tmp_path / "a.json")
    first, *others = manifest.sources
    fewer = first.model_copy(update={"n_records": 29})
    with pytest.raises(PartitionError, match=r"counts 30 usable records in 'en\.jsonl'.* are 29"):
        PartitionManifest.load(tmp_path / "a.json", data=[fewer, *others])


def drop_a_source(document: dict[str, Any]) -> None:
    del document["sources"][1]


def swap_two_sources(document: dict[str, Any]) -> None:
    document["sources"].reverse()


def relabel(document: dict[str, Any]) -> None:
    document["sources"][0]["label"] = "sv"


def rename_column(document: dict[str, Any]) -> None:
    document["column"] = "domain"


@pytest.mark.parametrize("change", [drop_a_source, swap_two_sources, relabel, rename_column])
def test_the_digest_covers_files_labels_and_column(
    manifest: PartitionManifest, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    path = tmp_path / "a.json"
    manifest.save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PartitionError, match="was changed after it was saved"):
        PartitionManifest.load(path)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, "manifest of version 3; this program reads 1 and 2"),
        (2, "manifest: column: Field required"),
    ],
)
def test_another_version_than_the_manifests_own_is_refused(
    tmp_path: Path, version: int, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(OLD_MANIFEST.replace('"version":1', f'"version":{version}'), encoding="utf-8")
    with pytest.raises(PartitionError, match=message):
        PartitionManifest.load(path)


def test_a_manifest_is_of_as_many_records_as_the_data(english: Path, french: Path) -> None:
    partition = split(read_source(english))
    with pytest.raises(PartitionError, match="a partition of 30 records for 40 of them"):
        PartitionManifest.of(read_source(english, french), partition)


# --- the command ------------------------------------------------------------------------------


def test_the_command_splits_files_by_their_languages(
    english: Path, finnish: Path, french: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.json"
    arguments = [
        *("partition", str(english), str(finnish), str(french), "--by", "language"),
        *("--labels", "en, fi,fr", "--scheme", "by-category", "--clients", "3"),
        *("--held-out", "1", "--out", str(out), "--json", "-"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["by"] == "language"
    assert found["categories"] == ["en", "fi", "fr"]
    assert [client["n_records"] for client in found["clients"]] == [29, 19, 9]
    assert [file["label"] for file in found["files"]] == ["en", "fi", "fr"]
    assert found["sha256"] is None
    assert PartitionManifest.load(out).labels == ("en", "fi", "fr")


def test_the_command_splits_by_file(english: Path, french: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    arguments = ["partition", str(english), str(french), "--by", "file", "--scheme", "dirichlet"]
    options = ["--clients", "2", "--held-out", "1", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert "dirichlet, by file" in result.output
    assert PartitionManifest.load(out, data=read_source(english, french).files).by == "file"


def test_the_command_refuses_a_column_that_is_not_there(english: Path, tmp_path: Path) -> None:
    arguments = ["partition", str(english), "--by", "language", "--out", str(tmp_path / "p.json")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, PartitionError)
    assert not (tmp_path / "p.json").exists()


# --- real files -------------------------------------------------------------------------------


def test_dolly_in_two_languages_and_french_chats_are_split_by_language(data_dir: Path) -> None:
    source = read_source(
        data_dir / "dolly" / "databricks-dolly-15k.shared.jsonl.xz",
        data_dir / "dolly-fi" / "dolly-15k-fi.shared.jsonl.xz",
        data_dir / "fr" / "oasst_20230412_fr_top1.jsonl.xz",
        data_dir / "fr" / "seed_tasks_vigogne.jsonl",
        by="language",
        labels=["en", "fi", "fr", "fr"],
    )
    assert source.n_malformed == 0
    assert Counter(source.column) == {"en": 13_461, "fi": 13_461, "fr": 431}
    _, counts = split(source, n_clients=6).counts(source.column)
    assert (counts > 0).sum(axis=1).tolist() == [1] * 6
    assert (counts > 0).sum(axis=0).tolist() == [2, 2, 2]


def test_a_real_files_own_field_is_a_column(data_dir: Path) -> None:
    source = read_source(data_dir / "mmlu" / "mmlu_test_1444.json.xz", by="class")
    assert len(set(source.column)) == 57
    assert len(source.column) == 1444
