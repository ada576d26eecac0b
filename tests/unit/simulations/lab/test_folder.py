"""The folder of a run: whole lines, whole files, one process, one run."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulations.errors import OutputError
from simulations.lab.folder import RunFolder, read_card, read_notes, read_vector
from simulations.lab.records import Arm, EndNote, RunCard, ScoreNote


def make_card(**changes: Any) -> RunCard:
    values = {
        "experiment": "small",
        "arm": Arm.FEDERATED,
        "client": None,
        "seed": 1,
        "experiment_sha256": "11" * 32,
        "manifest_sha256": "22" * 32,
        "base_fingerprint": "33" * 32,
        "data_sha256": "44" * 32,
        "n_clients": 6,
        "n_held_out": 40,
        "n_repeated": 0,
        "n_values": 100,
        "cohort": 3,
        "n_rounds": 2,
        "engine": "this process",
        "group_size": 1,
        "cryptography": None,
        "profile": "P0",
        "guarantee": "none",
        "versions": {"torch": "2.13.0"},
        "machine": "a processor",
        "began_at": 1_800_000_000.0,
    }
    return RunCard(**{**values, **changes})


def a_score(release: int) -> ScoreNote:
    return ScoreNote(release=release, measure="loss", category="a", score=1.5, n_examples=2)


def test_guarantee_1_notes_come_back_as_they_were_appended(tmp_path: Path) -> None:
    notes = [a_score(0), a_score(1), EndNote(wall_s=1.0)]
    with RunFolder(tmp_path / "run") as folder:
        folder.append(notes[:2])
        assert folder.notes() == notes[:2]
    with RunFolder(tmp_path / "run") as folder:
        folder.append(notes[2:])
        folder.append([])
    assert list(read_notes(tmp_path / "run")) == notes


def test_guarantee_1_a_note_that_was_appended_is_there_after_kill_9(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from simulations.lab.folder import RunFolder
from simulations.lab.records import EndNote
with RunFolder(Path(sys.argv[1])) as folder:
    folder.append([EndNote(wall_s=7.0)])
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "run"], check=False)
    assert list(read_notes(tmp_path / "run")) == [EndNote(wall_s=7.0)]
    with RunFolder(tmp_path / "run"):  # and its lock died with it
        pass


@pytest.mark.parametrize("half", [b"{", b'{"kind":"end","wall_s":1.0}', b"\xff\xfe", b"  "])
def test_guarantee_1_half_a_line_is_dropped_by_the_next_sitting(
    tmp_path: Path, half: bytes
) -> None:
    root = tmp_path / "run"
    with RunFolder(root) as folder:
        folder.append([a_score(0)])
    journal = root / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + half)
    assert list(read_notes(root)) == [a_score(0)]
    with RunFolder(root) as folder:
        assert journal.read_bytes() == whole
        folder.append([a_score(1)])
    assert list(read_notes(root)) == [a_score(0), a_score(1)]


def test_a_journal_of_nothing_but_half_a_line_is_empty(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b'{"kind":')
    with RunFolder(tmp_path) as folder:
        assert folder.notes() == []
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_a_line_that_is_no_note_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.append([a_score(0)])
    journal = tmp_path / "run" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"kind":"score"}\n')
    with pytest.raises(OutputError, match=r"journal.jsonl, line 2 is no note of a run"):
        list(read_notes(tmp_path / "run"))


def test_guarantee_2_a_second_process_is_refused(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from simulations.errors import OutputError
from simulations.lab.folder import RunFolder
try:
    RunFolder(Path(sys.argv[1])).__enter__()
except OutputError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with RunFolder(tmp_path / "run"):
        refused = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"another process works in {tmp_path / 'run'}; wait for it" in refused.stdout
    free = subprocess.run(command, check=True, capture_output=True, text=True)
    assert free.stdout == ""


def test_guarantee_2_a_second_opening_in_this_process_is_refused(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run"),
        pytest.raises(OutputError, match="another process works in"),
    ):
        RunFolder(tmp_path / "run").__enter__()
    with RunFolder(tmp_path / "run"):
        pass


def test_a_run_is_begun_once_and_found_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    assert not RunFolder(root).is_begun
    with RunFolder(root) as folder:
        assert folder.open_card(make_card(), experiment='name = "small"\n') is False
        assert folder.is_begun
    with RunFolder(root) as folder:
        assert folder.open_card(make_card(), experiment="# a later one\n") is True
    assert read_card(root) == make_card()
    assert folder.experiment.read_text() == 'name = "small"\n'


def test_another_engine_may_go_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.open_card(make_card(), experiment="")
        assert folder.open_card(make_card(engine="8 processes"), experiment="") is True
    assert read_card(tmp_path / "run").engine == "this process"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("seed", 2, "its seed is 1, here it is 2"),
        ("group_size", 4, "its group_size is 1, here it is 4"),
        ("manifest_sha256", "ab" * 32, "its manifest_sha256 is 2222222222222222…, here it is abab"),
        ("arm", Arm.BASE, "its arm is federated, here it is base"),
        ("versions", {"torch": "2.14.0"}, "its versions is"),
        ("machine", "another", "its machine is a processor, here it is another"),
    ],
)
def test_another_run_is_refused_by_the_name_of_what_differs(
    tmp_path: Path, field: str, value: object, said: str
) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.open_card(make_card(), experiment="")
        with pytest.raises(OutputError, match=said):
            folder.open_card(make_card(**{field: value}), experiment="")
    assert read_card(tmp_path / "run") == make_card()


@pytest.mark.parametrize("name", ["thesis.docx", "experiment.toml", "run.json.bak"])
def test_a_foreign_folder_is_refused_and_left_as_it_was(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    refused = pytest.raises(OutputError, match=f"is no run and not empty .{name} is there")
    with refused, RunFolder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_card_of_another_version_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.open_card(make_card(), experiment="")
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(OutputError, match="no card of a run that this version knows"):
        read_card(tmp_path / "run")
    with pytest.raises(OutputError, match=r"holds no run: cannot read run.json"):
        read_card(tmp_path)
    with pytest.raises(OutputError, match=r"holds no run: cannot read journal.jsonl"):
        list(read_notes(tmp_path))


def test_a_file_appears_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    path = tmp_path / "run" / "deep" / "file.bin"
    folder.write(path, b"first")
    assert path.read_bytes() == b"first"

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    vector = np.arange(3, dtype=np.float32)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"cannot write .*file.bin: No space left on device"):
        folder.write(path, b"second")
    with pytest.raises(OutputError, match=r"cannot write .*0001.npy: No space left"):
        folder.write_vector(folder.release(1), vector)
    assert path.read_bytes() == b"first"
    assert not folder.release(1).exists()


def test_a_vector_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    vector = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    vector[:3] = (-0.0, 1e-45, np.float32(3.4e38))
    folder.write_vector(folder.update(12, 7), vector)
    assert folder.update(12, 7) == tmp_path / "run" / "state" / "round-0012" / "7.npy"
    assert read_vector(folder.update(12, 7)).tobytes() == vector.tobytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"no vector"),
        lambda path: np.save(path, np.arange(3)),
        lambda path: np.save(path, np.ones((2, 2), np.float32)),
        lambda path: np.save(path, np.array([{"a": 1}], object), allow_pickle=True),
    ],
    ids=["gone", "empty", "cut", "text", "integers", "matrix", "pickle"],
)
def test_what_is_no_vector_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder, path = RunFolder(tmp_path / "run"), tmp_path / "run" / "releases" / "0001.npy"
    folder.write_vector(path, np.ones(5, np.float32))
    damage(path)
    with pytest.raises(OutputError, match=r"0001.npy"):
        read_vector(path)


def test_tidying_leaves_what_a_later_sitting_may_need(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    vector = np.ones(2, np.float32)
    for number in range(5):
        folder.write_vector(folder.release(number), vector)
        folder.write(folder.optimizer(number), b"state")
    folder.write_vector(folder.update(4, 0), vector)
    folder.write_vector(folder.update(5, 0), vector)
    folder.write(folder.training_state, b"of a baseline, three times its adapter")
    for release in range(1, 5):
        folder.tidy(release, release)
    assert sorted(path.stem for path in (tmp_path / "run" / "releases").iterdir()) == [
        *("0000", "0002", "0003", "0004")
    ]
    assert [path.name for path in sorted((tmp_path / "run" / "state").iterdir())] == [
        *("optimizer-0003.bin", "optimizer-0004.bin", "round-0005")
    ]
    folder.tidy(6, 4)  # a failed round takes nothing away
    assert folder.optimizer(4).exists()
    assert folder.release(3).exists()


def test_nothing_is_appended_to_a_folder_that_is_not_open(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="was not opened"):
        RunFolder(tmp_path).append([a_score(0)])


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the folder belongs")
    with pytest.raises(OutputError, match=r"cannot use .*file"):
        RunFolder(tmp_path / "file").__enter__()
