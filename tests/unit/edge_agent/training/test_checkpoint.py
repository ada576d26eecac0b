"""The trainer's state file."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from edge_agent.errors import CheckpointError
from edge_agent.training.checkpoint import Progress, Tally, load_state, save_state
from quant.memory import StepSettings

PROGRESS = Progress(
    run="ab",
    step=3,
    settings=StepSettings(micro_tokens=64, n_checkpointed_layers=2),
    loss_scale=2.0,
    tally=Tally(n_tokens=70, first_loss=3.5, last_loss=math.inf),
)
TENSORS = {"factor/a": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3.0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.safetensors"


def test_a_state_round_trips_bit_for_bit(path: Path) -> None:
    save_state(path, PROGRESS, TENSORS)
    found = load_state(path, run="ab")
    assert found is not None
    progress, tensors = found
    assert progress == PROGRESS
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
    assert not path.with_name(path.name + ".partial").exists()


def test_the_state_of_another_run_is_not_resumed(path: Path) -> None:
    save_state(path, PROGRESS, TENSORS)
    assert load_state(path, run="cd") is None


def test_a_strided_tensor_is_kept_by_its_values(path: Path) -> None:
    save_state(path, PROGRESS, {"x": torch.arange(6.0).reshape(2, 3).T})
    found = load_state(path, run="ab")
    assert found is not None
    assert found[1]["x"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def with_metadata(**metadata: str) -> bytes:
    return safetensors.torch.save(TENSORS, metadata=metadata or None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        b"\x80\x04K\x01.",
        with_metadata(),
        with_metadata(other="x"),
        with_metadata(sheepfold="{"),
        with_metadata(sheepfold="[]"),
        with_metadata(sheepfold=json.dumps({"run": "ab"})),
        with_metadata(sheepfold=json.dumps({"run": "ab", "step": 1, "surprise": 2})),
        with_metadata(sheepfold="{}")[:-5],
    ],
)
def test_a_file_that_cannot_be_read_begins_anew(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert load_state(path, run="ab") is None


def test_without_a_file_there_is_no_state(path: Path) -> None:
    assert load_state(path, run="ab") is None


def test_a_kill_while_saving_leaves_the_old_state(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KillError(BaseException):
        """Stands for kill -9."""

    def kill(descriptor: int) -> None:
        raise KillError

    save_state(path, PROGRESS, TENSORS)
    monkeypatch.setattr(os, "fsync", kill)
    later = replace(PROGRESS, step=4)
    with pytest.raises(KillError):
        save_state(path, later, TENSORS)
    found = load_state(path, run="ab")
    assert found is not None
    assert found[0] == PROGRESS


def test_a_full_disk_is_told_and_leaves_the_old_state(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    save_state(path, PROGRESS, TENSORS)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*free some space"):
        save_state(path, PROGRESS, TENSORS)
    assert load_state(path, run="ab") is not None
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot save"):
        save_state(tmp_path / "no" / "state", PROGRESS, TENSORS)


def test_a_tally_adds_up_the_batches_that_were_of_anybody() -> None:
    found = Tally()
    for loss, n_tokens in ((None, 0), (3.0, 10), (None, 0), (2.0, 5)):
        found = found.after(loss, n_tokens=n_tokens)
    assert found == Tally(n_tokens=15, first_loss=3.0, last_loss=2.0)
