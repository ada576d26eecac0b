"""Curves for TensorBoard."""

import importlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from simulations.lab.folder import RunFolder
from simulations.lab.report.tensorboard import write_events

pytest.importorskip("tensorboardX")

BEGAN_AT = 1_800_000_000.0


def read_events(path: Path) -> Iterator[Any]:
    """Records of a TFRecord file, each checked against its checksums."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    content = path.read_bytes()
    at = 0
    while at < len(content):
        length = content[at : at + 8]
        (n,) = struct.unpack("<Q", length)
        assert struct.unpack("<I", content[at + 8 : at + 12])[0] == masked_crc32c(length)
        data = content[at + 12 : at + 12 + n]
        assert struct.unpack("<I", content[at + 12 + n : at + 16 + n])[0] == masked_crc32c(data)
        yield Event.FromString(data)
        at += 16 + n


def curves(path: Path) -> dict[str, list[tuple[int, float, float]]]:
    """By tag: step, seconds since the run began, and value."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for event in read_events(path):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append(
                (event.step, event.wall_time - BEGAN_AT, value.simple_value)
            )
    return found


def test_a_file_begins_with_its_version_and_is_found_by_its_name(finished_run: Path) -> None:
    path = write_events(finished_run)
    assert path is not None
    assert ".tfevents." in path.name
    first = next(read_events(path))
    assert first.file_version == "brain.Event:2"
    assert first.wall_time == BEGAN_AT


def test_points_are_those_of_the_notes(finished_run: Path) -> None:
    path = write_events(finished_run)
    assert path is not None
    found = curves(path)
    # Each round took 4 seconds; the second one failed.
    assert found["held-out loss/average"] == [(0, 0.0, 4.0), (1, 4.0, 3.0), (2, 12.0, 2.0)]
    assert found["held-out loss by category/open_qa"][-1] == (2, 12.0, 2.5)
    assert [step for step, _, _ in found["exact match/average"]] == [0, 2]
    assert found["exact match/average"][1][2] == pytest.approx(0.6)
    assert found["traffic/up, bytes"] == [(1, 4.0, 2000.0), (2, 8.0, 6000.0), (3, 12.0, 12000.0)]
    assert [value for _, _, value in found["privacy/epsilon"]] == [0.5, 0.5, 0.75]
    assert [step for step, _, _ in found["train/update norm"]] == [1, 3]
    assert found["train/loss"][0][2] == pytest.approx((10 * 2.0 + 20 * 3.0) / 30)
    assert "time/round simulated, s" not in found


def test_written_again_nothing_is_there_twice(finished_run: Path) -> None:
    path = write_events(finished_run)
    assert path is not None
    before = path.read_bytes()
    assert write_events(finished_run) == path
    assert path.read_bytes() == before
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_a_run_that_goes_on_adds_to_the_end(
    make_run: Callable[..., Path], make_round: Callable[..., Any], make_scores: Callable[..., Any]
) -> None:
    root = make_run("grows", [make_round(1)])
    path = write_events(root)
    assert path is not None
    node = path.stat().st_ino
    for notes in (
        make_scores(0, {"a": 3.0, "b": 5.0}),  # the lab measures release 0 after the first round
        make_scores(1, {"a": 2.0, "b": 4.0}),
        [make_round(2, failure="too few agents")],
        [make_round(3, release=2)],
        make_scores(2, {"a": 1.0, "b": 3.0}),
    ):
        before = path.read_bytes()
        with RunFolder(root) as folder:
            folder.append(notes)
        write_events(root)
        assert path.read_bytes().startswith(before)
        assert len(path.read_bytes()) > len(before)
    assert path.stat().st_ino == node  # the same file, so that an open TensorBoard reads on
    found = curves(path)
    assert [step for step, _, _ in found["traffic/up, bytes"]] == [1, 2, 3]
    assert found["held-out loss/average"] == [(0, 0.0, 4.0), (1, 4.0, 3.0), (2, 12.0, 2.0)]


def test_what_was_noted_twice_is_one_point(
    make_run: Callable[..., Path], make_round: Callable[..., Any], make_scores: Callable[..., Any]
) -> None:
    notes = [make_round(1), *make_scores(1, {"a": 2.0})]
    path = write_events(make_run("twice", [*notes, *notes]))
    assert path is not None
    assert all(len(points) == 1 for points in curves(path).values())


def test_half_a_record_is_completed_and_another_file_replaced(finished_run: Path) -> None:
    path = write_events(finished_run)
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    write_events(finished_run)
    assert path.read_bytes() == whole
    path.write_bytes(b"something else")
    write_events(finished_run)
    assert path.read_bytes() == whole


def test_a_training_without_rounds_has_its_scores(
    make_run: Callable[..., Path], make_scores: Callable[..., Any]
) -> None:
    root = make_run(
        "one", [*make_scores(0, {"a": 3.0}), *make_scores(1, {"a": 2.0})], arm="centralised"
    )
    path = write_events(root)
    assert path is not None
    assert [(step, value) for step, _, value in curves(path)["held-out loss/average"]] == [
        (0, 3.0),
        (1, 2.0),
    ]


def test_without_the_package_there_is_no_file(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, *_: Any) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert write_events(finished_run) is None
    assert not (finished_run / "tensorboard").exists()
