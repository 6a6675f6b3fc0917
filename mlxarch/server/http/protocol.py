"""HTTP connections: uvicorn's protocol on h11, with limits of time and connections.

uvicorn alone waits for ever for a head that comes byte by byte, and for a client that does not read
its response.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlxarch.server.http.errors import ApiError, error_body
from mlxarch.server.http.responses import encode_json
from mlxarch.server.settings import HEADER_SECONDS, MAX_CONNECTIONS, STALLED_SECONDS


class LimitedProtocol(H11Protocol):
    """One connection of a client."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection; when there are too many, one without a request is closed."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            waiting = (each for each in self.connections if getattr(each, "awaits_head", False))
            victim: Any = next(waiting, self)
            victim.transport.abort()
        self._watch_head()

    @property
    def awaits_head(self) -> bool:
        """Whether the head of a request is incomplete."""
        return self._head_timer is not None

    def data_received(self, data: bytes) -> None:
        """Handle bytes of the client."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._head_timer = _stop(self._head_timer)
        self._stall_timer = _stop(self._stall_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Wait for a client that reads slowly, but not for ever."""
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing: the client has read."""
        self._stall_timer = _stop(self._stall_timer)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no HTTP request; h11 has found them wrong."""
        body = encode_json(error_body("openai", ApiError(400, msg), ""))
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # a response is under way, and cannot be taken back
            return
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch_head(self) -> None:
        """Run a timer while the head of a request is incomplete."""
        if self.conn.their_state is not h11.IDLE:
            self._head_timer = _stop(self._head_timer)
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEADER_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE:
            self.transport.abort()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
