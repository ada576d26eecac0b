"""What a run or a measurement is made on."""

import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as the kernel has it; elsewhere than on Linux, as Python has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
