"""Real server and agent processes, started with the commands that people type."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from simulations.errors import ProcessError

_STOP_S: Final = 15.0
_POLL_S: Final = 0.1
_TAIL_CHARS: Final = 1500


def command_of(module: str, *arguments: str) -> list[str]:
    """The command line of one of Sheepfold's programs, in this Python.

    Args:
        module: Such as `"edge_agent.cli"`.
        arguments: What follows.
    """
    return [sys.executable, "-m", module, *arguments]


def child_environment() -> dict[str, str]:
    """This environment with one thread for each process, which share the cores."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def run_command(module: str, *arguments: str) -> str:
    """Run a command to its end.

    Returns:
        Its standard output.

    Raises:
        ProcessError: It failed; the message ends with what it said.
    """
    done = subprocess.run(
        command_of(module, *arguments),
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        msg = f"`{module} {' '.join(arguments)}` failed: {done.stderr.strip()[-_TAIL_CHARS:]}"
        raise ProcessError(msg)
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process of its own, writing to a log file."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, name: str, command: Sequence[str], log: Path) -> "Process":
        """Start a command.

        Args:
            name: For messages.
            command: What to run.
            log: Where its output goes; its folder must exist.
        """
        with log.open("ab") as output:
            popen = subprocess.Popen(
                command,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which stops it in order
            )
        return cls(name=name, popen=popen, log=log)

    def check(self) -> bool:
        """Whether it still runs.

        Raises:
            ProcessError: It ended with an error; the message ends with what it said.
        """
        code = self.popen.poll()
        if code:
            msg = f"{self.name} ended with exit code {code}: {self.tail()}"
            raise ProcessError(msg)
        return code is None

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARS:].strip()

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        with suppress(ProcessLookupError):
            self.popen.kill()
        self.popen.wait()

    def stop(self) -> None:
        """End it in order, or after a while at once."""
        if self.popen.poll() is None:
            with suppress(ProcessLookupError):
                self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()


def start_server(
    folder: Path, log: Path, *, port: int = 0, within_s: float = 60.0
) -> tuple[Process, str]:
    """Serve a federation on loopback.

    Args:
        folder: Made by `sheepfold-server init`.
        log: Where its output goes.
        port: 0 takes a free one.
        within_s: How long it may take until it is ready.

    Returns:
        The process and its address.

    Raises:
        ProcessError: It did not become ready.
    """
    ready = log.with_suffix(".ready.json")
    ready.unlink(missing_ok=True)
    command = command_of(
        "aggregator_server.cli", "serve", str(folder), "--port", str(port), "--json", str(ready)
    )
    process = Process.start("the server", command, log)
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        process.check()
        with suppress(OSError, ValueError):
            return process, str(json.loads(ready.read_text(encoding="utf-8"))["url"])
        time.sleep(_POLL_S)
    process.stop()
    msg = f"the server was not ready within {within_s:.0f} s: {process.tail()}"
    raise ProcessError(msg)
