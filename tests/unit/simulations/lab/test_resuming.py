"""A run that is killed, at every moment that there is, and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulations.errors import OutputError, SimulationError
from simulations.lab.engines import Engine
from simulations.lab.experiment import Experiment
from simulations.lab.folder import RunFolder, read_notes, read_vector
from simulations.lab.records import Arm, EndNote, Note, ScoreNote, VisitNote
from simulations.lab.report.history import History
from simulations.lab.run import Request, run

CHEAP: dict[str, object] = {
    "federation__cohort": 4,
    "federation__optimizer": "fedadam",
    "evaluation__answers": 0,
    "evaluation__every": 1,
    "federation__rank": 1,
    "federation__target_modules": ["q_proj"],
}
"""Two rounds with every kind of file: updates, releases, an optimiser's state, scores."""


@dataclass
class PowerCut:
    """Kills a run at its n-th write, which is left half done, or not begun.

    Attributes:
        at: n, from 1.
        half: Whether something of the write is there.
        n_writes: So far.
    """

    kill_error: type[Exception]
    at: int = 0
    half: bool = False
    n_writes: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand before everything by which a run is written down."""
        for name, half in (
            ("append", _half_of_notes),
            ("write", _half_of_file),
            ("write_vector", _half_of_file),
            ("tidy", _half_tidied),
        ):
            monkeypatch.setattr(RunFolder, name, self._cut(getattr(RunFolder, name), half))

    def _cut(self, real: Callable[..., None], half: Callable[..., None]) -> Callable[..., None]:
        def cut(folder: RunFolder, *args: Any, **kwargs: Any) -> None:
            self.n_writes += 1
            if self.n_writes == self.at:
                if self.half:
                    half(folder, *args, **kwargs)
                raise self.kill_error
            real(folder, *args, **kwargs)

        return cut

    def arm(self, at: int, *, half: bool) -> None:
        self.at, self.half, self.n_writes = at, half, 0


def _half_of_notes(folder: RunFolder, notes: Sequence[Note]) -> None:
    data = b"".join(note.model_dump_json().encode() + b"\n" for note in notes)
    assert folder._journal is not None
    os.write(folder._journal, data[: (2 * len(data)) // 3])


def _half_of_file(folder: RunFolder, path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".part").write_bytes(b"half")


def _half_tidied(folder: RunFolder, round_number: int, release: int) -> None:
    shutil.rmtree(folder.update(round_number, 0).parent, ignore_errors=True)


def assert_equal(found: Any, whole: Any) -> None:
    """The same releases, bit for bit, every note, and every file that is to stay."""
    assert found.digests == whole.digests
    assert set(found.notes) == set(whole.notes)
    for name in ("releases/0002.npy", "adapter/adapter_model.safetensors", "experiment.toml"):
        assert (found.root / name).read_bytes() == (whole.root / name).read_bytes(), name


def assert_made_again(found: Any, whole: Any) -> None:
    """The same in the end, where rounds were made twice."""
    assert {note.number: note.release_sha256 for note in found.rounds} == {
        note.number: note.release_sha256 for note in whole.rounds
    }
    assert len(found.rounds) > len(whole.rounds)
    assert set(found.notes) == set(whole.notes)
    last = f"releases/{len(whole.rounds):04d}.npy"
    for name in (last, "adapter/adapter_model.safetensors"):
        assert (found.root / name).read_bytes() == (whole.root / name).read_bytes(), name


@pytest.mark.parametrize("half", [False, True], ids=["before-a-write", "in-a-write"])
@pytest.mark.parametrize("group", [1, 2])
def test_guarantee_1_a_run_that_is_killed_at_any_write_goes_on_and_ends_the_same(
    go: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    kill_error: type[Exception],
    tmp_path: Path,
    group: int,
    half: bool,
) -> None:
    values = CHEAP | {"engine__group": group}
    whole = go(**values)
    cut = PowerCut(kill_error)
    cut.install(monkeypatch)
    n_kills = 0
    while True:
        root = tmp_path / f"killed-{n_kills}"
        cut.arm(n_kills + 1, half=half)
        try:
            go(root=root, **values)
        except kill_error:
            n_kills += 1
        else:
            break
        cut.arm(0, half=False)
        found = go(root=root, **values)
        assert_equal(found, whole)
        if not half:
            assert found.notes == whole.notes, n_kills  # and none is there twice
    assert n_kills >= 20


def test_guarantee_1_however_often_it_is_killed(
    go: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    kill_error: type[Exception],
    tmp_path: Path,
) -> None:
    values = CHEAP | {"engine__group": 2}
    whole, root = go(**values), tmp_path / "killed"
    cut = PowerCut(kill_error)
    cut.install(monkeypatch)
    rng = np.random.default_rng(1)
    n_kills = 0
    while True:
        cut.arm(int(rng.integers(1, 7)), half=bool(rng.integers(2)))
        try:
            found = go(root=root, **values)
        except kill_error:
            n_kills += 1
        else:
            break
    assert n_kills >= 5
    assert_equal(found, whole)
    history = History.read(root)
    assert history.state == "finished"
    assert len(history.visits) == len(whole.of(VisitNote))


def test_a_group_of_which_half_a_line_is_lost_is_trained_again_as_a_whole(
    go: Callable[..., Any], make_told: Callable[..., Any], kill_error: type[Exception], fake: Any
) -> None:
    """Its floats depend on all its members: one trained alone would come out otherwise."""
    values = CHEAP | {"engine__group": 2}
    whole = go(**values)
    root = whole.root.with_name("cut")
    with pytest.raises(kill_error):
        go(root=root, listener=make_told(kill_at=("visited", 2)), **values)
    journal = root / "journal.jsonl"
    first, _second = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + b'{"kind":"visit","rou')
    fake.trained.clear()
    found = go(root=root, **values)
    assert [number for number, _ in fake.trained] == [1] * 4 + [2] * 4
    assert_equal(found, whole)


def test_what_a_sitting_finds_it_does_not_train_again(
    go: Callable[..., Any], make_told: Callable[..., Any], kill_error: type[Exception], fake: Any
) -> None:
    whole = go(**CHEAP)
    planned = list(fake.trained)
    root = whole.root.with_name("cut")
    fake.trained.clear()
    with pytest.raises(kill_error):
        go(root=root, listener=make_told(kill_at=("visited", 6)), **CHEAP)
    assert fake.trained == planned[:6]  # one at a time, kept before the next begins
    fake.trained.clear()
    told = make_told()
    found = go(root=root, listener=told, **CHEAP)
    assert fake.trained == planned[6:]
    assert told.n_done == 1
    assert found.notes == whole.notes


@pytest.mark.parametrize("kill_at", [("visited", 5), ("closed", 1), ("scored", 2)])
def test_guarantee_1_a_trained_run_that_is_killed_goes_on_bit_for_bit(
    here: Engine,
    whole: Path,
    go: Callable[..., Any],
    outcome: Callable[[Path], Any],
    make_told: Callable[..., Any],
    kill_error: type[Exception],
    kill_at: tuple[str, int],
    tmp_path: Path,
) -> None:
    with pytest.raises(kill_error):
        go(engine=here, root=tmp_path / "run", listener=make_told(kill_at=kill_at))
    assert_equal(go(engine=here, root=tmp_path / "run"), outcome(whole))


_VICTIM = """
import os, signal, sys
from pathlib import Path
from simulations.lab.engines import Here
from simulations.lab.experiment import load_experiment
from simulations.lab.listening import Silent
from simulations.lab.run import Request, run

class Killer(Silent):
    n_visits = 0
    def visited(self, note):
        self.n_visits += 1
        if note.round == 2 and self.n_visits == 5:
            os.kill(os.getpid(), signal.SIGKILL)

root, experiment = map(Path, sys.argv[1:])
run(root, Request(experiment=load_experiment(experiment)), Here(), Killer())
"""


def test_guarantee_1_after_kill_9_in_the_midst_of_a_round_another_process_goes_on(
    tmp_path: Path, small: Experiment, here: Engine, whole: Path, outcome: Callable[[Path], Any]
) -> None:
    (tmp_path / "small.toml").write_text(small.as_toml())
    killed = subprocess.run(
        [sys.executable, "-c", _VICTIM, tmp_path / "run", tmp_path / "small.toml"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cut = outcome(tmp_path / "run")
    assert len(cut.of(VisitNote)) == 5
    assert len(cut.rounds) == 1
    run(tmp_path / "run", Request(experiment=small), here)
    assert_equal(cut, outcome(whole))


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"federation__lora_rule": "rolora"}, id="rolora"),
        pytest.param({"federation__lora_rule": "flexlora"}, id="flexlora"),
        pytest.param({"federation__optimizer": "fedadam"}, id="fedadam"),
        pytest.param({"federation__optimizer": "fedavgm"}, id="fedavgm"),
        pytest.param(
            {
                "federation__epsilon": 50,
                "federation__profile": "P3",
                "federation__adaptive_clip": True,
            },
            id="adaptive-clip",
        ),
        pytest.param({"attack__name": "replay"}, id="attack-that-remembers"),
        pytest.param({"population__drop_out": 0.3, "federation__min_cohort": 1}, id="drop-out"),
        pytest.param(
            {
                "federation__masking": "cells",
                "federation__cohort": 6,
                "population__vanish": 0.1,
            },
            id="masked",
        ),
    ],
)
def test_guarantee_1_holds_whatever_a_round_hands_on_to_the_next(
    go: Callable[..., Any],
    make_told: Callable[..., Any],
    kill_error: type[Exception],
    values: dict[str, object],
) -> None:
    """An optimiser's state, a clip norm, the turn of a factor, the releases before."""
    values = CHEAP | {"federation__n_rounds": 4, "federation__optimizer": "fedavg"} | values
    whole = go(**values)
    assert len(set(whole.digests)) >= 4
    for count in (1, 2, 3):
        root = whole.root.with_name(f"killed-{count}")
        with pytest.raises(kill_error):
            go(root=root, listener=make_told(kill_at=("closed", count)), **values)
        found = go(root=root, **values)
        assert found.digests == whole.digests
        assert found.notes == whole.notes


def test_scores_that_a_killed_sitting_did_not_get_to_are_made_by_the_next(
    go: Callable[..., Any], make_told: Callable[..., Any], kill_error: type[Exception]
) -> None:
    whole = go()
    for kind, count in (("closed", 1), ("closed", 2), ("scored", 1)):
        root = whole.root.with_name(f"{kind}-{count}")
        with pytest.raises(kill_error):
            go(root=root, listener=make_told(kill_at=(kind, count)))
        found = go(root=root)
        assert {note.release for note in found.of(ScoreNote)} == {0, 2}
        assert found.notes == whole.notes


def test_guarantee_2_a_run_that_ended_is_not_handed_out_for_other_records_or_agents(
    go: Callable[..., Any], tmp_path: Path
) -> None:
    records, population = tmp_path / "records.jsonl", tmp_path / "population.toml"

    def write(answer: str, speed: int) -> None:
        rows = (
            {"instruction": f"Q {n}?", "response": answer, "category": f"kind {n % 4}"}
            for n in range(120)
        )
        records.write_text("".join(json.dumps(row) + "\n" for row in rows))
        population.write_text(
            f'n_agents = 1\n[[device]]\nname = "any"\nshare = 1\ntokens_per_s = {speed}\n'
            "up_bytes_per_s = 1e6\ndown_bytes_per_s = 1e6\n"
        )

    values = {
        "data__source": [str(records)],
        "data__per_category": None,
        "population__file": str(population),
    }
    write("yes", 10)
    root = go(**values).root
    assert go(root=root, **values).root == root
    for changed in (("no", 10), ("yes", 20)):
        write(*changed)
        with pytest.raises(OutputError, match="holds another run: "):
            go(root=root, **values)


def test_another_population_is_another_run(
    go: Callable[..., Any],
    make_told: Callable[..., Any],
    kill_error: type[Exception],
    tmp_path: Path,
) -> None:
    population, root = tmp_path / "population.toml", tmp_path / "cut"
    device = (
        'n_agents = 1\n[[device]]\nname = "any"\nshare = 1\ntokens_per_s = {}\n'
        "up_bytes_per_s = 1e6\ndown_bytes_per_s = 1e6\n"
    )
    population.write_text(device.format(10))
    with pytest.raises(kill_error):
        go(
            root=root,
            listener=make_told(kill_at=("closed", 1)),
            population__file=str(population),
        )
    population.write_text(device.format(20))
    with pytest.raises(OutputError, match="another run: its population_sha256 is"):
        go(root=root, population__file=str(population))


def test_guarantee_2_a_run_that_ended_is_not_touched(
    go: Callable[..., Any], fake: Any, make_told: Callable[..., Any]
) -> None:
    found = go()
    before = {path: path.read_bytes() for path in found.root.rglob("*") if path.is_file()}
    fake.trained.clear()
    told = make_told()
    card = go(root=found.root, listener=told).root
    assert {path: path.read_bytes() for path in card.rglob("*") if path.is_file()} == before
    assert not fake.trained
    assert not told.stages


@pytest.mark.parametrize("other", [{"seed": 2}, {"federation__rank": 4}])
def test_guarantee_2_a_run_that_ended_is_taken_for_no_other(
    go: Callable[..., Any], other: dict[str, Any]
) -> None:
    root = go().root
    with pytest.raises(OutputError, match="holds another run: "):
        go(root=root, **other)


def _changed(path: Path) -> None:
    vector = read_vector(path)
    vector[7] += 1e-6
    np.save(path, vector)


@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
@pytest.mark.parametrize(
    "damage",
    [
        _changed,
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(b""),
    ],
    ids=["changed", "gone", "half", "zeros", "empty"],
)
def test_guarantee_1_a_release_that_does_not_lie_there_whole_is_made_again(
    go: Callable[..., Any],
    make_told: Callable[..., Any],
    kill_error: type[Exception],
    damage: Callable[[Path], object],
    optimizer: str,
) -> None:
    """As a power cut leaves it: the journal speaks of a file that never reached the disk."""
    values = {"federation__n_rounds": 5, "federation__optimizer": optimizer}
    whole = go(**values)
    root = whole.root.with_name("cut")
    with pytest.raises(kill_error):
        go(root=root, listener=make_told(kill_at=("closed", 4)), **values)
    damage(root / "releases" / "0004.npy")
    assert_made_again(go(root=root, **values), whole)


def test_guarantee_1_a_server_optimiser_s_state_that_is_gone_takes_its_release_with_it(
    go: Callable[..., Any], make_told: Callable[..., Any], kill_error: type[Exception]
) -> None:
    values = {"federation__n_rounds": 4, "federation__optimizer": "fedadam"}
    whole = go(**values)
    root = whole.root.with_name("cut")
    with pytest.raises(kill_error):
        go(root=root, listener=make_told(kill_at=("closed", 3)), **values)
    (root / "state" / "optimizer-0003.bin").unlink()
    assert_made_again(go(root=root, **values), whole)


@pytest.mark.parametrize("gone", ["0004.npy", "*.npy"])
def test_guarantee_1_attackers_find_what_they_know_of_the_round_before(
    go: Callable[..., Any], make_told: Callable[..., Any], kill_error: type[Exception], gone: str
) -> None:
    values = {"federation__n_rounds": 5, "attack__name": "replay", "attack__share": 0.4}
    whole = go(**values)
    root = whole.root.with_name("cut")
    with pytest.raises(kill_error):
        go(root=root, listener=make_told(kill_at=("closed", 4)), **values)
    for path in (root / "releases").glob(gone):
        path.unlink()
    assert_made_again(go(root=root, **values), whole)


def test_a_kept_update_that_does_not_lie_there_whole_is_trained_again(
    go: Callable[..., Any], make_told: Callable[..., Any], kill_error: type[Exception], fake: Any
) -> None:
    whole = go(**CHEAP)
    root = whole.root.with_name("cut")
    with pytest.raises(kill_error):
        go(root=root, listener=make_told(kill_at=("visited", 2)), **CHEAP)
    first, second = sorted((root / "state" / "round-0001").iterdir())
    first.write_bytes(b"")
    _changed(second)
    fake.trained.clear()
    assert_equal(go(root=root, **CHEAP), whole)
    assert {agent for number, agent in fake.trained if number == 1} >= {
        int(first.stem),
        int(second.stem),
    }


def test_an_update_that_took_no_time_is_made_again_and_not_kept(
    go: Callable[..., Any], make_told: Callable[..., Any], kill_error: type[Exception], fake: Any
) -> None:
    fake.train_s = 0.01
    whole = go(**CHEAP)
    root = whole.root.with_name("cut")
    with pytest.raises(kill_error):
        go(root=root, listener=make_told(kill_at=("visited", 6)), **CHEAP)
    assert not list((root / "state").rglob("*.npy"))
    fake.trained.clear()
    found = go(root=root, **CHEAP)
    assert [number for number, _ in fake.trained] == [2] * 4
    assert_equal(found, whole)


def test_an_update_that_is_gone_is_trained_again(
    go: Callable[..., Any], make_told: Callable[..., Any], kill_error: type[Exception], fake: Any
) -> None:
    whole = go(**CHEAP)
    root = whole.root.with_name("cut")
    with pytest.raises(kill_error):
        go(root=root, listener=make_told(kill_at=("visited", 2)), **CHEAP)
    gone, kept = (note.agent for note in read_notes(root) if isinstance(note, VisitNote))
    (root / "state" / "round-0001" / f"{gone}.npy").unlink()
    fake.trained.clear()
    found = go(root=root, **CHEAP)
    assert (1, gone) in fake.trained
    assert (1, kept) not in fake.trained
    assert_equal(found, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"federation__learning_rate": 1e-3}, "experiment_sha256"),
        ({"data__held_out": 3}, "experiment_sha256"),
        ({"arm": Arm.CENTRALISED}, "arm"),
    ],
)
def test_another_run_is_refused_by_the_name_of_what_differs(
    go: Callable[..., Any], change: dict[str, object], named: str, outcome: Callable[[Path], Any]
) -> None:
    root = go().root
    with (root / "journal.jsonl").open("r+b") as journal:  # an unfinished one
        lines = journal.read().splitlines(keepends=True)
        journal.truncate(len(b"".join(lines[:-1])))
    assert not outcome(root).of(EndNote)
    before = (root / "journal.jsonl").read_bytes()
    with pytest.raises(SimulationError, match=f"holds another run: its {named} is"):
        go(root=root, **change)
    assert (root / "journal.jsonl").read_bytes() == before


def test_group_size_and_beginning_stay_those_of_the_first_sitting(
    go: Callable[..., Any], make_told: Callable[..., Any], kill_error: type[Exception]
) -> None:
    """Another group size would round otherwise, and the time of a later sitting is not it."""
    whole = go(**CHEAP, engine__group=2)
    root = whole.root.with_name("cut")
    with pytest.raises(kill_error):
        go(root=root, listener=make_told(kill_at=("closed", 1)), **CHEAP, engine__group=2)
    card = (root / "run.json").read_bytes()
    found = go(root=root, **CHEAP, engine__group=4, engine__kind="processes", engine__workers=3)
    assert found.digests == whole.digests
    assert (root / "run.json").read_bytes() == card
