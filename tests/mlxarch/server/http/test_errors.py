"""Errors in the forms of the three APIs."""

import pytest

from mlxarch.errors import (
    ContextLengthError,
    DoesNotFit,
    EngineStopped,
    InvalidInput,
    MemoryBudgetError,
    ModelNotFound,
    QueueFull,
    StreamError,
    TokenizerError,
)
from mlxarch.server.http.errors import (
    ApiError,
    dialect_of,
    error_body,
    invalid,
    status_for,
    to_api_error,
)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextLengthError("long"), 400, "context_length_exceeded"),
        (DoesNotFit("big"), 400, "memory_exceeded"),
        (MemoryBudgetError("big"), 400, "model_does_not_fit"),
        (InvalidInput("wrong"), 400, None),
        (TokenizerError("wrong"), 400, None),
        (ModelNotFound("none"), 404, "model_not_found"),
        (QueueFull("full", 7), 503, "queue_full"),
        (EngineStopped("gone"), 503, None),
    ],
)
def test_an_error_of_the_library_has_a_status(error, status, code):
    refusal = to_api_error(error)
    assert (refusal.status, refusal.code) == (status, code)


@pytest.mark.parametrize(
    "error", [StreamError("/secret/path"), KeyError("/secret/path"), OSError(2, "x", "/secret")]
)
def test_a_fault_of_the_server_tells_nothing_of_its_cause(error):
    refusal = to_api_error(error)
    assert refusal.status == 500
    assert "secret" not in refusal.message
    assert refusal.headers() == {"x-should-retry": "false"}


def test_only_what_passes_is_worth_a_repetition():
    assert to_api_error(QueueFull("full", 7)).headers()["retry-after"] == "7"
    assert to_api_error(EngineStopped("gone")).headers() == {"x-should-retry": "false"}
    assert invalid("x").headers() == {}


def test_each_api_has_its_form():
    refusal = invalid("is wrong", "messages[0]", "bad")
    openai = {
        "message": "is wrong",
        "type": "invalid_request_error",
        "param": "messages[0]",
        "code": "bad",
    }
    assert error_body("openai", refusal, "r") == {"error": openai}
    anthropic = {"type": "invalid_request_error", "message": "messages[0]: is wrong"}
    body = {"type": "error", "error": anthropic, "request_id": "r"}
    assert error_body("anthropic", refusal, "r") == body
    assert error_body("ollama", refusal, "r") == {"error": "is wrong"}
    full = ApiError(503, "full")
    assert [status_for(dialect, full) for dialect in ("openai", "anthropic", "ollama")] == [
        503,
        529,
        503,
    ]
    assert error_body("anthropic", full, "r")["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", "anthropic"),
        ("/messages/count_tokens", "anthropic"),
        ("/api/chat", "ollama"),
        ("/v1/chat/completions", "openai"),
        ("/", "openai"),
    ],
)
def test_the_path_says_the_api(path, dialect):
    assert dialect_of(path) == dialect
