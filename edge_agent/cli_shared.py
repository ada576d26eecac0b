"""What the modules of `sheepfold-agent` share: options, the console, an opened home."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from edge_agent.config import default_home
from edge_agent.errors import JournalError
from edge_agent.home import AgentHome
from edge_agent.plain_text import escaped

if TYPE_CHECKING:
    from edge_agent.journal import Journal

console: Final = Console(stderr=True)

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar="SHEEPFOLD_AGENT_HOME",
        help="Where key, journal and cache lie. One home for each federation.",
    ),
]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Write JSON here; `-` for stdout.")
]
DeviceOption = Annotated[str | None, typer.Option(help="`cpu`, `cuda` or `cuda:1`.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads to use.", min=1)]


def write_json(target: str, value: object) -> None:
    """Write JSON to a path, or to standard output for `-`; NaN and infinity are refused."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")


def say(text: str) -> None:
    """One line about the work, beside the answers."""
    console.print(escaped(text), highlight=False, soft_wrap=True)


@contextmanager
def opened(home: Path | None) -> Iterator[tuple[AgentHome, "Journal"]]:
    """The home and its journal, for as long as the context is open.

    Args:
        home: None: the default one.

    Raises:
        JournalError: No federation was joined there.
    """
    from edge_agent.journal import Journal

    agent_home = AgentHome(home or default_home())
    if not agent_home.journal_path.exists():
        msg = f"no federation was joined in {agent_home.root}; begin with `sheepfold-agent join`"
        raise JournalError(msg)
    journal = Journal(agent_home.journal_path)
    try:
        yield agent_home, journal
    finally:
        journal.close()
