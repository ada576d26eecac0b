"""Wakes every long-poll of this process at once, from any thread."""

import asyncio
import contextlib
import threading


class Wakeups:
    """A broadcast: those who wait are woken by the next `notify`, which never blocks.

    Guarantees:
        1. A `notify` after `ticket` was taken always ends a wait on that ticket, even one that
           begins later.
    """

    def __init__(self) -> None:
        """Begin with nobody waiting."""
        self._lock = threading.Lock()
        self._generation = 0
        self._closed = False
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    @property
    def closed(self) -> bool:
        """Whether the server is about to stop: nobody should wait any more."""
        return self._closed

    def ticket(self) -> int:
        """Taken before looking at the state that a wait is about."""
        with self._lock:
            return self._generation

    def notify(self) -> None:
        """Wake all who wait."""
        with self._lock:
            self._generation += 1
            waiting = list(self._waiting.items())
        for event, loop in waiting:
            with contextlib.suppress(RuntimeError):  # that loop has ended, and its waiters with it
                loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        """Wake all who wait, for good."""
        self._closed = True
        self.notify()

    async def wait(self, ticket: int, timeout_s: float) -> bool:
        """Wait for a `notify` that came after the ticket was taken.

        Args:
            ticket: From `ticket`.
            timeout_s: Longest wait.

        Returns:
            Whether there was one.
        """
        event = asyncio.Event()
        with self._lock:
            if self._generation != ticket or self._closed:
                return True
            self._waiting[event] = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            with self._lock:
                del self._waiting[event]
        return True
