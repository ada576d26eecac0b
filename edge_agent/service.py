"""A systemd user unit, so that the agent runs after a reboot without root."""

import shlex
import sys
from pathlib import Path


def systemd_unit(home: Path) -> str:
    """The text of a user unit, with the steps to install it as comments.

    Args:
        home: The agent's home, absolute.
    """
    command = shlex.join([sys.executable, "-m", "edge_agent.cli", "run", "--home", str(home)])
    command = command.replace("%", "%%").replace("$", "$$")  # systemd expands both, quoted or not
    return f"""\
# Save as ~/.config/systemd/user/sheepfold-agent.service, then:
#   systemctl --user daemon-reload
#   systemctl --user enable --now sheepfold-agent
#   loginctl enable-linger            # to run while you are not logged in
[Unit]
Description=Sheepfold agent
Wants=network-online.target
After=network-online.target

[Service]
ExecStart={command}
Restart=on-failure
RestartSec=60
Nice=10
# A stop keeps the training state; give it time to write.
TimeoutStopSec=60

[Install]
WantedBy=default.target
"""
