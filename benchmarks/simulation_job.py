"""What all sides of the benchmark of simulators share. It imports nothing, of Sheepfold or a peer.

The peers' scripts find it beside them; ours takes it from the package.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

WAIT_S: Final = 300.0


def since_start(began: float | None) -> float:
    """Seconds since `began`, a time of the epoch; None: since the kernel made this process."""
    if began is not None:
        return time.time() - began
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    ticks = int(fields[19])  # after boot; the 22nd field of all
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def wait_for(condition: Callable[[], bool], what: str, *, every_s: float = 0.02) -> None:
    """Return when it holds.

    Raises:
        TimeoutError: It does not within `WAIT_S`.
    """
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {WAIT_S:.0f} s")
        time.sleep(every_s)


def pss_bytes(pid: int) -> int:
    """A process's resident memory, with its share of what it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no Pss in /proc/{pid}/smaps_rollup")
