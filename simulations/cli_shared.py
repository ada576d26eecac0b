"""What the commands of `sheepfold-sim` share: the console, factors, JSON."""

import json
import sys
from pathlib import Path
from typing import Any, Final

import typer
from rich.console import Console

from protocol.blocks import Factor
from simulations.errors import OutputError

console: Final = Console(stderr=True)


def parse_factors(sent: str) -> tuple[Factor, ...]:
    """The factors that `--sent` names.

    Raises:
        BadParameter: Others than A,B or B.
    """
    factors = tuple(part.strip() for part in sent.split(","))
    if factors not in {("A", "B"), ("B",)}:
        msg = f"--sent must be A,B or B, not {sent!r}"
        raise typer.BadParameter(msg)
    return tuple(Factor(part) for part in factors)


def write_json(found: dict[str, Any], target: str) -> None:
    """Write JSON to a path, or to standard output for `-`; NaN and infinity are refused.

    Raises:
        OutputError: The file cannot be written.
    """
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        msg = f"cannot write {target}: {error.strerror}"
        raise OutputError(msg) from error
