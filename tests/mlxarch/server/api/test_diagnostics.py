"""A miss of the prefix cache is explained, with the text that differs."""

from typing import Any

import pytest
from live_server import LiveServer

from mlxarch.server.prompt_history import PromptHistory, PromptRecord, compare

SYSTEM = "You are helpful. " * 4
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "go"},
]
TOOL = {"name": "f", "input_schema": {"type": "object"}}


def ask(server: LiveServer, previous: str | None, **fields: Any) -> dict[str, Any]:
    body = {"messages": TURNS[:1], "system": SYSTEM, "max_tokens": 1, **fields}
    return server.post(
        "/v1/messages", body | {"diagnostics": {"previous_message_id": previous}}
    ).json


def test_anthropic_is_told_the_text_that_differs(server: LiveServer):
    first = ask(server, None)
    assert first["diagnostics"] == {"cache_miss_reason": None}
    longer = ask(server, first["id"], messages=TURNS)
    assert longer["diagnostics"] == {"cache_miss_reason": None}
    assert "warnings" not in longer
    changed = ask(server, first["id"], system="You are hateful. " + SYSTEM[17:])
    reason = changed["diagnostics"]["cache_miss_reason"]
    assert reason["type"] == "system_changed"
    assert 0 < reason["cache_missed_input_tokens"] < 100
    assert reason["explanation"].startswith("system, character 9: «ateful.")
    assert "was «elpful." in changed["warnings"][0]
    turns = [{"role": "user", "content": "ho"}, *TURNS[1:]]
    assert kind(ask(server, longer["id"], messages=turns)) == "messages_changed"
    assert kind(ask(server, first["id"], tools=[TOOL])) == "tools_changed"
    assert kind(ask(server, "msg_unknown")) == "previous_message_not_found"
    stream = {"messages": TURNS[:1], "system": "other", "max_tokens": 1, "stream": True}
    stream["diagnostics"] = {"previous_message_id": first["id"]}
    [begin, *_] = server.post("/v1/messages", stream).events
    assert kind(begin["message"]) == "system_changed"


def kind(message: dict[str, Any]) -> str:
    return message["diagnostics"]["cache_miss_reason"]["type"]


def test_responses_are_told_as_well(server: LiveServer):
    def respond(previous: str | None, **fields: Any) -> dict[str, Any]:
        body = {"input": "a question", "max_output_tokens": 1, **fields}
        return server.post(
            "/v1/responses", body | {"prompt_cache_options": {"comparison_response_id": previous}}
        ).json

    first = respond(None)
    assert "prompt_cache_diagnostics" not in first
    assert respond(first["id"])["prompt_cache_diagnostics"] == {"type": "cache_hit"}
    miss = respond(first["id"], input="another question")["prompt_cache_diagnostics"]
    assert (miss["type"], miss["reason"]) == ("cache_miss", "input_changed")
    assert miss["comparison_reusable_tokens"] == 2  # the mark of the user, and "a"
    assert "«nother question" in miss["explanation"]
    unknown = respond("resp_x")["prompt_cache_diagnostics"]
    assert unknown == {"type": "comparison_response_not_found"}
    refused = server.post(
        "/v1/responses", {"input": "a", "prompt_cache_options": {"comparison_response_id": 1}}
    )
    assert refused.status == 400


def record(
    *texts: str, model: str = "m", effort: tuple[object, ...] = (), tokens: int = 100
) -> PromptRecord:
    messages = [{"role": "user", "content": text} for text in texts]
    return PromptRecord.of(model, messages, (), effort, range(tokens))


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (record("a", model="other"), "model_changed"),
        (record("a", effort=(True, None)), "effort_changed"),
        (record("b"), "messages_changed"),
        (record(), "messages_changed"),
        (record("a", tokens=50), None),
    ],
)
def test_the_part_that_changed_is_named(now: PromptRecord, reason: str | None):
    change = compare(record("a"), now)
    assert change is not None
    assert change.reason == reason


def test_a_prompt_that_goes_on_is_no_miss():
    assert compare(record("a"), record("a", "b", tokens=200)) is None
    assert compare(record("a"), record("a", tokens=90)) is None  # but for how the answer begins


def test_old_prompts_are_forgotten():
    history = PromptHistory()
    for number in range(300):
        history.add(str(number), record("a"))
    assert history.find("0") is None
    assert history.find("299") is not None
