"""The journal as Parquet and CSV."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from simulations.errors import OutputError
from simulations.lab.records import Fate, RoundNote, ScoreNote, VisitNote
from simulations.lab.report.history import History
from simulations.lab.report.tables import export_tables

NAMES = ("rounds", "visits", "scores", "fates")


def read(root: Path, name: str) -> pa.Table:
    return parquet.read_table(root / "tables" / f"{name}.parquet")


def test_all_tables_are_written_as_parquet_and_csv(finished_run: Path) -> None:
    written = export_tables(finished_run)
    expected = {f"{name}.{ending}" for name in NAMES for ending in ("parquet", "csv")}
    assert {path.name for path in written} == expected
    assert {path.name for path in (finished_run / "tables").iterdir()} == expected


@pytest.mark.parametrize(("name", "kind"), [("visits", VisitNote), ("scores", ScoreNote)])
def test_what_is_read_back_equals_the_notes(finished_run: Path, name: str, kind: Any) -> None:
    export_tables(finished_run)
    rows = [kind(**row) for row in read(finished_run, name).to_pylist()]
    assert tuple(rows) == getattr(History.read(finished_run), name)


def test_a_round_read_back_equals_its_note_and_its_fates(finished_run: Path) -> None:
    export_tables(finished_run)
    fates: dict[int, dict[int, str]] = {}
    for row in read(finished_run, "fates").to_pylist():
        fates.setdefault(row["round"], {})[row["agent"]] = row["fate"]
    rounds = []
    for row in read(finished_run, "rounds").to_pylist():
        counts = {name: row.pop(name) for name in list(row) if name not in RoundNote.model_fields}
        found = fates[row["number"]]
        assert counts.pop("n_selected") == len(found)
        for fate in Fate:
            n_found = list(found.values()).count(fate.value)
            assert counts.pop(f"n_{fate.value.replace('-', '_')}") == n_found
        assert not counts
        rounds.append(RoundNote(**row, fates=found))
    assert tuple(rounds) == History.read(finished_run).rounds


def test_a_csv_says_the_same(finished_run: Path) -> None:
    export_tables(finished_run)
    with (finished_run / "tables" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    notes = History.read(finished_run).scores
    assert [float(row["score"]) for row in rows] == [note.score for note in notes]
    assert [row["category"] for row in rows] == [note.category for note in notes]


@pytest.mark.parametrize("name", NAMES)
def test_columns_and_types_do_not_depend_on_the_notes(
    finished_run: Path, make_run: Callable[..., Path], name: str
) -> None:
    empty = make_run("empty", [])
    export_tables(finished_run)
    export_tables(empty)
    assert read(empty, name).num_rows == 0
    assert read(empty, name).schema.equals(read(finished_run, name).schema)


def test_a_column_without_values_keeps_its_type(finished_run: Path) -> None:
    export_tables(finished_run)
    table = read(finished_run, "rounds")
    assert table.schema.field("duration_s").type == pa.float64()
    assert table.column("duration_s").null_count == 3
    assert table.schema.field("failure").type == pa.string()
    assert table.schema.field("release").type == pa.int64()
    assert table.column("release").to_pylist() == [1, None, 2]
    assert table.column_names[:3] == ["number", "release", "n_cells"]


def test_parquet_is_compressed_and_names_its_run(finished_run: Path) -> None:
    export_tables(finished_run)
    file = parquet.ParquetFile(finished_run / "tables" / "visits.parquet")
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert json.loads(file.schema_arrow.metadata[b"run"])["experiment"] == "paper"


def test_tables_are_replaced_and_leave_nothing_beside(
    make_run: Callable[..., Path], make_round: Callable[..., Any]
) -> None:
    from simulations.lab.folder import RunFolder

    root = make_run("grows", [make_round(1)])
    export_tables(root)
    with RunFolder(root) as folder:
        folder.append([make_round(2)])
    export_tables(root)
    assert read(root, "rounds").column("number").to_pylist() == [1, 2]
    assert not list((root / "tables").glob("*.part"))


def test_text_of_records_comes_through_a_csv(
    make_run: Callable[..., Path], make_scores: Callable[..., Any]
) -> None:
    name = 'a "b", c\nd'
    root = make_run("odd", make_scores(0, {name: 1.0}))
    export_tables(root)
    with (root / "tables" / "scores.csv").open(newline="") as file:
        assert [row["category"] for row in csv.DictReader(file)] == [name]


def test_a_folder_that_cannot_be_written_is_named(finished_run: Path) -> None:
    (finished_run / "tables").write_text("a file where the folder belongs")
    with pytest.raises(OutputError, match=r"cannot write .*tables"):
        export_tables(finished_run)
