"""Files that are there whole or not at all, whatever happens while they are written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_durably(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file: on the disk, under its name, only once it is whole.

    Guarantees:
        1. After a failure or a kill, the file is what it was before, or the new one.

    Args:
        path: The file; its folder must exist. An existing file is replaced.
        pieces: Its content, one after the other.

    Raises:
        OSError: It cannot be written, for instance because the disk is full.
    """
    with written_durably(path) as file:
        for piece in pieces:
            file.write(piece)


@contextmanager
def written_durably(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name when the context ends without an error.

    Guarantees:
        1. After a failure or a kill, the file is what it was before, or the new one.

    Args:
        path: The file; its folder must exist. An existing file is replaced.

    Raises:
        OSError: It cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
