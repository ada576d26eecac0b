"""When training may run: the owner's pause, the allowed hours, a request to stop."""

import datetime as dt
from typing import Final

from edge_agent.config import Hours
from edge_agent.journal import Journal
from edge_agent.training.control import Wish
from protocol.clock import Clock

_LOOK_EVERY_S: Final = 0.25


class OwnersWishes:
    """The `Control` of a running agent; cheap enough to be asked before every micro-batch.

    Args:
        journal: Where `pause` and `resume` of other processes arrive.
        clock: Time.
        hours: The allowed hours, or None.
    """

    def __init__(self, journal: Journal, clock: Clock, hours: Hours | None) -> None:
        """Begin with no request to stop."""
        self._journal = journal
        self._clock = clock
        self._hours = hours
        self._stopping = False
        self._looked_at = -_LOOK_EVERY_S
        self._last = Wish.GO

    def stop(self) -> None:
        """Stop at the next micro-batch; safe in a signal handler."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether the agent was asked to stop, or the owner left the federation meanwhile."""
        return self._stopping or self._journal.has_left()

    def wish(self) -> Wish:
        """What the owner wants now; the journal is read at most four times a second."""
        if self._stopping:
            return Wish.STOP
        now = self._clock.monotonic()
        if now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            self._last = self._look()
        return self._last

    def _look(self) -> Wish:
        if self.stopping():
            return Wish.STOP
        return Wish.PAUSE if self.reason_to_wait() else Wish.GO

    def reason_to_wait(self) -> str | None:
        """Why training may not run now, for people; None when it may."""
        if self._journal.paused():
            return "paused by the owner; `sheepfold-agent resume` continues"
        local = dt.datetime.fromtimestamp(self._clock.now()).astimezone()
        if self._hours is not None and not self._hours.allows(local):
            return f"outside the allowed hours {self._hours}"
        return None
