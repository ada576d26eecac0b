"""The resident set of this process: its peak above what stood, which Linux lets a process reset."""

import gc
from pathlib import Path


class ResidentPeak:
    """Peak memory above what stood when this was made, in bytes."""

    def __init__(self) -> None:
        """Take what stands now, and forget earlier peaks."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.standing_bytes = _status_bytes("VmRSS")

    def above_bytes(self) -> int:
        """The peak since, above what stood."""
        return _status_bytes("VmHWM") - self.standing_bytes


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")
