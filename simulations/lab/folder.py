"""The folder of a run: everything that it was made from and everything that came out.

    experiment.toml   the experiment; a key that is left out follows from others, as in `init`
    run.json          what the run is (`RunCard`)
    manifest.json     the federation manifest that follows: every setting in force
    partition.json    which record is whose (embedded worlds: none, the seed says it)
    kept.json         of these, the indices that `max_records` left each client
    journal.jsonl     every visit, round and score, one line each, in the order that they ended
    releases/         the global adapter after each round, as one float32 vector
    state/            the open round: updates that are trained, the server optimiser's state
    adapter/          the last release as a PEFT folder
    tables/           the journal as Parquet and CSV; tensorboard/ beside it
    report.html       and figures/

A line is appended in one write, and a file appears under its name when it is whole. So whatever
kills a run, the next sitting finds all that had ended, and the rest as if it had never begun. A
power cut may take what was written last: what no longer lies there whole is made again.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from privacy.updates import Float32Array
from protocol.wire import explain
from simulations.errors import OutputError
from simulations.files import PART, appearing
from simulations.lab.records import AnyNote, Note, RunCard

_CARD: Final = "run.json"
_JOURNAL: Final = "journal.jsonl"
_FREE: Final = frozenset({"engine", "n_held_out", "n_repeated"})
"""Of a card: what may change while a run goes on, and what follows from the rest."""
_NOTES: Final[TypeAdapter[AnyNote]] = TypeAdapter(AnyNote)


class RunFolder:
    """A run's folder, held by one process at a time.

    Guarantees:
        1. A note that `append` returned from is there after kill -9; half a line, which a power cut
           may leave, is dropped by the next sitting.
        2. Two processes never work in one folder.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        """Nothing is made yet."""
        self.root = root
        self._lock = FileLock(str(root / ".lock"))
        self._journal: int | None = None

    @property
    def experiment(self) -> Path:
        """The resolved experiment."""
        return self.root / "experiment.toml"

    @property
    def manifest(self) -> Path:
        """The federation manifest, for machines and for people."""
        return self.root / "manifest.json"

    @property
    def partition(self) -> Path:
        """The partition's manifest."""
        return self.root / "partition.json"

    @property
    def kept(self) -> Path:
        """Indices that a cap left each client."""
        return self.root / "kept.json"

    @property
    def adapter(self) -> Path:
        """The last release as a PEFT folder."""
        return self.root / "adapter"

    @property
    def tables(self) -> Path:
        """Parquet and CSV."""
        return self.root / "tables"

    @property
    def figures(self) -> Path:
        """PNGs."""
        return self.root / "figures"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / "report.html"

    def release(self, number: int) -> Path:
        """The vector of a release."""
        return self.root / "releases" / f"{number:04d}.npy"

    def update(self, round_number: int, agent: int) -> Path:
        """The update of a visit of the open round."""
        return self.root / "state" / f"round-{round_number:04d}" / f"{agent}.npy"

    @property
    def training_state(self) -> Path:
        """Of the one training of a baseline."""
        return self.root / "state" / "training.safetensors"

    def optimizer(self, release: int) -> Path:
        """The server optimiser's state that belongs to a release."""
        return self.root / "state" / f"optimizer-{release:04d}.bin"

    @property
    def is_begun(self) -> bool:
        """Whether there is a run's card."""
        return (self.root / _CARD).exists()

    # Beginning

    def __enter__(self) -> Self:
        """Take the folder, and drop what a power cut left half written.

        Raises:
            OutputError: Another process works in it, it cannot be written, or it holds something
                else than a run; then nothing is written.
        """
        try:
            self._refuse_others()
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            msg = f"another process works in {self.root}; wait for it, or choose another folder"
            raise OutputError(msg) from error
        except OSError as error:
            msg = f"cannot use {self.root}: {error.strerror}"
            raise OutputError(msg) from error
        journal = self.root / _JOURNAL
        if journal.exists():
            content = journal.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(journal, len(whole))
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        self._lock.release()

    def open_card(self, card: RunCard, *, experiment: str) -> bool:
        """Begin a run, or find that it goes on.

        Args:
            card: What it is.
            experiment: The resolved experiment, TOML.

        Returns:
            Whether an earlier sitting had begun it.

        Raises:
            OutputError: The folder holds another run.
        """
        path = self.root / _CARD
        if path.exists():
            found = read_card(self.root)
            differing = [
                name
                for name in type(card).model_fields
                if name not in _FREE and getattr(found, name) != getattr(card, name)
            ]
            if differing:
                name = differing[0]
                msg = (
                    f"{self.root} holds another run: its {name} is {_short(getattr(found, name))}, "
                    f"here it is {_short(getattr(card, name))}; choose another --out, or remove it"
                )
                raise OutputError(msg)
            self._furnish(experiment)
            return True
        # The card first: with it the folder is a run's, whatever kills this sitting next.
        self.write(path, card.model_dump_json(indent=2).encode() + b"\n")
        self._furnish(experiment)
        return False

    def _refuse_others(self) -> None:
        if self.is_begun or not self.root.is_dir():
            return
        own = {".lock", _JOURNAL, _CARD + PART}
        others = sorted(item.name for item in self.root.iterdir() if item.name not in own)
        if others:
            msg = (
                f"{self.root} is no run and not empty ({others[0]} is there); choose another --out"
            )
            raise OutputError(msg)

    def _furnish(self, experiment: str) -> None:
        """Put beside the card what belongs there, as far as it is missing."""
        for name in ("releases", "state"):
            (self.root / name).mkdir(exist_ok=True)
        if not self.experiment.exists():
            self.write(self.experiment, experiment.encode())

    # Writing

    def append(self, notes: Sequence[Note]) -> None:
        """Append notes to the journal in one write.

        Args:
            notes: Any number.

        Raises:
            OutputError: It cannot be written.
        """
        if self._journal is None:
            msg = f"{self.root} was not opened"
            raise OutputError(msg)
        data = b"".join(note.model_dump_json().encode() + b"\n" for note in notes)
        try:
            while data:
                data = data[os.write(self._journal, data) :]
        except OSError as error:
            msg = f"cannot write {self.root / _JOURNAL}: {error.strerror}; free some space"
            raise OutputError(msg) from error

    def write(self, path: Path, data: bytes) -> None:
        """Write a file that appears when it is whole.

        Raises:
            OutputError: It cannot be written.
        """
        with appearing(path) as file:
            file.write(data)

    def write_vector(self, path: Path, vector: Float32Array) -> None:
        """Write a float32 vector as an .npy file that appears when it is whole.

        Raises:
            OutputError: It cannot be written.
        """
        with appearing(path) as file:
            np.save(file, vector, allow_pickle=False)

    def tidy(self, round_number: int, release: int) -> None:
        """Delete what no later sitting needs: a closed round's training, older releases.

        Args:
            round_number: Of the closed round.
            release: The newest one. It and release 0 stay; so does the one before, to go on from
                where a power cut took the newest one; and the one before that, since attackers of
                a round know what the last one changed.
        """
        shutil.rmtree(self.update(round_number, 0).parent, ignore_errors=True)
        self.training_state.unlink(missing_ok=True)
        if release > 3:
            self.release(release - 3).unlink(missing_ok=True)
        self.optimizer(release - 2).unlink(missing_ok=True)

    def notes(self) -> list[AnyNote]:
        """Everything noted so far."""
        return list(read_notes(self.root))


def read_vector(path: Path) -> Float32Array:
    """A vector that `RunFolder.write_vector` wrote.

    Raises:
        OutputError: It is not there, or is none.
    """
    try:
        vector = np.load(path, allow_pickle=False)
    except (EOFError, OSError, ValueError) as error:
        msg = f"cannot read {path}: {error}; the run cannot go on from there"
        raise OutputError(msg) from error
    if vector.dtype != np.float32 or vector.ndim != 1:
        msg = f"{path} holds {vector.dtype} {list(vector.shape)}; expected a float32 vector"
        raise OutputError(msg)
    found: Float32Array = vector
    return found


def read_card(root: Path) -> RunCard:
    """What the run in a folder is.

    Args:
        root: The folder.

    Raises:
        OutputError: There is no run, or one of another version.
    """
    path = root / _CARD
    try:
        return RunCard.model_validate_json(path.read_bytes())
    except OSError as error:
        msg = f"{root} holds no run: cannot read {path.name}: {error.strerror}"
        raise OutputError(msg) from error
    except ValidationError as error:
        msg = f"{path} is no card of a run that this version knows: {explain('run.json', error)}"
        raise OutputError(msg) from error


def read_notes(root: Path) -> Iterator[AnyNote]:
    """The journal of a run, line by line; half a last line is left out.

    Args:
        root: The folder.

    Raises:
        OutputError: There is no journal, or a line is no note.
    """
    path = root / _JOURNAL
    try:
        content = path.read_bytes()
    except OSError as error:
        msg = f"{root} holds no run: cannot read {_JOURNAL}: {error.strerror}"
        raise OutputError(msg) from error
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            yield _NOTES.validate_json(line)
        except ValidationError as error:
            msg = f"{path}, line {number} is no note of a run; restore the file"
            raise OutputError(msg) from error


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:16] + "…"
