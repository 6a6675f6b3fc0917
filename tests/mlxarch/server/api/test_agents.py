"""First requests of agents and chat programs, in the shapes that they send, against a real process."""

import json

from live_server import LiveServer

READ_FILE = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": "Absolute path."},
        "offset": {"type": "number"},
        "edits": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
    },
    "required": ["path"],
    "additionalProperties": False,
    "$schema": "http://json-schema.org/draft-07/schema#",
}  # fmt: skip
CHAT_TOOLS = [
    {
        "type": "function",
        "function": {"name": "read", "description": "Read a file.", "parameters": READ_FILE},
    }
]


def finished(reply) -> None:
    assert reply.status == 200, reply.body
    assert b"error" not in reply.body[:30], reply.body[:300]


def test_claude_code(server: LiveServer):
    assert server.request("HEAD", "/").status == 200
    mark = {"type": "ephemeral"}
    body = {
        "model": "tiny",
        "max_tokens": 32000,
        "stream": True,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cc_entrypoint=cli;"},
            {"type": "text", "text": "You are an agent.", "cache_control": mark},
            {"type": "text", "text": "Rules.", "cache_control": {**mark, "ttl": "1h"}},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>Today is Monday.</system-reminder>"},
                    {"type": "text", "text": "hi", "cache_control": mark},
                ],
            },
            {"role": "system", "content": [{"type": "text", "text": "Skills: none."}]},
        ],
        "tools": [
            {"name": "Read", "description": "Read.", "input_schema": READ_FILE, "eager_input_streaming": True}
        ],
        "metadata": {"user_id": "user_1_session_2"},
        "thinking": {"type": "adaptive", "display": "omitted"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }  # fmt: skip
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "x-app": "cli",
        "x-claude-code-session-id": "5",
        "authorization": "Bearer none",
        "x-stainless-lang": "js",
    }
    body["stop_sequences"] = list("abcdefgh")  # a random model would write until its limit
    reply = server.request("POST", "/v1/messages?beta=true", body, headers)
    finished(reply)
    events = reply.events
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "message_stop"
    warnings = " ".join(events[-2]["warnings"])
    assert "billing" in warnings
    assert "propertyNames" in warnings
    counted = server.post(
        "/v1/messages/count_tokens",
        {name: body[name] for name in ("model", "system", "messages", "tools", "thinking")},
    )
    assert counted.json["input_tokens"] > 50


def test_codex(server: LiveServer):
    function = {"type": "function", "name": "shell", "description": "", "strict": False}
    body = {
        "model": "tiny",
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        ],
        "tools": [
            {**function, "parameters": READ_FILE},
            {"type": "web_search", "external_web_access": False},
            {"type": "namespace", "name": "mcp", "description": "", "tools": [{**function, "parameters": {}}]},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "019a",
        "text": {"verbosity": "low"},
        "client_metadata": {"originator": "codex"},
        "max_output_tokens": 20,
    }  # fmt: skip
    reply = server.request(
        "POST", "/v1/responses", body, {"session-id": "019a", "originator": "codex"}
    )
    finished(reply)
    events = reply.events
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert "web_search" in " ".join(events[-1]["response"]["warnings"])


def test_agents_that_speak_chat_completions(server: LiveServer):
    system = {"role": "system", "content": "You are an agent."}
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "<env>"}],
    }
    history = [
        system,
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "so",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "read", "arguments": '{"path":"/a"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "b"}]},
    ]
    usage = {"stream_options": {"include_usage": True}}
    requests = {
        "opencode": {
            "messages": [system, parts],
            "tools": CHAT_TOOLS,
            "tool_choice": "auto",
            **usage,
        },
        "cline": {"messages": history, "tools": CHAT_TOOLS, "temperature": 0, **usage},
        "continue": {
            "messages": history,
            "tools": CHAT_TOOLS,
            "parallel_tool_calls": False,
            **usage,
        },
        "aider": {"messages": [system, parts], "temperature": 0},
        "webui": {"messages": [system, parts], "metadata": {"task": "title"}, **usage},
        "litellm": {"messages": [system, parts], "user": "u", "extra_headers": None},
    }
    del requests["litellm"]["extra_headers"]
    for name, body in requests.items():
        fields = {"model": "tiny", "stream": True, "max_tokens": 8}
        reply = server.request(
            "POST", "/v1/chat/completions", {**fields, **body}, {"x-session-affinity": "s"}
        )
        finished(reply)
        assert reply.events[-1] == "[DONE]", name


def test_content_as_text_and_as_parts_is_the_same_prompt(server: LiveServer):
    text = server.chat("hi").json["usage"]["prompt_tokens"]
    parts = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": parts}]
    body = {"messages": messages, "max_tokens": 1}
    assert server.post("/v1/chat/completions", body).json["usage"]["prompt_tokens"] == text


def test_programs_that_speak_ollama(server: LiveServer):
    assert server.get("/api/version").status == 200
    tags = server.get("/api/tags").json["models"]
    body = {
        "model": tags[0]["name"],
        "messages": [{"role": "user", "content": "hi"}],
        "options": {"num_ctx": 1024, "num_predict": 4, "num_thread": 4, "repeat_penalty": 1.1},
        "keep_alive": "5m",
        "tools": CHAT_TOOLS,
        "stream": True,
    }
    reply = server.post("/api/chat", body)
    finished(reply)
    assert json.loads(reply.body.splitlines()[-1])["done"] is True
