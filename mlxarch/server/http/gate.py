"""Admission of requests: head and body are checked before any endpoint runs.

The gate also turns exceptions into responses, cancels the work of clients that are gone, and writes
one line a request to the log.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxarch.server.http.access import AccessRules, body_too_large, cors_headers
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import ApiError, error_body, status_for, to_api_error
from mlxarch.server.http.responses import encode_json
from mlxarch.server.settings import BODY_SECONDS, MAX_BODY_BYTES, MAX_REQUESTS

logger = logging.getLogger("mlxarch.server")
_MOST_DRAINED = 2 * MAX_BODY_BYTES
_DRAIN_SECONDS = 1.0


class Gate:
    """ASGI application around the endpoints.

    Args:
        app: the endpoints.
        rules: rules of access.
        methods: methods that a path takes; empty for a path that does not exist.

    Attributes:
        closing: whether new requests are refused, since the server is about to end.
    """

    def __init__(
        self, app: ASGIApp, rules: AccessRules, methods: Callable[[str], Sequence[str]]
    ) -> None:
        self._app = app
        self._methods = methods
        self._rules = rules
        self._active = 0
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the start and end of the server."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext.begin(scope)
        headers = Headers(scope=scope)
        response = _Response(scope, context, send, self._origin(headers))
        self._active += 1
        try:
            await self._handle(scope, headers, receive, context, response)
        except Exception as error:
            if not context.body_is_read:
                await _drain(receive, headers)
            await response.fail(error, self._methods(scope["path"]))
        finally:
            self._active -= 1
            context.cleanup.close()
            _log(scope, context, response)

    def _origin(self, headers: Headers) -> str | None:
        origin = headers.get("origin")
        return origin if origin is not None and self._rules.allows_origin(origin) else None

    async def _handle(
        self,
        scope: Scope,
        headers: Headers,
        receive: Receive,
        context: RequestContext,
        response: "_Response",
    ) -> None:
        methods = self._methods(scope["path"])
        takes_post = "POST" in methods
        self._rules.check(scope["method"], scope["path"], headers, takes_post=takes_post)
        if scope["method"] == "OPTIONS":
            if not methods:
                raise HTTPException(404)
            await response.preflight([*methods, "OPTIONS"])
            return
        if scope["path"] != "/health":
            self._check_load()
        context.body = await _read_body(receive)
        context.body_is_read = True
        await _until_disconnect(self._app(scope, receive, response.send), receive, context)

    def _check_load(self) -> None:
        if self.closing:
            raise ApiError(503, "the server is shutting down", retry_after=10)
        if self._active > MAX_REQUESTS:
            raise ApiError(
                503,
                f"{self._active - 1} requests are being answered, the most at a time",
                code="too_many_requests",
                retry_after=5,
            )


class _Response:
    """Sending side of a request: adds headers to whatever the endpoint sends."""

    def __init__(
        self, scope: Scope, context: RequestContext, send: Send, origin: str | None
    ) -> None:
        self._scope = scope
        self._context = context
        self._send = send
        self._origin = origin
        self.status = 0

    async def send(self, message: Message) -> None:
        """ASGI ``send`` of the endpoint."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            context = self._context
            milliseconds = round((time.monotonic() - context.started) * 1000)
            extra = {
                "x-request-id": context.id,
                "request-id": context.id,
                "openai-processing-ms": str(milliseconds),
                "openai-version": "2020-10-01",
                "x-content-type-options": "nosniff",
            }
            raw = [(name.encode(), value.encode()) for name, value in extra.items()]
            headers = [*message.get("headers", ()), *raw, *cors_headers(self._origin)]
            message = {**message, "headers": headers}
        await self._send(message)

    async def fail(self, error: Exception, methods: Sequence[str]) -> None:
        """Answer with the API's error object, unless a response has begun.

        Args:
            methods: methods that the path takes.
        """
        refusal = to_api_error(error, methods)
        if refusal is not error and refusal.status >= 500:
            logger.error("%s failed", self._context.id, exc_info=error)
        self._context.log["error"] = refusal.code or type(error).__name__
        if self.status:
            raise error
        dialect = self._context.dialect
        status = status_for(dialect, refusal)
        # the rest of a body that was not read would be taken for the next request
        headers = {"content-type": "application/json", "connection": "close"}
        await self._answer(
            status,
            headers | refusal.headers(),
            encode_json(error_body(dialect, refusal, self._context.id)),
        )

    async def preflight(self, methods: Sequence[str]) -> None:
        """Answer the question of a browser whether its page may send a request."""
        raw = cors_headers(self._origin, methods)
        headers = {name.decode(): value.decode("latin-1") for name, value in raw}
        self._origin = None  # its headers are among these
        await self._answer(204, headers | {"allow": ", ".join(methods)}, b"")

    async def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        if status != 204:
            headers = headers | {"content-length": str(len(body))}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})


async def _read_body(receive: Receive) -> bytes:
    """Read a whole body within the limits of size and time."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client left before the body was complete")
                body += message.get("body", b"")
                if len(body) > MAX_BODY_BYTES:
                    raise body_too_large()
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the body was not complete after {BODY_SECONDS:.0f} seconds") from None


async def _drain(receive: Receive, headers: Headers) -> None:
    """Take the rest of the body of a request that is refused, within bounds.

    Closing a connection with bytes that nobody has read resets it, and the client may lose the
    response. One that waits for permission to send is not given it.
    """
    length = headers.get("content-length", "0")
    if "expect" in headers or not length.isdigit() or int(length) > _MOST_DRAINED:
        return
    left = _MOST_DRAINED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


async def _until_disconnect(work: Any, receive: Receive, context: RequestContext) -> None:
    """Run an endpoint, and cancel it when the client is gone."""

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            context.log["end"] = "client gone"
    finally:
        watch.cancel()
        task.cancel()  # does nothing to one that has ended
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _log(scope: Scope, context: RequestContext, response: _Response) -> None:
    """Write the line of a request; texts of prompts and answers are never part of it."""
    seconds = time.monotonic() - context.started
    figures = " ".join(f"{name}={value}" for name, value in context.log.items())
    path = scope["path"][:80].encode("ascii", "backslashreplace").decode()
    path = "".join(letter if letter.isprintable() else "?" for letter in path)
    status = response.status or "none"
    logger.info("%s %s %s %s %.3fs %s", context.id, scope["method"], path, status, seconds, figures)
