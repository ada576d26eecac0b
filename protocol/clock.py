"""The one injected source of time.

Deadlines are computed from `now` and survive a restart; waits use `monotonic`, which neither jumps
nor goes back. Tests pass a clock that they advance by hand.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """What agent and server may know of time."""

    def now(self) -> float:
        """Seconds since the Unix epoch; may jump when the machine's clock is set."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary point; never goes back."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Block for `duration_s` seconds."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        """Seconds since the Unix epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds since an arbitrary point."""
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        """Block for `duration_s` seconds; a negative duration returns at once."""
        time.sleep(max(0.0, duration_s))
