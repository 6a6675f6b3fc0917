"""Anthropic's messages as clients see them."""

import pytest
from live_server import LiveServer


def ask(server: LiveServer, content="hi", **fields):
    messages = [{"role": "user", "content": content}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 0}
    return server.post("/v1/messages?beta=true", body | fields)


def test_an_answer_has_the_shape_of_the_api(server: LiveServer):
    answer = ask(server).json
    assert answer["type"] == "message"
    assert answer["id"].startswith("msg_")
    [block] = answer["content"]
    assert block["type"] == "text"
    assert len(block["text"]) == 5
    assert answer["stop_reason"] == "max_tokens"
    assert answer["stop_sequence"] is None
    usage = answer["usage"]
    parts = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert sum(usage[name] for name in parts) == 4
    assert usage["output_tokens"] == 5


def test_a_stream_has_events_in_order(server: LiveServer):
    whole = ask(server).json["content"][0]["text"]
    reply = ask(server, stream=True)
    events = reply.events
    names = [line[7:] for line in reply.body.decode().split("\n") if line.startswith("event: ")]
    kinds = [event["type"] for event in events]
    assert names == kinds
    deltas = [kind for kind in kinds if kind == "content_block_delta"]
    assert kinds == [
        "message_start",
        "content_block_start",
        *deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["output_tokens"] == 1
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == whole
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 5


def test_thinking_is_a_block_with_a_signature(server: LiveServer):
    switch = {"type": "enabled", "budget_tokens": 1024}
    # the prompt leaves a few tokens of the context
    fields = {"content": "x" * 1269, "max_tokens": 1025}
    answer = ask(server, thinking=switch, **fields).json
    [block] = answer["content"]
    assert block["type"] == "thinking"
    assert block["thinking"]
    assert block["signature"]
    assert "is limited to 8 tokens" in answer["warnings"][0]
    events = ask(server, thinking=switch, stream=True, **fields).events
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert deltas[-1] == {"type": "signature_delta", "signature": block["signature"]}
    assert "".join(delta.get("thinking", "") for delta in deltas) == block["thinking"]
    hidden = ask(server, thinking=switch | {"display": "omitted"}, **fields).json["content"][0]
    assert hidden == block | {"thinking": ""}


def test_an_edit_that_is_not_made_is_told(server: LiveServer):
    edits = [{"type": "clear_thinking_1", "keep": "all"}, {"type": "clear_tool_uses_1"}]
    warnings = ask(server, context_management={"edits": edits}).json["warnings"]
    assert len(warnings) == 1
    assert "clear_tool_uses_1" in warnings[0]


def test_a_stop_sequence_is_named(server: LiveServer):
    text = ask(server).json["content"][0]["text"]
    answer = ask(server, stop_sequences=["#none", text[2]]).json
    assert answer["stop_reason"] == "stop_sequence"
    assert answer["stop_sequence"] == text[2]


def test_tokens_are_counted_as_an_answer_counts_them(server: LiveServer):
    body = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
    }
    counted = server.post("/v1/messages/count_tokens", body).json["input_tokens"]
    usage = server.post("/v1/messages", body | {"max_tokens": 1}).json["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    marked = {"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}
    moved = body | {"messages": [{"role": "user", "content": [marked]}]}
    assert server.post("/v1/messages/count_tokens", moved).json["input_tokens"] == counted
    plain = body | {"messages": [{"role": "user", "content": "hello"}], "system": "be brief"}
    assert server.post("/v1/messages/count_tokens", plain).json["input_tokens"] == counted


def count(server: LiveServer, messages, **fields):
    body = {"messages": messages, **fields}
    return server.post("/v1/messages/count_tokens", body).json["input_tokens"]


def test_turns_of_tools_and_of_the_system_are_read(server: LiveServer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "now"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "5"}]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True},
                {"type": "text", "text": "c"},
            ],
        },
    ]  # fmt: skip
    assert count(server, messages) > 40


def test_the_line_that_changes_with_every_request_is_left_out(server: LiveServer):
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=fa690;"}
    system = {"type": "text", "text": "be brief"}
    answer = ask(server, system=[billing, system]).json
    assert "billing" in answer["warnings"][0]
    messages = [{"role": "user", "content": "hi"}]
    assert count(server, messages, system=[billing, system]) == count(
        server, messages, system="be brief"
    )


def test_a_last_turn_of_the_assistant_is_continued(server: LiveServer):
    first = ask(server, max_tokens=4).json["content"][0]["text"].rstrip()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first}]
    body = {"messages": messages, "max_tokens": 2, "temperature": 0}
    usage = server.post("/v1/messages", body).json["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 4 + len(first)


def test_a_limit_beyond_the_context_is_shortened_with_a_warning(server: LiveServer):
    answer = ask(server, max_tokens=32000, stop_sequences=list("etaoinshr~&,Jl;")).json
    assert "1276" in answer["warnings"][0]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"content": [{"type": "image", "source": {}}]}, "messages[0].content[0].type"),
        ({"messages": []}, "messages"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"temperature": 1.5}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
    ],
)
def test_a_wrong_field_is_named_in_the_form_of_the_api(server: LiveServer, fields, part):
    reply = ask(server, **fields)
    assert reply.status == 400
    body = reply.json
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(part)
    assert body["request_id"] == reply.headers["request-id"]


def test_a_model_that_is_not_served_is_not_found(server: LiveServer):
    reply = ask(server, model="claude-x")
    assert reply.status == 404
    assert reply.json["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("content", ["", [], [{"type": "text", "text": ""}]])
def test_a_turn_without_content_is_refused(server: LiveServer, content):
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        limit = {"max_tokens": 2} if path == "/v1/messages" else {}
        reply = server.post(path, {"messages": [{"role": "user", "content": content}], **limit})
        assert reply.status == 400
        assert reply.json["error"]["message"].startswith("messages[0].content")


def test_search_results_are_read(server: LiveServer):
    found = {"type": "search_result", "title": "ab", "source": "cd"}
    body = {
        "messages": [
            {"role": "user", "content": [found | {"content": [{"type": "text", "text": "efg"}]}]}
        ]
    }
    count = server.post("/v1/messages/count_tokens", body).json["input_tokens"]
    assert count == len("ab\ncd\nefg") + 2  # and the marks of the two turns
    assert (
        server.post(
            "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": [found]}]}
        ).status
        == 400
    )


def test_an_answer_that_fills_the_context_says_so(server: LiveServer):
    answer = ask(server, "x" * 1270, max_tokens=32000).json
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert answer["usage"]["output_tokens"] == 8
    assert ask(server, "x" * 1270, max_tokens=8).json["stop_reason"] == "max_tokens"
