"""Responses: JSON bodies, and streams of server-sent events or lines of JSON."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_encoder = msgspec.json.Encoder()


def encode_json(value: Any) -> bytes:
    """Encode a value as JSON."""
    return _encoder.encode(value)


def json_response(value: Any, status: int = 200) -> Response:
    """Response with a JSON body."""
    return Response(encode_json(value), status, media_type="application/json")


def sse(value: Any, event: str | None = None) -> bytes:
    """One server-sent event with a JSON value."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + encode_json(value) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"
SSE_COMMENT = b": keep-alive\n\n"


class Stream(Response):
    """Response whose body is sent piece by piece."""

    def __init__(self, pieces: AsyncIterator[bytes], media_type: str = "text/event-stream") -> None:
        self.status_code = 200
        self.background = None
        self._pieces = pieces
        self.media_type = media_type
        # no proxy may keep pieces back
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """Set the headers; there is no length."""
        kind = f"{self.media_type}; charset=utf-8"
        given = {"content-type": kind, **(headers or {})}
        self.raw_headers = [(name.encode(), value.encode()) for name, value in given.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head, then each piece when it is there."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
