"""Files that are there whole or not at all, whatever happens while they are written."""

import os
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write a file: on the disk, under its name, only once it is whole.

    Guarantees:
        1. After a failure or a kill, the file is what it was before, or the new one.

    Args:
        path: The file; its folder must exist. An existing file is replaced.
        data: Its content.

    Raises:
        OSError: It cannot be written, for instance because the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
