"""Calls of tools in every API, by a tiny model with the template of a family that calls tools."""

import json
import re
from collections.abc import Iterator

import anthropic
import ollama
import openai
import pytest
from house import ROOT
from live_server import LiveServer, running_server
from tiny_chat import make_chat_model

TEMPLATE = ROOT / "tests/fixtures/chat_templates/published/qwen3.jinja"
MARKS = {
    "<think>": False, "</think>": False, "<tool_call>": False, "</tool_call>": False,
    "<|im_start|>": True, "<|im_end|>": True,
}  # fmt: skip
PARAMETERS = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"enum": [1, 2]}},
    "required": ["unit", "days"],
}
FUNCTION = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}
OTHER = {"name": "news", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": each} for each in (FUNCTION, OTHER)]
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of a model that calls tools."""
    folder = tmp_path_factory.mktemp("served") / "calling"
    make_chat_model(folder, template=TEMPLATE.read_text(), marks=MARKS)
    with running_server([folder]) as live:
        live.wait_until_ready()
        yield live


def ask(server: LiveServer, **fields):
    body = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 400, "enable_thinking": False}
    return server.chat(**(body | fields))


def sound(name: str, arguments: str) -> bool:
    value = json.loads(arguments)
    if name == "news":
        return value == {}
    return name == "weather" and value["unit"] in ("C", "F") and value["days"] in (1, 2)


def test_a_required_call_follows_its_schema(calling: LiveServer):
    for seed in range(4):
        reply = ask(calling, seed=seed, temperature=1.0, parallel_tool_calls=False)
        [choice] = reply.json["choices"]
        assert choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        assert choice["message"]["content"] is None
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        assert sound(call["function"]["name"], call["function"]["arguments"])


def test_a_named_call_is_made(calling: LiveServer):
    choice = {"type": "function", "function": {"name": "weather"}}
    for seed in range(3):
        [answer] = ask(calling, tool_choice=choice, seed=seed, temperature=1.0).json["choices"]
        assert answer["message"]["tool_calls"][0]["function"]["name"] == "weather"
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOLS[1]]}}
    [answer] = ask(calling, tool_choice=allowed, parallel_tool_calls=False).json["choices"]
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "news"


def test_a_call_is_streamed_in_parts(calling: LiveServer):
    fields = {"seed": 1, "temperature": 1.0, "parallel_tool_calls": False}
    [choice] = ask(calling, **fields).json["choices"]
    [call] = choice["message"]["tool_calls"]
    events = ask(calling, stream=True, **fields).events
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert parts[0]["type"] == "function"
    assert parts[0]["id"].startswith("call_")
    assert parts[0]["function"] == {"name": call["function"]["name"], "arguments": ""}
    assert all(set(part) == {"index", "function"} for part in parts[1:])
    assert {part["index"] for part in parts} == {0}
    joined = "".join(part["function"]["arguments"] for part in parts)
    assert (joined or "{}") == call["function"]["arguments"]
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_no_call_is_made_where_none_is_wanted(calling: LiveServer):
    [choice] = ask(calling, tool_choice="none", max_tokens=5).json["choices"]
    assert "tool_calls" not in choice["message"]
    without = calling.chat(enable_thinking=False).json["usage"]["prompt_tokens"]
    assert ask(calling, tool_choice="none").json["usage"]["prompt_tokens"] == without


def test_results_of_calls_come_back(calling: LiveServer):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"days": 1}'},
    }
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    for tools in (TOOLS, None):
        body = {"messages": messages, "max_tokens": 3, "enable_thinking": False, "tools": tools}
        assert calling.post("/v1/chat/completions", body).status == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom"}]}, "tools[0].custom"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": None}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": {"type": "thing"}}, "tool_choice.type"),
    ],
)
def test_a_wrong_tool_is_named(calling: LiveServer, fields, param):
    reply = ask(calling, **fields)
    assert reply.status == 400
    assert reply.json["error"]["param"] == param


@pytest.fixture
def openai_client(calling: LiveServer):
    url = f"http://127.0.0.1:{calling.port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic_client(calling: LiveServer):
    url = f"http://127.0.0.1:{calling.port}"
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_the_package_of_openai_reads_calls(openai_client):
    client = openai_client
    arguments = {"model": "calling", "messages": USER, "tools": TOOLS, "tool_choice": "required",
                 "parallel_tool_calls": False, "max_tokens": 500, "seed": 3,
                 "extra_body": {"enable_thinking": False}}  # fmt: skip
    with client.chat.completions.stream(**arguments) as stream:
        final = stream.get_final_completion()
    for call in final.choices[0].message.tool_calls:
        assert sound(call.function.name, call.function.arguments)
    tools = [{"type": "function", **FUNCTION}, {"type": "web_search"}]
    tools += [{"type": "namespace", "name": "shell", "tools": [{"type": "function", **OTHER}]}]
    with client.responses.stream(model="calling", input="hi", tools=tools, tool_choice="required",
                                 parallel_tool_calls=False, reasoning={"effort": "none"}) as stream:  # fmt: skip
        response = stream.get_final_response()
    [item] = response.output
    assert item.type == "function_call"
    assert sound(item.name, item.arguments)
    assert "web_search" in response.warnings[0]
    named = client.responses.create(model="calling", input="hi", tools=tools, parallel_tool_calls=False,
                                    tool_choice={"type": "function", "name": "shell.news"},
                                    reasoning={"effort": "none"})  # fmt: skip
    assert named.output[0].name == "news"
    assert named.output[0].namespace == "shell"
    again = client.responses.create(
        model="calling", previous_response_id=named.id, tools=tools, max_output_tokens=20,
        input=[{"type": "function_call_output", "call_id": named.output[0].call_id, "output": "5"}],
    )  # fmt: skip
    assert again.id != named.id


def test_the_package_of_anthropic_reads_calls(anthropic_client):
    client = anthropic_client
    tools = [
        {"name": "weather", "description": "The weather.", "input_schema": PARAMETERS},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    arguments = {"model": "calling", "messages": USER, "tools": tools, "max_tokens": 900,
                 "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
                 "thinking": {"type": "disabled"}}  # fmt: skip
    message = client.messages.create(**arguments)
    assert message.stop_reason == "tool_use"
    [block] = message.content
    assert block.id.startswith("toolu_")
    assert sound(block.name, json.dumps(block.input))
    with client.messages.stream(**arguments) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert sound(final.content[0].name, json.dumps(final.content[0].input))
    counted = client.messages.count_tokens(
        model="calling", messages=USER, tools=tools, thinking={"type": "disabled"}
    )
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
    messages = [
        *USER,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    after = client.messages.create(model="calling", messages=messages, tools=tools, max_tokens=20)
    assert after.usage.input_tokens + after.usage.cache_read_input_tokens > counted.input_tokens


def test_the_package_of_ollama_offers_tools(calling: LiveServer):
    with ollama.Client(f"http://127.0.0.1:{calling.port}") as client:
        options = {"num_predict": 20, "temperature": 1, "seed": 1}
        whole = client.chat("calling", USER, tools=TOOLS, options=options, think=False)
        assert whole.message.role == "assistant"
        assert client.show("calling").capabilities == ["completion", "thinking", "tools"]


REGEX = {"type": "grammar", "syntax": "regex", "definition": "[ab]{3}"}
CUSTOM = {"type": "custom", "name": "letters", "format": REGEX}


def test_a_custom_tool_gets_text_of_its_grammar(calling: LiveServer):
    grammar = {"syntax": "regex", "definition": "[ab]{3}"}
    custom = {"name": "letters", "format": {"type": "grammar", "grammar": grammar}}
    fields = {"tools": [{"type": "custom", "custom": custom}], "parallel_tool_calls": False}
    [call] = ask(calling, **fields).json["choices"][0]["message"]["tool_calls"]
    assert call["type"] == "custom"
    assert re.fullmatch("[ab]{3}", call["custom"]["input"])
    events = ask(calling, stream=True, **fields).events[:-1]
    parts = [
        part for event in events for part in event["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert parts[0]["custom"] == {"name": "letters"}
    assert parts[1]["custom"] == {"input": call["custom"]["input"]}
    back = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "ok"},
    ]
    assert calling.chat(messages=back, max_tokens=1).status == 200


def test_a_custom_tool_is_called_in_responses(calling: LiveServer):
    body = {"input": "hi", "tools": [CUSTOM], "parallel_tool_calls": False, "stream": True}
    body |= {"tool_choice": {"type": "custom", "name": "letters"}, "temperature": 0}
    body["reasoning"] = {"effort": "none"}
    events = calling.post("/v1/responses", body).events
    [item] = events[-1]["response"]["output"]
    assert item["type"] == "custom_tool_call"
    assert re.fullmatch("[ab]{3}", item["input"])
    done = next(e for e in events if e["type"] == "response.custom_tool_call_input.done")
    assert done["input"] == item["input"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    output = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "ok"}
    turn = [{"role": "user", "content": "hi"}, item, output]
    again = calling.post("/v1/responses", {"input": turn, "max_output_tokens": 16})
    assert again.status == 200


def test_a_custom_tool_of_another_form_is_refused_or_warned_of(calling: LiveServer):
    def reply(**form):
        tool = CUSTOM | {"format": form}
        body = {"input": "hi", "tools": [tool], "max_output_tokens": 1}
        return calling.post("/v1/responses", body)

    assert reply(type="text").status == 200
    assert (
        "tools[0].format"
        in reply(type="grammar", syntax="bnf", definition="x").json["error"]["message"]
    )
    assert reply(type="grammar", syntax="regex", definition="(").status == 400
    for wrong in ("start: (", "start: @other", 'start: "a"\n%import common(', "start: missing"):
        assert reply(type="grammar", syntax="lark", definition=wrong).status == 400


def test_the_input_of_a_custom_tool_follows_its_grammar(calling: LiveServer):
    """Quotes, backslashes and newlines of the input stand escaped in the JSON that is written."""
    lark = 'start: ("say " QUOTED LF)~2\nQUOTED: /"[ab]{1,2}\\\\"/\n%import common.LF'
    form = {"type": "grammar", "syntax": "lark", "definition": lark}
    for seed in range(3):
        body = {"input": "hi", "tools": [CUSTOM | {"format": form}], "temperature": 1.0}
        body |= {"tool_choice": {"type": "custom", "name": "letters"}, "parallel_tool_calls": False}
        response = calling.post("/v1/responses", body | {"reasoning": {"effort": "none"}}).json
        assert "warnings" not in response
        [item] = response["output"]
        assert re.fullmatch(r'(say "[ab]{1,2}\\"\n){2}', item["input"]), seed
