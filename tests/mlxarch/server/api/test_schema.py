"""Answers in the form of a JSON schema, in every API."""

import json

import pytest
from live_server import LiveServer

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
UNIQUE = {
    "type": "array",
    "items": {"enum": [1]},
    "uniqueItems": True,
    "minItems": 2,
    "maxItems": 2,
}
USER = [{"role": "user", "content": "a"}]


def holds(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"ok", "n"} and value["n"] in (1, 2)


def test_chat_holds_a_schema(server: LiveServer):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for stream in (False, True):
        for think in (False, True):
            reply = server.chat(
                response_format=form, max_tokens=300, stream=stream, enable_thinking=think,
                stop=None, seed=1, temperature=1.0, n=2,
            )  # fmt: skip
            if stream:
                choices = [each for event in reply.events[:-1] for each in event["choices"]]
                texts = [
                    "".join(c["delta"].get("content") or "" for c in choices if c["index"] == n)
                    for n in (0, 1)
                ]
                reasons = [c["finish_reason"] for c in choices if c["finish_reason"]]
            else:
                texts = [each["message"]["content"] for each in reply.json["choices"]]
                reasons = [each["finish_reason"] for each in reply.json["choices"]]
            for text, reason in zip(texts, reasons, strict=True):
                assert reason == "length" or holds(text)
            if not think:
                assert reasons == ["stop", "stop"]


def test_any_json_object_can_be_asked_for(server: LiveServer):
    reply = server.chat(
        response_format={"type": "json_object"}, max_tokens=400, temperature=1, seed=2
    )
    [choice] = reply.json["choices"]
    assert choice["message"]["content"].startswith("{")
    assert choice["finish_reason"] == "length" or isinstance(
        json.loads(choice["message"]["content"]), dict
    )


def test_the_other_apis_hold_it_as_well(server: LiveServer):
    body = {
        "messages": USER,
        "max_tokens": 100,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    }
    answer = server.post("/v1/messages", body).json
    assert holds(answer["content"][0]["text"])
    assert answer["stop_reason"] == "end_turn"
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    response = server.post("/v1/responses", {"input": "a", "text": {"format": form}}).json
    assert response["status"] == "completed"
    assert holds(response["output"][0]["content"][0]["text"])
    line = server.post(
        "/api/chat", {"model": "tiny", "messages": USER, "format": SCHEMA, "stream": False}
    ).json
    assert holds(line["message"]["content"])
    assert line["done_reason"] == "stop"


def test_what_a_grammar_cannot_hold_is_named(server: LiveServer):
    def ask(strict: bool):
        form = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": UNIQUE, "strict": strict},
        }
        return server.chat(response_format=form, max_tokens=50)

    refused = ask(strict=True)
    assert refused.status == 400
    assert "uniqueItems" in refused.json["error"]["message"]
    assert refused.json["error"]["code"] == "invalid_schema"
    warnings = " ".join(ask(strict=False).json["warnings"])
    assert "uniqueItems" in warnings  # [1, 1] is the only answer, and it is found afterwards


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": 5}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}},
        {"type": "xml"},
    ],
)
def test_what_is_no_schema_is_refused(server: LiveServer, form):
    reply = server.chat(response_format=form)
    assert reply.status == 400
    assert reply.json["error"]["param"].startswith("response_format")
    assert server.chat().status == 200
