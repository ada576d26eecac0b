"""The laboratory's commands, on runs that train no model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from edge_agent.errors import DataError
from simulations.cli import app
from simulations.cli_run import _Wishes
from simulations.errors import EngineError, ExperimentError, OutputError
from simulations.lab import run as lab_run
from simulations.lab.engines import Engine
from simulations.lab.experiment import EngineKind, Experiment
from simulations.lab.listening import Listener, Silent
from simulations.lab.records import RunCard, ScoreNote
from simulations.lab.run import Request, run


class BreaksOff(Silent):
    """A listener in which a run ends, right after its first release was measured."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def scored(self, notes: Sequence[ScoreNote]) -> None:
        raise self.error


@pytest.fixture
def lab(
    tmp_path: Path, small: Experiment, fake: Engine, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """A command with the small experiment; one of its runs may end in an error."""
    path = tmp_path / "small.toml"
    path.write_text(small.as_toml(), encoding="utf-8")
    monkeypatch.setattr("simulations.cli_run._Wishes.engine", lambda *_: fake)
    monkeypatch.setattr("simulations.cli_run._write_report", lambda _: None)  # takes seconds

    def go(*words: str, error: BaseException | None = None, at: int = 0) -> Result:
        asked: list[Request] = []

        def run_one(root: Path, request: Request, engine: Engine, told: Listener) -> RunCard:
            asked.append(request)
            ends = error is not None and len(asked) == at
            return run(root, request, engine, BreaksOff(error) if ends and error else told)

        monkeypatch.setattr(lab_run, "run", run_one)
        command, *others = words
        return CliRunner().invoke(
            app, [command, str(path), "--out", str(tmp_path / "out"), *others]
        )

    return go


SWEEP = ("sweep", "--seeds", "1,2", "--set", 'sweep={"federation.rank": [2, 4]}')


def test_a_sweep_that_ends_early_shows_what_there_is(
    lab: Callable[..., Result], tmp_path: Path
) -> None:
    found = lab(*SWEEP, error=EngineError("a worker died"), at=3)
    assert found.exit_code == 1
    assert isinstance(found.exception, EngineError)
    assert "Ended early: this is of 3 of 4 runs." in found.output
    rows = json.loads((tmp_path / "out" / "surface.json").read_text())["rows"]
    assert [(row["settings"]["federation.rank"], row["seeds"]) for row in rows] == [
        (2, [1, 2]),
        (4, [1]),
    ]
    assert [row["unfinished"] for row in rows] == [0, 1]
    for name in ("surface.md", "surface.csv", "surface.parquet", "surface.png"):
        assert (tmp_path / "out" / name).is_file()


def test_a_comparison_that_is_interrupted_shows_what_there_is(
    lab: Callable[..., Result], tmp_path: Path
) -> None:
    words = ("compare", "--seeds", "1", "--set", 'baselines.local=["smallest"]', "--json", "-")
    found = lab(*words, error=KeyboardInterrupt(), at=3)
    assert found.exit_code == 130  # Ctrl-C, as typer has it
    told = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert json.loads(found.stdout) == told
    assert told["labels"] == ["base", "local, smallest", "federated"]
    assert told["unfinished"] == ["federated, seed 1 (unfinished: 1 of 2 rounds)"]
    assert (tmp_path / "out" / "comparison.md").is_file()
    assert not (tmp_path / "out" / "comparison.png").exists()  # relative to what?


def test_what_there_is_is_shown_where_the_records_are_gone(
    lab: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records.jsonl"
    rows = [{"instruction": f"Why {n}?", "response": "So.", "category": "why"} for n in range(120)]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    words = (*SWEEP, "--set", f'data.source=["{path}"]', "--set", "data.scheme=iid")
    assert lab(*words, error=EngineError("a worker died"), at=3).exit_code == 1
    (tmp_path / "out" / "surface.json").unlink()

    def vanish(*_: object) -> None:
        path.unlink()

    with monkeypatch.context() as patched:
        patched.setattr("simulations.lab.series.check", vanish)
        gone = lab(*words)
    assert isinstance(gone.exception, DataError)
    assert "Already there: 2 of 4 runs." in gone.stderr
    assert "Ended early: this is of 3 of 4 runs." in gone.stderr
    assert (tmp_path / "out" / "surface.json").is_file()

    path.write_text("".join(lines[1:]))
    other = lab(*words)
    assert "rank-2/seed-1 holds another run" in str(other.exception)
    assert "Ended early" not in other.output


def test_a_series_with_nothing_to_show_ends_with_its_error_alone(
    lab: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "out" / "rank-2" / "seed-1").mkdir(parents=True)
    (tmp_path / "out" / "rank-2" / "seed-1" / "notes.txt").touch()
    found = lab(*SWEEP)
    assert isinstance(found.exception, OutputError)
    assert "is no run and not empty" in str(found.exception)
    assert not (tmp_path / "out" / "surface.json").exists()


def test_runs_of_another_experiment_are_not_shown_as_this_one_s(
    lab: Callable[..., Result], tmp_path: Path
) -> None:
    lab(*SWEEP, error=EngineError("a worker died"), at=1)
    (tmp_path / "out" / "surface.json").unlink()
    found = lab(*SWEEP, "--set", "federation.n_rounds=3")
    assert isinstance(found.exception, OutputError)
    assert "holds another run" in str(found.exception)
    assert not (tmp_path / "out" / "surface.json").exists()


def test_a_folder_of_another_run_is_refused_before_the_first_run(
    lab: Callable[..., Result], tmp_path: Path
) -> None:
    first = tmp_path / "out" / "rank-2" / "seed-1" / "journal.jsonl"
    assert lab(*SWEEP, "--set", "federation.n_rounds=1").exit_code == 0
    shutil.rmtree(first.parent)
    found = lab(*SWEEP)
    assert isinstance(found.exception, OutputError)
    assert "rank-2/seed-2 holds another run" in str(found.exception)
    assert not first.exists()  # it would have been run for hours, and the next one refused


def test_runs_of_another_population_are_not_shown_as_this_one_s(
    lab: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "volunteers.toml"
    device = '[[device]]\nname = "a"\nshare = 1\ntokens_per_s = {}\n'
    rates = "up_bytes_per_s = 1e6\ndown_bytes_per_s = 1e6\n"
    file.write_text("n_agents = 6\n" + device.format(1000) + rates)
    words = (*SWEEP, "--set", f"population.file={file}")
    assert lab(*words).exit_code == 0
    (tmp_path / "out" / "surface.json").unlink()
    file.write_text("n_agents = 6\n" + device.format(10) + rates)
    found = lab(*words)
    assert "holds another run" in str(found.exception)
    assert "Ended early" not in found.output
    assert not (tmp_path / "out" / "surface.json").exists()


@pytest.mark.parametrize(
    ("words", "kind", "workers"),
    [
        ({}, EngineKind.HERE, 1),
        ({"workers": 2}, EngineKind.PROCESSES, 2),
        ({"workers": 2, "ray": "local"}, EngineKind.RAY, 2),
        ({"workers": 2, "pairs": ["engine.kind=ray"]}, EngineKind.RAY, 2),
    ],
)
def test_more_workers_are_of_the_kind_that_was_asked_for(
    words: dict[str, Any], kind: EngineKind, workers: int
) -> None:
    nothing = dict.fromkeys(("pairs", "model", "data", "workers", "ray", "group", "device"))
    found = _Wishes(**{**nothing, **words}, real=False).experiment("fedit").engine
    assert (found.kind, found.workers) == (kind, workers)


def test_a_report_of_a_series_names_its_runs(lab: Callable[..., Result], tmp_path: Path) -> None:
    lab(*SWEEP, error=EngineError("a worker died"), at=2)
    found = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert isinstance(found.exception, OutputError)
    assert "a series of 2 runs" in str(found.exception)
    assert "(rank-2/seed-1, rank-2/seed-2)" in str(found.exception)
    one = CliRunner().invoke(app, ["report", str(tmp_path / "out" / "rank-2" / "seed-1")])
    assert one.exit_code == 0
    none = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert "holds no run" in str(none.exception)


def test_a_series_that_is_whole_is_not_run_again(
    lab: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab(*SWEEP).exit_code == 0
    first = (tmp_path / "out" / "surface.json").read_text()
    assert len(json.loads(first)["rows"]) == 2

    def no_engine(*_: object) -> Engine:  # on Ray it would be a cluster, for nothing
        raise AssertionError

    monkeypatch.setattr("simulations.cli_run._Wishes.engine", no_engine)
    again = lab(*SWEEP)
    assert again.exit_code == 0
    assert "round" not in again.stderr
    assert (tmp_path / "out" / "surface.json").read_text() == first


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fedti", "did you mean 'fedit'?"),
        ("dolly.tml", "did you mean 'dolly'?"),
        ("zzz", "name; Th"),
    ],
)
def test_an_experiment_that_there_is_not_gets_the_names_of_those_that_there_are(
    name: str, hint: str
) -> None:
    found = CliRunner().invoke(app, ["run", name, "--show"])
    assert isinstance(found.exception, ExperimentError)
    assert hint in str(found.exception)
    assert "dolly, fedit, flexlora, privacy" in str(found.exception)


def test_a_file_of_ones_own_goes_before_an_experiment_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "privacy").write_text('name = "mine"')
    (tmp_path / "fedit").mkdir()  # a folder is no experiment
    for name, said in (("privacy", 'name = "mine"'), ("fedit", 'name = "fedit"')):
        assert said in CliRunner().invoke(app, ["run", name, "--show"]).stdout


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["run", "fedit", "--show"]])
def test_what_trains_nothing_loads_no_torch(words: list[str]) -> None:
    """Which would take six seconds."""
    script = (
        "import sys; from simulations.cli import app; "
        f"app({words!r}, standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
