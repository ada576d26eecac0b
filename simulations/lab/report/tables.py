"""The journal as tables: Parquet for programs, CSV for people.

A column is a field of a note, in the order of its class, so that the tables of two versions differ
only where the notes do. A column without any value keeps its type.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, get_args

from pydantic import BaseModel

from simulations.lab.folder import RunFolder
from simulations.lab.records import Fate, Note, RoundNote, ScoreNote, VisitNote
from simulations.lab.report.history import History

if TYPE_CHECKING:
    import pyarrow as pa

_NOT_COLUMNS: Final = {"kind", "fates"}
_FATES: Final = (("round", int), ("agent", int), ("fate", str))
_CARD_KEY: Final = "run"


def export_tables(root: Path) -> tuple[Path, ...]:
    """Write the tables of a run: `rounds`, `visits`, `scores`, `fates`.

    Guarantees:
        1. Every note stands in its table once, with all its numbers as they were noted.
        2. Names, order and types of the columns do not depend on the notes.
        3. A table appears when it is whole, in the place of the older one.

    Beside its own fields, a round has `n_selected` and one count for each fate. The Parquet
    files carry the run's card as JSON in their metadata, under `run`.

    Args:
        root: The run's folder; the tables go into `tables/`.

    Returns:
        What was written: Parquet and CSV of each.

    Raises:
        OutputError: There is no run, or the tables cannot be written.
    """
    history = History.read(root)
    folder = RunFolder(root)
    card = {_CARD_KEY: history.card.model_dump_json()}
    written: list[Path] = []
    for name, table in make_tables(history).items():
        written += write_table(folder, folder.tables / name, table.replace_schema_metadata(card))
    return tuple(written)


def make_tables(history: History) -> Mapping[str, "pa.Table"]:
    """The tables in memory.

    Args:
        history: The run.
    """
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    rounds = _table(RoundNote, history.rounds)
    counts = [
        ("n_selected", [len(note.fates) for note in history.rounds]),
        *(
            (
                f"n_{fate.value.replace('-', '_')}",
                [list(note.fates.values()).count(fate) for note in history.rounds],
            )
            for fate in Fate
        ),
    ]
    for name, values in counts:
        rounds = rounds.append_column(name, pa.array(values, pa.int64()))
    rows = [(note.number, agent, fate.value) for note, agent, fate in history.fates()]
    columns = list(zip(*rows, strict=True)) or [()] * len(_FATES)
    fates = {
        name: pa.array(values, _arrow_type(kind))
        for (name, kind), values in zip(_FATES, columns, strict=True)
    }
    return {
        "rounds": rounds,
        "visits": _table(VisitNote, history.visits),
        "scores": _table(ScoreNote, history.scores),
        "fates": pa.table(fates),
    }


def write_table(folder: RunFolder, path: Path, table: "pa.Table") -> tuple[Path, Path]:
    """Write a table twice, each file whole or not at all.

    Args:
        folder: Whose writing is used.
        path: Without an ending.
        table: What to write.

    Returns:
        The Parquet and the CSV file.

    Raises:
        OutputError: They cannot be written.
    """
    from pyarrow import csv, parquet  # noqa: PLC0415 - slow to import

    found = (path.with_name(path.name + ".parquet"), path.with_name(path.name + ".csv"))
    as_parquet, as_csv = io.BytesIO(), io.BytesIO()
    parquet.write_table(table, as_parquet, compression="zstd")
    csv.write_csv(table, as_csv)
    folder.write(found[0], as_parquet.getvalue())
    folder.write(found[1], as_csv.getvalue())
    return found


def _table(kind: type[Note], notes: Sequence[Note]) -> "pa.Table":
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    dumped = [note.model_dump(mode="json") for note in notes]
    return pa.table(
        {
            name: pa.array([row[name] for row in dumped], _arrow_type(annotation))
            for name, annotation in _columns(kind).items()
        }
    )


def _columns(kind: type[BaseModel]) -> dict[str, Any]:
    return {
        name: field.annotation
        for name, field in kind.model_fields.items()
        if name not in _NOT_COLUMNS
    }


def _arrow_type(annotation: Any) -> "pa.DataType":  # noqa: ANN401 - what a field is annotated with
    """Of an integer, a number or a text; every column may lack values."""
    import pyarrow as pa  # noqa: PLC0415 - slow to import

    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    types = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
    (kind,) = kinds
    return next(types[base] for base in kind.__mro__ if base in types)
