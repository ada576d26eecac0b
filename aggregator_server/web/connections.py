"""Connections that do not wait for ever: what uvicorn leaves to a proxy in front.

A peer that sends a request byte by byte, or takes an answer so, holds a file descriptor, and an
answer's bytes in memory. Bodies under way have their own limit, in `edge.read_body`.
"""

import asyncio
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_OWED_S: Final = 30.0
"""Longest time for the head of a request, or for the rest of a body that was refused."""
_STALLED_S: Final = 60.0
"""Longest time for the peer to take what fits into the buffers of a connection."""


class Connection(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with an end to waiting.

    Guarantees:
        1. A connection that has begun but not finished the head of a request is closed in time,
           however its bytes trickle in; so is one whose peer takes no bytes.
        2. A request under way, such as a long poll, and an idle connection are left alone.
    """

    _owed: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a head."""
        super().connection_made(transport)
        self._owed = self.loop.call_later(_OWED_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Read on; what has begun must end in time."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Answered; the rest of the request may still be on its way."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The buffers are full."""
        super().pause_writing()
        self._stalled = self.loop.call_later(_STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The buffers are nearly empty."""
        super().resume_writing()
        _cancel(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        super().connection_lost(exc)
        _cancel(self._owed)
        _cancel(self._stalled)

    def _watch(self) -> None:
        if not self._is_owed():
            _cancel(self._owed)
            self._owed = None
        elif self._owed is None:
            self._owed = self.loop.call_later(_OWED_S, self.transport.abort)

    def _is_owed(self) -> bool:
        if self.conn.their_state is h11.IDLE:
            return bool(self.conn.trailing_data[0])
        return self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
