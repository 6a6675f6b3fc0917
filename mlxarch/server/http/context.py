"""State of one HTTP request, shared by the layers that handle it."""

import secrets
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

from mlxarch.server.http.errors import Dialect, dialect_of

KEY = "mlxarch"
_CONVERSATION_HEADERS = (
    "x-session-id",
    "x-session-affinity",
    "session-id",
    "x-claude-code-session-id",
)


@dataclass
class RequestContext:
    """State of one request.

    Attributes:
        dialect: API that the path belongs to.
        id: name of the request in headers and in the log.
        started: value of ``time.monotonic`` at its begin.
        body: body, complete.
        body_is_read: whether the body has been read to its end.
        cleanup: what is released when the response has been sent or the client is gone.
        log: figures for the line in the log, by name.
        conversation: name of the conversation that a header gives, a hint for the prefix cache.
        warnings: parts of the request that could not be followed, a sentence each.
    """

    dialect: Dialect
    id: str
    started: float
    body: bytes = b""
    body_is_read: bool = False
    cleanup: ExitStack = field(default_factory=ExitStack)
    log: dict[str, Any] = field(default_factory=dict)
    conversation: str | None = None
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, scope: Scope) -> "RequestContext":
        """Create the context of a request and attach it to its ASGI scope."""
        headers = Headers(scope=scope)
        dialect = dialect_of(scope["path"], "anthropic-version" in headers)
        context = cls(dialect, f"req_{secrets.token_hex(12)}", started=time.monotonic())
        found = (headers.get(name) for name in _CONVERSATION_HEADERS)
        context.conversation = next((value for value in found if value), None)
        scope[KEY] = context
        return context

    @classmethod
    def of(cls, scope: Scope) -> "RequestContext":
        """Return the context of a request."""
        return scope[KEY]

    def warn(self, sentence: str) -> None:
        """Add a warning, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)
