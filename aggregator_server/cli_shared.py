"""What the modules of `sheepfold-server` share: the JSON option, answers, errors as sentences."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aggregator_server.errors import ServerError
from privacy.errors import PrivacyError
from protocol.errors import ProtocolError
from quant.errors import QuantError

if TYPE_CHECKING:
    from aggregator_server.federation import Federation

JsonPath = Annotated[
    Path | None,
    typer.Option("--json", metavar="PATH", help="Write the answer as JSON; '-' is the terminal."),
]

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder.")]


@contextmanager
def sentences() -> Iterator[None]:
    """Turn every fault that is known into one sentence and exit code 1."""
    try:
        yield
    except (ServerError, ProtocolError, PrivacyError, QuantError, OSError) as error:
        typer.echo(f"sheepfold-server: {error}", err=True)
        raise typer.Exit(1) from error
    except Exception as error:
        typer.echo(f"sheepfold-server: {type(error).__name__}: {error} (unexpected)", err=True)
        raise typer.Exit(1) from error


@contextmanager
def opened(directory: Path) -> Iterator["Federation"]:
    """A federation, for as long as the context is open; faults become sentences."""
    from aggregator_server.federation import open_federation

    with sentences():
        federation = open_federation(directory)
        try:
            yield federation
        finally:
            federation.close()


def answer(json_path: Path | None, text: str, value: object) -> None:
    """Tell an answer as text, or as JSON where that was asked for.

    Args:
        json_path: From `--json`; None: the text alone.
        text: For people.
        value: For scripts.
    """
    if json_path is None:
        typer.echo(text)
        return
    write_json(json_path, json.dumps(value, indent=2, allow_nan=False))
    if str(json_path) != "-":
        typer.echo(text)


def write_json(path: Path, text: str) -> None:
    """Write JSON text to a file, or to standard output for `-`."""
    if str(path) == "-":
        typer.echo(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")
