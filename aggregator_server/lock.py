"""One server for each folder, and where it listens, for the operator's other commands to read."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from aggregator_server.errors import InUseError

_NAME: Final = "serve.lock"
_N_TRIES: Final = 5
_PAUSE_S: Final = 0.05


class ServeLock:
    """Held by the one process that serves a folder; its file says where that process listens."""

    def __init__(self, descriptor: int) -> None:
        """Wrap the locked file, which is empty."""
        self._descriptor = descriptor

    def tell(self, url: str) -> None:
        """Let `served_at` know where the server listens, for as long as it runs."""
        os.pwrite(self._descriptor, json.dumps({"url": url}).encode(), 0)


@contextmanager
def only_server(directory: Path) -> Iterator[ServeLock]:
    """Hold the federation's folder: a second server would close rounds under the first.

    The lock ends with the process, however it ends.

    Raises:
        InUseError: Another process holds it.
    """
    descriptor = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(descriptor, directory)
        os.ftruncate(descriptor, 0)
        yield ServeLock(descriptor)
    finally:
        os.close(descriptor)


def served_at(directory: Path) -> str | None:
    """Where the server of a folder listens; None when none runs, or it is not ready yet."""
    try:
        with (directory / _NAME).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return str(json.load(file)["url"])
    except (OSError, ValueError):
        return None
    return None  # nobody holds it: what stands there is of a server that has ended


def _lock(descriptor: int, directory: Path) -> None:
    # More than once: `served_at` holds it for a moment to see whether it is free.
    for _ in range(_N_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE_S)
        else:
            return
    msg = f"another process serves {directory}; stop it first"
    raise InUseError(msg)
