"""Data sets of the hub: which files are chosen, and that nothing else is asked for."""

from pathlib import Path

import pytest

from edge_agent.data.hub import HubListing, choose_files
from edge_agent.data.reading import read_records
from edge_agent.data.sources import HubSource
from edge_agent.errors import DataError

COMMIT = "c0ffee" * 6 + "1234"


class FakeHub:
    """A hub in a folder; remembers what it was asked for."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self._folder = folder
        self._files = files
        self.asked: list[tuple[str, ...]] = []

    def list_files(self, repo_id: str, revision: str | None) -> HubListing:
        self.asked.append(("list", repo_id, str(revision)))
        return HubListing(commit=COMMIT, files=tuple(self._files))

    def download(self, repo_id: str, commit: str, filename: str) -> Path:
        self.asked.append(("download", repo_id, commit, filename))
        path = self._folder / filename.replace("/", "_")
        path.write_text(self._files[filename])
        return path


def make_source(filename: str | None = None) -> HubSource:
    return HubSource(repo_id="a/b", revision="v1", filename=filename)


LINE = '{"instruction": "a", "response": "b"}\n'


def test_training_files_are_read_at_one_commit_and_located_by_data_set(tmp_path: Path) -> None:
    files = {
        "README.md": "",
        "b.py": "raise SystemExit",
        "data/train-00001.jsonl": LINE + "x\n",
        "data/train-00000.jsonl": LINE,
        "data/test-00000.jsonl": LINE,
        "dataset_infos.json": "{}",
    }
    hub = FakeHub(tmp_path, files)
    records, report = read_records("hub:a/b@v1", hub=hub)
    assert [r.source for r in records] == [
        "a/b/data/train-00000.jsonl:1",
        "a/b/data/train-00001.jsonl:1",
    ]
    assert report.source == "hub:a/b@v1"
    assert report.malformed[0].location == "a/b/data/train-00001.jsonl:2"
    assert hub.asked == [
        ("list", "a/b", "v1"),
        ("download", "a/b", COMMIT, "data/train-00000.jsonl"),
        ("download", "a/b", COMMIT, "data/train-00001.jsonl"),
    ]


def test_a_file_of_the_machine_asks_the_hub_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    hub = FakeHub(tmp_path, {})
    read_records(tmp_path / "a.jsonl", hub=hub)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (("databricks-dolly-15k.jsonl", "README.md", ".gitattributes"), 0),
        (("data/train-00000-of-00001-a09b.parquet", "dataset_infos.json"), 0),
        (("alpaca.json", "test.json", "config.json"), 0),
        (("main/train.jsonl.gz", "main/validation.jsonl.gz", "socratic/notes.txt"), 0),
        (("constraint_words.csv", "constraint_test.csv"), 0),
    ],
)
def test_the_obvious_file_is_chosen(files: tuple[str, ...], chosen: int) -> None:
    assert choose_files(make_source(), files) == (files[chosen],)


@pytest.mark.parametrize(
    "files",
    [
        ("one.jsonl", "two.jsonl"),
        ("train.jsonl", "train.csv"),
        ("test.jsonl",),
        ("README.md", "loader.py"),
        (),
    ],
)
def test_an_unclear_choice_is_refused_with_the_form_to_write(files: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"name one as hub:a/b:FILE\. There are "):
        choose_files(make_source(), files)


def test_a_long_listing_is_cut() -> None:
    files = tuple(f"{index:02}.jsonl" for index in range(40))
    with pytest.raises(DataError, match=r"09\.jsonl and 30 more"):
        choose_files(make_source(), files)


def test_a_named_file_is_chosen_whatever_its_name() -> None:
    assert choose_files(make_source("test.jsonl"), ("test.jsonl", "train.jsonl")) == ("test.jsonl",)


def test_a_named_file_that_is_not_there_or_unreadable_is_refused() -> None:
    with pytest.raises(DataError, match=r"hub:a/b@v1:x\.jsonl: there is no such file"):
        choose_files(make_source("x.jsonl"), ("y.jsonl",))
    with pytest.raises(DataError, match=r"loader\.py: unknown ending"):
        choose_files(make_source("loader.py"), ("loader.py",))
