"""Readers of each form: what models write, whole or character by character, sound or broken."""

import json
from typing import Any

import pytest
from tool_tokenizers import collect, make_tokenizer

from mlxarch import Tokenizer
from mlxarch.generation.answer import AnswerCollector, AnswerReader, Result
from mlxarch.generation.timings import Timings
from mlxarch.tool_calls.events import CallFailed, CallStarted
from mlxarch.tool_calls.tool import Tool
from mlxarch.tool_calls.use import ToolUse

TOOLS = [
    Tool(
        "f",
        parameters={
            "properties": {
                "s": {"type": "string"},
                "n": {"type": "integer"},
                "b": {"type": "boolean"},
                "o": {"type": ["object", "null"]},
                "a": {"anyOf": [{"type": "array"}, {"type": "string"}]},
            }
        },
    ),
    Tool("g"),
]
ANSWER = "{{ messages[-1].content }} "
DEEPSEEK_FENCED = (
    ANSWER
    + "{# <｜tool▁calls▁begin｜><｜tool▁calls▁end｜><｜tool▁call▁begin｜><｜tool▁sep｜><｜tool▁call▁end｜>```json #}"
)
OLMO = ANSWER + "{# <function_calls> #}"
BARE_KEYS = ANSWER + '{# <|tool_call>call: <tool_call|> <|"|> #}'
LFM = ANSWER + "{# <|tool_call_start|><|tool_call_end|> #}"
FENCED = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
    '{"n": 1}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
XML = "<tool_call>\n<function=f>\n<parameter=s>\na < b\n\n</parameter>\n<parameter=n>\n7\n</parameter>\n"

# Template, what the model writes, text of the answer, calls
SAMPLES: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    (
        "published/qwen3.jinja",
        'Wait.\n\n<tool_call>\n{"name": "f", "arguments": {"s": "a}\\"{", "n": 1}}\n</tool_call>\n'
        '<tool_call>{"name":"g","arguments":{}}</tool_call>',
        "Wait.",
        [("f", {"s": 'a}"{', "n": 1}), ("g", {})],
    ),
    (
        "published/qwen3.jinja",
        '<tool_call>\n{"arguments": {"n": 2}, "name": "f"}\n</tool_call>',
        "",
        [("f", {"n": 2})],
    ),
    (
        "published/qwen3.jinja",
        '<tool_call>\n{"name": "f", "arguments": "{\\"n\\": 3}"}',
        "",
        [("f", {"n": 3})],
    ),
    ("published/qwen3.jinja", "No call: { } [x] <tool", "No call: { } [x] <tool", []),
    (
        "published/qwen3_coder.jinja",
        XML + '<parameter=b>\nTrue\n</parameter>\n<parameter=o>\n{"k": null}\n</parameter>\n'
        "<parameter=a>\n[1, 2]\n</parameter>\n<parameter=new>\n5\n</parameter>\n</function>\n</tool_call>",
        "",
        [("f", {"s": "a < b\n", "n": 7, "b": True, "o": {"k": None}, "a": [1, 2], "new": "5"})],
    ),
    (
        "published/qwen3_coder.jinja",
        "So:\n<function=f>\n<parameter=n>\nseven\n</parameter>\n<parameter=o>\nNone\n</parameter>\n</function>",
        "So:",
        [("f", {"n": "seven", "o": None})],
    ),
    ("llama3.jinja", '{"name": "f", "parameters": {"n": 1.0}}', "", [("f", {"n": 1.0})]),
    (
        "llama3.jinja",
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"n": 1}}; {"name": "g", "parameters": {}}',
        "",
        [("f", {"n": 1}), ("g", {})],
    ),
    (
        "llama3.jinja",
        '{"answer": [1, {"name": 2}]} is JSON',
        '{"answer": [1, {"name": 2}]} is JSON',
        [],
    ),
    (
        "llama3.jinja",
        'Not first: {"name": "f", "parameters": {}}',
        'Not first: {"name": "f", "parameters": {}}',
        [],
    ),
    (
        "llama4.jinja",
        "[f(s=\"x, (y)\", n=-1, b=True, o=None, a=[1, 'z']), g()]",
        "",
        [("f", {"s": "x, (y)", "n": -1, "b": True, "o": None, "a": [1, "z"]}), ("g", {})],
    ),
    ("llama4.jinja", "<|python_start|>[g()]<|python_end|>", "", [("g", {})]),
    ("llama4.jinja", "[1] says so", "[1] says so", []),
    (
        "mistral_inst.jinja",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"n": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]',
        "",
        [("f", {"n": 1}), ("g", {})],
    ),
    (
        "mistral3.jinja",
        '[TOOL_CALLS]f[ARGS]{"n": 1}[TOOL_CALLS]g{}',
        "",
        [("f", {"n": 1}), ("g", {})],
    ),
    ("mistral3.jinja", 'Hm[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"n": 1}', "Hm", [("f", {"n": 1})]),
    (DEEPSEEK_FENCED, FENCED, "", [("f", {"n": 1}), ("g", {})]),
    (
        "kimi_k2.jinja",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>"
        '{"n": 1}<|tool_call_end|><|tool_calls_section_end|>',
        "",
        [("f", {"n": 1})],
    ),
    (
        "glm4_moe.jinja",
        "\n<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>two\nlines</arg_value>\n<arg_key>n</arg_key>\n"
        "<arg_value>4</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>",
        "",
        [("f", {"s": "two\nlines", "n": 4}), ("g", {})],
    ),
    (
        OLMO,
        'I look.\n<function_calls>\nf(s="it\'s", o={"k": [true, null]})\ng()\n</function_calls>',
        "I look.",
        [("f", {"s": "it's", "o": {"k": [True, None]}}), ("g", {})],
    ),
    (
        BARE_KEYS,
        'Hm.<|tool_call>call:f{s:<|"|>a, {b}<|"|>,n:-3,b:true,o:{k:[1,<|"|>x<|"|>],z:None}}<tool_call|>'
        "<|tool_call>call:g{}<tool_call|>",
        "Hm.",
        [("f", {"s": "a, {b}", "n": -3, "b": True, "o": {"k": [1, "x"], "z": None}}), ("g", {})],
    ),
    (LFM, "<|tool_call_start|>[f(n=1)]<|tool_call_end|>Done.", "Done.", [("f", {"n": 1})]),
]


def read(tokenizer: Tokenizer, text: str, stop: str | tuple[str, ...] = ()) -> Result:
    use = ToolUse.of(tokenizer, TOOLS)
    assert use is not None
    reader = AnswerReader(tokenizer, tokenizer.encode("x"), stop, use.parser())
    answer = AnswerCollector()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for event in collect(reader, tokens):
        answer.add(event)
    return answer.result(tokens, "stop", Timings(), reader.warnings)


@pytest.mark.parametrize(("template", "written", "text", "calls"), SAMPLES)
def test_what_models_write_is_read(
    template: str, written: str, text: str, calls: list[tuple[str, Any]]
) -> None:
    tokenizer = make_tokenizer(template, more=("<|python_tag|>",) if "llama" in template else ())
    result = read(tokenizer, written)
    assert [(call.name, call.arguments) for call in result.calls] == calls
    assert result.text == text
    assert len({call.id for call in result.calls}) == len(calls)


@pytest.mark.parametrize(
    ("template", "written", "text", "calls"),
    [sample for sample in SAMPLES if "<|python" not in sample[1]],  # these are tokens or nothing
)
def test_marks_that_are_spelled_with_ordinary_tokens_are_read_as_well(
    template: str, written: str, text: str, calls: list[tuple[str, Any]]
) -> None:
    tokenizer = make_tokenizer(template, marks=False)
    result = read(tokenizer, written)
    assert [(call.name, call.arguments) for call in result.calls] == calls
    assert result.text == text


@pytest.mark.parametrize(("template", "written"), [sample[:2] for sample in SAMPLES])
def test_a_parser_does_not_depend_on_how_its_text_is_cut(template: str, written: str) -> None:
    tokenizer = make_tokenizer(template, marks=False)
    use = ToolUse.of(tokenizer, TOOLS)
    assert use is not None
    found = []
    for pieces in ([written], list(written)):
        parser = use.parser()
        answer = AnswerCollector()
        parts = [part for piece in pieces for part in parser.add_text(piece)] + parser.finish()
        texts = "".join(part for part in parts if isinstance(part, str))
        for part in parts:
            if not isinstance(part, str):
                answer.add(part)
        calls = answer.result([], "stop", Timings()).calls
        found.append((texts, [(call.name, call.arguments) for call in calls]))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("template", "written", "started"),
    [
        ("published/qwen3.jinja", "<tool_call>\nsorry</tool_call> and more", False),
        ("published/qwen3.jinja", '<tool_call>\n{"name": "f", "arguments": {"s": "a', True),
        (
            "published/qwen3.jinja",
            '<tool_call>\n{"name": "f", "arguments": {"n": tru}}\n</tool_call>',
            True,
        ),
        (
            "published/qwen3.jinja",
            '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
            True,
        ),
        (
            "published/qwen3.jinja",
            '<tool_call>\n{"name": "f", "arguments": {"s": </tool_call>',
            True,
        ),
        ("published/qwen3_coder.jinja", XML, True),
        ("mistral_inst.jinja", "[TOOL_CALLS] none", False),
        ("kimi_k2.jinja", "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0", False),
        ("glm4_moe.jinja", "<tool_call>f\n<arg_key>s</arg_key>", True),
        (OLMO, "<function_calls>\nf(s=open(1))\n</function_calls>", True),
        (OLMO, "<function_calls>\nwhat now?", False),
        ("llama3.jinja", '{"name": "f", "parameters": {"n": ', True),
    ],
)
def test_a_broken_call_is_given_as_text_with_a_warning(
    template: str, written: str, started: bool
) -> None:
    tokenizer = make_tokenizer(template)
    result = read(tokenizer, written)
    assert not result.calls
    assert result.text.replace("\n", "") == written.replace("\n", "")
    assert len(result.warnings) == 1
    assert ("a call of" in result.warnings[0]) == started


def test_a_streaming_reader_learns_that_a_started_call_has_failed() -> None:
    tokenizer = make_tokenizer("published/qwen3.jinja")
    use = ToolUse.of(tokenizer, TOOLS)
    assert use is not None
    written = '<tool_call>\n{"name": "f", "arguments": {"n": tru}}\n</tool_call>'
    reader = AnswerReader(tokenizer, [1], (), use.parser())
    events = collect(reader, tokenizer.encode(written, add_special_tokens=False))
    assert isinstance(events[0], CallStarted)
    assert isinstance(events[-1], CallFailed) and "not JSON" in events[-1].reason


def test_stop_strings_apply_to_the_text_and_not_to_calls() -> None:
    tokenizer = make_tokenizer("published/qwen3.jinja")
    call = '<tool_call>\n{"name": "f", "arguments": {"s": "STOP"}}\n</tool_call>'
    result = read(tokenizer, f"Go STO{call}", stop="STOP")
    assert (result.text, len(result.calls)) == ("Go STO", 1)
    result = read(tokenizer, f"Go STOP{call}", stop="STOP")
    assert (result.text, result.calls) == ("Go ", [])


def test_calls_in_the_thinking_are_no_calls() -> None:
    tokenizer = make_tokenizer("published/qwen3.jinja")
    call = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    result = read(tokenizer, f"<think>\nI could {call}.\n</think>\n\n{call}")
    assert len(result.calls) == 1
    assert "I could" in result.thinking and "tool_call" in result.thinking


def test_a_noncharacter_in_the_text_is_no_mark() -> None:
    tokenizer = make_tokenizer("published/qwen3.jinja")
    use = ToolUse.of(tokenizer, TOOLS)
    assert use is not None
    parser = use.parser()
    parts = parser.add_text('\ufdd0{"name": "g", "arguments": {}}') + parser.finish()
    assert "".join(map(str, parts)) == '\ufffd{"name": "g", "arguments": {}}'


def test_ids_are_those_that_the_template_accepts() -> None:
    mistral = make_tokenizer("mistral3.jinja")
    [call] = read(mistral, '[TOOL_CALLS]f[ARGS]{"n": 1}').calls
    assert len(call.id) == 9 and call.id.isalnum()
    [call] = read(mistral, "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}").calls
    assert call.id == "abcdefghi"
    use = ToolUse.of(mistral, TOOLS)
    assert use is not None
    given = {"id": "call_from_another_server", "function": {"name": "f", "arguments": "{}"}}
    history = [
        {"role": "assistant", "content": None, "tool_calls": [given]},
        {"role": "tool", "tool_call_id": "call_from_another_server", "content": "x"},
    ]
    rendered, _ = use.prompt(mistral, history)
    made = rendered[0]["tool_calls"][0]["id"]
    assert len(made) == 9 and rendered[1]["tool_call_id"] == made
    [call] = read(make_tokenizer("kimi_k2.jinja"), SAMPLES[17][1]).calls
    assert call.id == "functions.f:3"


def test_a_result_is_a_message() -> None:
    [call] = read(make_tokenizer("llama3.jinja"), '{"name": "g", "parameters": {}}').calls
    message = call.result({"a": [1, None]})
    assert message["tool_call_id"] == call.id
    assert json.loads(message["content"]) == {"a": [1, None]}
