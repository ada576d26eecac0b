"""A run's curves as a TensorBoard event file."""

import importlib
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from edge_agent.plain_text import plain
from simulations.errors import OutputError
from simulations.lab.folder import RunFolder
from simulations.lab.records import Measure, RoundNote, ScoreNote
from simulations.lab.report.drawing import MEASURE_NAMES
from simulations.lab.report.history import History

_FILE: Final = "events.out.tfevents.0000000000.sheepfold"
"""A fixed name: written again, the file takes the older one's place."""


class Scalar(NamedTuple):
    """A point of a curve."""

    tag: str
    step: int
    """The release's number, or the round's."""
    at_s: float
    """Seconds since the Unix epoch: when the run began, and what the rounds until then took."""
    value: float


def write_events(root: Path) -> Path | None:
    """Write a run's curves for TensorBoard: scores, update norm, ε, bytes, training loss, times.

    Guarantees:
        1. Equal notes give an equal file; written again, no point is there twice.
        2. While a run goes on, its file grows at the end, so that an open TensorBoard follows.
        3. No clock is read: a point is as long after the beginning as the rounds until then took,
           without loading and pauses between sittings.

    Values are float32, as TensorBoard has them. The exact ones are in `tables/`.

    Args:
        root: The run's folder; the file goes into `tensorboard/`.

    Returns:
        The file; None: the package tensorboardX is not installed.

    Raises:
        OutputError: There is no run, or the file cannot be written.
    """
    history = History.read(root)
    try:
        events = importlib.import_module("tensorboardX.proto.event_pb2")
        checksum = importlib.import_module("tensorboardX.record_writer").masked_crc32c
    except ImportError:
        return None
    folder = RunFolder(root)
    path = folder.tensorboard / _FILE
    content = b"".join(
        _record(event.SerializeToString(), checksum) for event in _events(events, history)
    )
    _write(folder, path, content)
    return path


def scalars(history: History) -> Iterator[Scalar]:
    """The points of all curves, in the order of the journal.

    Args:
        history: The run.
    """
    rounds = {note.number: note for note in history.rounds}
    made_s = _times(history)
    at_s, n_up, n_down = history.card.began_at, 0, 0
    seen: set[object] = set()
    n_scored: Counter[tuple[Measure, int]] = Counter()
    for noted in history.notes:
        if isinstance(noted, RoundNote) and noted.number not in seen:
            seen.add(noted.number)
            note = rounds[noted.number]
            at_s, n_up, n_down = (
                at_s + note.wall_s,
                n_up + note.bytes_up,
                n_down + note.bytes_down,
            )
            points = _of_round(history, note)
            if history.is_federated:
                points |= {"traffic/up, bytes": n_up, "traffic/down, bytes": n_down}
            for tag, value in points.items():
                if value is not None:
                    yield Scalar(tag, note.number, at_s, value)
        elif isinstance(noted, ScoreNote):
            measure, release, category = noted.measure, noted.release, noted.category
            if release not in history.releases(measure) or (measure, release, category) in seen:
                continue
            seen.add((measure, release, category))
            scores = history.by_category(measure, release)
            then_s = made_s.get(release, at_s)
            tag = MEASURE_NAMES[measure]
            yield Scalar(f"{tag} by category/{plain(category)}", release, then_s, scores[category])
            n_scored[measure, release] += 1
            if n_scored[measure, release] == len(scores):
                average = history.average(measure, release)
                yield Scalar(f"{tag}/average", release, then_s, average)


def _times(history: History) -> dict[int, float]:
    """When each release was made, by its number."""
    at_s = history.card.began_at
    times = {0: at_s}
    for note in history.rounds:
        at_s += note.wall_s
        if note.release is not None:
            times[note.release] = at_s
    return times


def _of_round(history: History, note: RoundNote) -> dict[str, float | None]:
    norm = None if note.release is None else note.update_norm
    return {
        "train/loss": history.train_loss(note.number),
        "train/update norm": norm,
        "train/learning rate": note.learning_rate,
        "privacy/epsilon": note.epsilon,
        "time/training, s": note.train_s,
        "time/server, s": note.server_s,
        "time/round simulated, s": note.duration_s,
    }


def _events(events: Any, history: History) -> Iterator[Any]:  # noqa: ANN401 - a late module
    yield events.Event(wall_time=history.card.began_at, file_version="brain.Event:2")
    for point in scalars(history):
        event = events.Event(wall_time=point.at_s, step=point.step)
        event.summary.value.add(tag=point.tag, simple_value=point.value)
        yield event


def _record(data: bytes, checksum: Any) -> bytes:  # noqa: ANN401 - of a late module
    """One record of a TFRecord file."""
    length = struct.pack("<Q", len(data))
    ends = struct.pack("<I", checksum(length)), struct.pack("<I", checksum(data))
    return length + ends[0] + data + ends[1]


def _write(folder: RunFolder, path: Path, content: bytes) -> None:
    """Append what is new, or replace a file that does not begin so."""
    try:
        there = path.read_bytes() if path.exists() else b""
        if there and content.startswith(there):
            with path.open("ab") as file:
                file.write(content[len(there) :])
            return
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}; free some space"
        raise OutputError(msg) from error
    folder.write(path, content)
