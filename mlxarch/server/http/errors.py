"""Errors of the HTTP APIs: status codes, and the error objects of OpenAI, Anthropic and Ollama."""

from collections.abc import Sequence
from typing import Any, Literal

from starlette.exceptions import HTTPException

from mlxarch.errors import (
    ContextLengthError,
    DoesNotFit,
    EngineStopped,
    InvalidInput,
    MemoryBudgetError,
    MlxArchError,
    ModelNotFound,
    NonFiniteLogits,
    QueueFull,
    TokenizerError,
)

Dialect = Literal["openai", "anthropic", "ollama"]

_OPENAI_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "overloaded"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
_OPENAI_PATHS = ("/chat/", "/completions", "/responses", "/embeddings")
_OVERLOADED = 529  # Anthropic's status where others use 503


class ApiError(MlxArchError):
    """A request that is refused, with what the client is told.

    Args:
        status: HTTP status.
        message: the problem, allowed values and the remedy.
        code: name of the problem in OpenAI's API, such as "model_not_found".
        param: path of the field, such as "messages[2].content".
        retry_after: seconds after which a repetition may succeed; None where it cannot.
        allow: methods that the path takes, for a wrong one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.allow = allow

    def headers(self) -> dict[str, str]:
        """Headers that say whether and when to try again, and with which method."""
        if self.allow is not None:
            return {"allow": self.allow}
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        if self.retry_after is not None:
            seconds = max(1, round(self.retry_after))
            return {"retry-after": str(seconds), "x-should-retry": "true"}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Error 400 about a field of the request."""
    return ApiError(400, message, code=code, param=param)


def dialect_of(path: str, anthropic: bool = False) -> Dialect:
    """API that a path belongs to; paths of no other API are OpenAI's.

    Args:
        path: path of the request.
        anthropic: whether the request has a header that Anthropic's clients alone send. It decides
            on paths that OpenAI does not have for itself, such as the list of models.
    """
    if path.startswith("/api/"):
        return "ollama"
    short = path.removeprefix("/v1")
    if anthropic and not short.startswith(_OPENAI_PATHS):
        return "anthropic"
    return "anthropic" if short.startswith("/messages") else "openai"


def to_api_error(error: BaseException, methods: Sequence[str] = ()) -> ApiError:
    """Translate an exception; one that is no fault of the request says nothing about its cause.

    Args:
        error: the exception.
        methods: methods that the request's path takes.
    """
    message = str(error)
    match error:
        case ApiError():
            return error
        case HTTPException():
            return _routing_error(error, methods)
        case ContextLengthError():
            return invalid(message, code="context_length_exceeded")
        case DoesNotFit():
            return invalid(message, code="memory_exceeded")
        case MemoryBudgetError():
            return invalid(message, "model", "model_does_not_fit")
        case QueueFull():
            return ApiError(503, message, code="queue_full", retry_after=error.retry_after)
        case EngineStopped():
            return ApiError(503, "the model has stopped; the server is shutting down")
        case ModelNotFound():
            return ApiError(404, message, code="model_not_found", param="model")
        case InvalidInput() | TokenizerError():
            return invalid(message)
        case NonFiniteLogits():
            return ApiError(500, message, code="non_finite_logits")
    return ApiError(500, "the server failed to answer; its log has the cause")


def _routing_error(error: HTTPException, methods: Sequence[str]) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, "there is no such path; GET / lists those that there are")
    if error.status_code == 405:
        allowed = ", ".join(methods)
        message = f"this path does not take the method; it takes {allowed}"
        return ApiError(405, message, allow=allowed)
    return ApiError(error.status_code, str(error.detail))


def status_for(dialect: Dialect, error: ApiError) -> int:
    """HTTP status of an error in an API."""
    return _OVERLOADED if dialect == "anthropic" and error.status == 503 else error.status


def openai_error(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object; all four keys are always there."""
    kind = _OPENAI_TYPES.get(error.status, "invalid_request_error")
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def error_body(dialect: Dialect, error: ApiError, request_id: str) -> dict[str, Any]:
    """Body of an error in an API."""
    if dialect == "ollama":
        return {"error": error.message}
    if dialect == "openai":
        return {"error": openai_error(error)}
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    named = not error.param or error.message.startswith(error.param)
    message = error.message if named else f"{error.param}: {error.message}"
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id,
    }
