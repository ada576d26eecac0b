"""Files that are whole or not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from simulations.errors import OutputError

PART: Final = ".part"
"""Ends the name of a file that is not whole yet."""


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name when the context ends without an error.

    Args:
        path: Its folder is made where it is missing.

    Raises:
        OutputError: It cannot be written.
    """
    part = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}; free some space, or choose another place"
        raise OutputError(msg) from error
