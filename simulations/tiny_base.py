"""Rebuilds the embedded base with its description."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from quant.base_model import load_base
from quant.tiny import EMBEDDED_NAME
from quant.tiny.pretrain import SHIPPED_SEED, make_tiny_base
from simulations.errors import OutputError

DESCRIPTION_NAME: Final = "base.json"


def rebuild(out: Path, *, seed: int | None, show: Callable[[str], None]) -> str:
    """Pre-train the embedded base into a new folder and describe it.

    Args:
        out: A new or empty folder.
        seed: None: the shipped base's, which gives the shipped digest on the same machine with the
            same versions.
        show: Told how it goes.

    Returns:
        One sentence about the result.

    Raises:
        OutputError: The folder is not empty.
    """
    if out.exists() and any(out.iterdir()):
        msg = f"{out} is not empty; choose a new folder"
        raise OutputError(msg)
    report = make_tiny_base(out, seed=SHIPPED_SEED if seed is None else seed, progress=show)
    description = load_base(out).description
    block = description.base.model_copy(update={"model": EMBEDDED_NAME})
    description = description.model_copy(update={"base": block})
    (out / DESCRIPTION_NAME).write_bytes(description.canonical() + b"\n")
    return f"{out}: {report}, fingerprint {block.fingerprint.hex()[:16]}…"
