"""Files of the owner alone, there whole or not at all, whatever happens while they are written."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

_PRIVATE_FILE: Final = 0o600


def write_durably(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file: on the disk, under its name, only once it is whole.

    Guarantees:
        1. After a failure or a kill, the file is what it was before, or the new one.
        2. Nobody else on the machine can read it (mode 0600).

    Args:
        path: The file; its folder must exist. An existing file is replaced.
        pieces: Its content, one after the other.

    Raises:
        OSError: It cannot be written, for instance because the disk is full.
    """
    with _written_durably(path) as file:
        for piece in pieces:
            file.write(piece)


def remove_durably(path: Path) -> None:
    """Remove a file, if it is there, so that a power cut does not bring it back.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be removed.
    """
    path.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_hashed(path: Path, pieces: Iterable[memoryview]) -> bytes:
    """Write a file durably, a piece at a time.

    Args:
        path: The file; its folder must exist.
        pieces: Its content, one after the other.

    Returns:
        Its SHA-256.

    Raises:
        OSError: It cannot be written.
    """
    digest = hashlib.sha256()
    with _written_durably(path) as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
    return digest.digest()


@contextmanager
def _written_durably(path: Path) -> Iterator[BinaryIO]:
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb", opener=_private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, _PRIVATE_FILE)
