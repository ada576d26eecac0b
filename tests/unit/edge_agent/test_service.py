"""The systemd unit."""

import shlex
import sys
from pathlib import Path

import pytest

from edge_agent.service import systemd_unit


def command_of(unit: str) -> str:
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    return line.removeprefix("ExecStart=")


@pytest.mark.parametrize("home", ["/home/a/agent", "/home/a b/it's", '/x/"y"/100%/$HOME/\\z'])
def test_the_unit_runs_the_agent_in_its_home(home: str) -> None:
    command = command_of(systemd_unit(Path(home)))
    # systemd splits like a shell, and expands % and $, which are doubled to stay.
    words = shlex.split(command.replace("%%", "%").replace("$$", "$"))
    assert words == [sys.executable, "-m", "edge_agent.cli", "run", "--home", home]
    assert command.count("%") == 2 * home.count("%")
    assert command.count("$") == 2 * home.count("$")


def test_the_unit_says_how_to_install_it_and_starts_again_after_a_fault() -> None:
    unit = systemd_unit(Path("/home/a"))
    for piece in ("systemctl --user enable --now", "[Service]", "Restart=on-failure", "[Install]"):
        assert piece in unit
