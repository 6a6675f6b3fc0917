"""Ollama's API as its clients see it."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from live_server import LiveServer

from mlxarch.server.answers.events import Delta, End
from mlxarch.server.api.ollama.endpoints import _Form
from mlxarch.server.http.context import RequestContext
from mlxarch.server.served_models import ServedModel
from mlxarch.tool_calls.events import CallArguments, CallFailed, CallFinished, CallStarted

OPTIONS = {"num_predict": 5, "temperature": 0}


def chat(server: LiveServer, content="hi", **fields):
    messages = [{"role": "user", "content": content}]
    return server.post(
        "/api/chat", {"model": "tiny", "messages": messages, "options": OPTIONS} | fields
    )


def lines(reply):
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in reply.body.splitlines()]


def test_chat_streams_unless_told_otherwise(server: LiveServer):
    whole = chat(server, stream=False).json
    assert whole["done"] is True
    assert whole["done_reason"] == "length"
    assert whole["message"]["role"] == "assistant"
    assert len(whole["message"]["content"]) == 5
    assert whole["eval_count"] == 5
    assert whole["prompt_eval_count"] == 4
    assert all(isinstance(whole[f"{name}_duration"], int) for name in ("total", "load", "eval"))
    streamed = lines(chat(server))
    assert "".join(line["message"]["content"] for line in streamed) == whole["message"]["content"]
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]


def test_thinking_has_a_field_of_its_own(server: LiveServer):
    message = chat(server, stream=False, think=True).json["message"]
    assert message["content"] == ""
    assert message["thinking"]


def test_logprobs_are_given_for_each_token(server: LiveServer):
    whole = chat(server, stream=False, logprobs=True, top_logprobs=2).json
    assert "".join(entry["token"] for entry in whole["logprobs"]) == whole["message"]["content"]
    streamed = lines(chat(server, logprobs=True, top_logprobs=2))
    assert [entry for line in streamed for entry in line.get("logprobs", [])] == whole["logprobs"]


def test_generate_answers_by_the_template_or_raw(server: LiveServer):
    body = {"model": "tiny:latest", "prompt": "hi", "stream": False, "options": OPTIONS}
    by_template = server.post("/api/generate", body).json
    assert by_template["response"] == chat(server, stream=False).json["message"]["content"]
    raw = server.post("/api/generate", body | {"raw": True}).json
    assert raw["prompt_eval_count"] == 2
    assert lines(server.post("/api/generate", body | {"stream": True}))[-1]["done"] is True


def test_models_are_listed_and_shown(server: LiveServer):
    assert server.get("/api/version").json["version"]
    [tag] = server.get("/api/tags").json["models"]
    assert tag["name"] == tag["model"] == "tiny"
    [loaded] = server.get("/api/ps").json["models"]
    assert loaded["context_length"] == 1280
    assert loaded["expires_at"].endswith("Z")
    shown = server.post("/api/show", {"model": "tiny"}).json
    assert shown["model_info"]["llama.context_length"] == 1280
    assert shown["capabilities"] == ["completion", "thinking"]
    assert "message.role" in shown["template"]


@pytest.mark.parametrize("path", ["pull", "push", "create", "copy", "delete", "blobs/sha256:0"])
def test_models_are_not_changed_by_requests(server: LiveServer, path):
    method = "DELETE" if path == "delete" else "POST"
    reply = server.request(method, f"/api/{path}", {"model": "org/evil"})
    assert reply.status == 403
    assert set(reply.json) == {"error"}
    assert "mlxarch pull" in reply.json["error"]


@pytest.mark.parametrize(
    ("fields", "status", "part"),
    [
        ({"frobnicate": 1}, 400, "frobnicate"),
        ({"options": {"frobnicate": 1}}, 400, "options.frobnicate"),
        ({"options": {"num_ctx": 100_000}}, 400, "1280"),
        ({"model": "other"}, 404, "tiny"),
        ({"messages": [{"role": "user", "content": "a", "images": ["aa"]}]}, 400, "images"),
        ({"keep_alive": "soon"}, 400, "keep_alive"),
    ],
)
def test_a_wrong_field_is_named_in_the_form_of_the_api(server: LiveServer, fields, status, part):
    reply = chat(server, **fields)
    assert reply.status == status
    assert set(reply.json) == {"error"}
    assert part in reply.json["error"]


def test_embeddings_are_refused_with_the_reason(server: LiveServer):
    assert "embed" in server.post("/api/embed", {"model": "tiny", "input": "a"}).json["error"]
    error = server.post("/v1/embeddings", {"model": "tiny", "input": "a"}).json["error"]
    assert error["code"] == "unsupported_model"


class Scripted:
    """Answers with a call, and one that is broken."""

    count = 1
    readers = (SimpleNamespace(whole=lambda thinking, text: (thinking, text)),)
    EVENTS = (
        Delta("so "), CallStarted(0, "call_a", "f"), CallArguments(0, '{"a": '), CallArguments(0, "1}"),
        CallFinished(0), CallStarted(1, "call_b", "g"), CallFailed(1, "<g", "broken"), End("tool_calls"),
    )  # fmt: skip

    async def events(self):
        for event in self.EVENTS:
            yield 0, event


def test_a_call_is_one_line_with_its_arguments_as_an_object():
    form = _Form(ServedModel("m", 0, 0), RequestContext("ollama", "r", 0.0), "chat")
    answers: Any = Scripted()

    async def read():
        return [json.loads(line) async for line in form.stream(answers)], await form.whole(answers)

    streamed, whole = asyncio.run(read())
    call = {"id": "call_a", "function": {"name": "f", "arguments": {"a": 1}}}
    assert [line["message"].get("tool_calls") for line in streamed] == [None, [call], None, None]
    assert [line["message"]["content"] for line in streamed] == ["so ", "", "<g", ""]
    assert whole["message"]["tool_calls"] == [call]
    assert whole["message"]["content"] == "so <g"
    assert whole["done_reason"] == "stop"


def test_a_model_may_be_kept_for_longer_than_there_are_dates(server: LiveServer):
    body = {"model": "tiny", "prompt": "a", "raw": True, "stream": False}
    body |= {"options": {"num_predict": 1}, "keep_alive": 1e300}
    assert server.post("/api/generate", body).status == 200
    assert server.get("/api/ps").status == 200
    assert server.post("/api/generate", body | {"keep_alive": "10m"}).status == 200


def test_a_system_text_beside_a_raw_prompt_is_warned_of(server: LiveServer):
    body = {"model": "tiny", "prompt": "ab", "system": "s", "stream": False}
    body["options"] = {"num_predict": 2, "stop": ["never"]}
    assert "warnings" not in server.post("/api/generate", body).json
    told = server.post("/api/generate", body | {"raw": True}).json
    assert told["warnings"] == ["system is not used: the prompt is read as it is"]


def test_a_stop_string_leaves_durations(server: LiveServer):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    body["options"] = {"temperature": 0, "num_predict": 8}
    text = server.post("/api/chat", body).json["message"]["content"]
    body["options"] |= {"stop": [text[4]]}
    stopped = server.post("/api/chat", body).json
    assert stopped["done_reason"] == "stop"
    assert stopped["total_duration"] >= stopped["eval_duration"] > 0


def test_a_model_to_show_is_named(server: LiveServer):
    assert server.post("/api/show", {}).status == 400
    assert server.post("/api/show", {"name": "tiny"}).status == 200
