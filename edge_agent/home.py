"""The agent's home folder: key, journal, cache, training state, finished updates.

Everything that the agent keeps lies here, so `forget` can remove it whole. One process at a time
may work in a home.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from edge_agent.config import SETTINGS_NAME
from edge_agent.errors import JournalError
from protocol.signing import Signer
from protocol.wire import b64u_decode, b64u_encode

_PRIVATE_FOLDER = 0o700
_PRIVATE_FILE = 0o600
_CACHED = re.compile(r"[0-9a-f]{64}(\.partial)?")
_NEXT_CONTROL = re.compile(r"control-\d+-\d+\.f32")
_CONTROL = re.compile(r"control(-\d+-\d+)?\.f32(\.partial)?")
_UPDATE = re.compile(r"\d+-\d+\.(f32|words|masked)(\.partial)?")


@dataclass(frozen=True)
class AgentHome:
    """Paths below one folder."""

    root: Path

    @property
    def key_path(self) -> Path:
        """The agent's private key, mode 0600."""
        return self.root / "agent.key"

    @property
    def _partial_key_path(self) -> Path:
        return self.key_path.with_name(self.key_path.name + ".partial")

    @property
    def journal_path(self) -> Path:
        """The SQLite journal."""
        return self.root / "journal.sqlite"

    @property
    def cache(self) -> Path:
        """Downloaded adapters, by SHA-256."""
        return self.root / "cache"

    @property
    def training_state(self) -> Path:
        """The trainer's state file."""
        return self.root / "training.safetensors"

    @property
    def privacy_secret(self) -> Path:
        """The secret of a private training, while it lasts."""
        return self.root / "privacy.secret"

    @property
    def control(self) -> Path:
        """SCAFFOLD's c_i: float32 in the order of the adapter's tensors."""
        return self.root / "control.f32"

    def next_control(self, round_number: int, attempt: int) -> Path:
        """What c_i becomes if the round counts this attempt's update."""
        return self.root / f"control-{round_number}-{attempt}.f32"

    def next_controls(self) -> list[tuple[int, int, Path]]:
        """All that wait for the end of their rounds, with round and attempt, ascending."""
        found = []
        for path in _own_files(self.root, _NEXT_CONTROL):
            _, number, attempt = path.stem.split("-")
            found.append((int(number), int(attempt), path))
        return sorted(found)

    @property
    def updates(self) -> Path:
        """Finished updates until they are accepted."""
        return self.root / "updates"

    def plain_update(self, round_number: int, attempt: int) -> Path:
        """A finished update of the open mode."""
        return self.updates / f"{round_number}-{attempt}.f32"

    def encoded_update(self, round_number: int, attempt: int) -> Path:
        """A finished update as words, made once; what every masked attempt sends."""
        return self.updates / f"{round_number}-{attempt}.words"

    def masked_update(self, round_number: int, attempt: int) -> Path:
        """A finished update under the masks of one cell; `attempt` is the READY's."""
        return self.updates / f"{round_number}-{attempt}.masked"

    def cached_files(self) -> list[Path]:
        """The downloads in the cache; other files in that folder are not the agent's."""
        return _own_files(self.cache, _CACHED)

    def update_files(self) -> list[Path]:
        """The finished updates, whole or not."""
        return _own_files(self.updates, _UPDATE)

    def create(self) -> None:
        """Make the folders, readable by the owner alone."""
        for folder in (self.root, self.cache, self.updates):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(_PRIVATE_FOLDER)

    def lock(self) -> FileLock:
        """Hold the home for one working process.

        Raises:
            JournalError: Another process works here.
        """
        lock = FileLock(self.root / "agent.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            msg = (
                f"another agent already works in {self.root}; see `sheepfold-agent status`, or "
                "use another --home"
            )
            raise JournalError(msg) from None
        return lock

    def load_or_create_signer(self) -> Signer:
        """The agent's identity; made here, on this device, at the first call.

        Raises:
            JournalError: The key file is damaged.
        """
        if self.key_path.exists():
            try:
                return Signer.from_private_bytes(
                    b64u_decode(self.key_path.read_text(encoding="ascii").strip(), n_bytes=32)
                )
            except Exception as error:
                msg = f"the key file {self.key_path} is damaged; `forget` and join again"
                raise JournalError(msg) from error
        signer = Signer.generate()
        partial = self._partial_key_path
        partial.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(partial, flags, _PRIVATE_FILE)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(b64u_encode(signer.private_bytes()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.key_path)  # a kill leaves a whole key or none
        return signer

    def forget(self) -> list[Path]:
        """Remove everything that the agent keeps; files it did not make stay.

        Returns:
            What was removed.
        """
        removed: list[Path] = []
        journal = self.journal_path
        own = [
            *self.cached_files(),
            *self.update_files(),
            *_own_files(self.root, _CONTROL),
            self.key_path,
            self._partial_key_path,
            *(journal.with_name(journal.name + suffix) for suffix in ("", "-wal", "-shm")),
            self.training_state,
            self.training_state.with_name(self.training_state.name + ".partial"),
            self.privacy_secret,
            self.privacy_secret.with_name(self.privacy_secret.name + ".partial"),
            self.root / SETTINGS_NAME,
            self.root / "agent.lock",
        ]
        for path in own:
            if path.exists():
                path.unlink()
                removed.append(path)
        for folder in (self.cache, self.updates, self.root):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
                removed.append(folder)
        return removed


def _own_files(folder: Path, names: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if names.fullmatch(path.name))
