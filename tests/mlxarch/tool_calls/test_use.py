"""Grammars of answers with tools: when calls may, must or must not come, beside text and schemas."""

from typing import Any

import numpy as np
import pytest
from tool_tokenizers import collect, make_compiler, make_tokenizer, write

from mlxarch import Tokenizer
from mlxarch.errors import InvalidInput, UnsupportedSchema
from mlxarch.generation.answer import AnswerReader
from mlxarch.generation.answer_form import constrain
from mlxarch.structured_output.matcher import Matcher
from mlxarch.tool_calls.events import CallStarted
from mlxarch.tool_calls.use import ToolUse, framed_answer, render_calls

TOOLS = [{"name": "f", "parameters": {"properties": {"n": {"type": "boolean"}}}}, {"name": "g"}]
CALLS = {
    "published/qwen3.jinja": '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    "published/qwen3_coder.jinja": "<tool_call>\n<function=g>\n</function>\n</tool_call>",
    "llama3.jinja": '{"name": "g", "parameters": {}}',
    "llama4.jinja": '<|python_start|>{"name": "g", "parameters": {}}<|python_end|>',
    "mistral3.jinja": "[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}",
    "glm4_moe.jinja": "<tool_call>g\n</tool_call>",
    "published/gpt_oss.jinja": " to=functions.g<|channel|>commentary json<|message|>{}",
    '{{ messages[-1].content }} {# <|tool_call>call: <tool_call|> <|"|> #}': (
        "<|tool_call>call:g{}<tool_call|>"
    ),
    "{{ messages[-1].content }} {# <function_calls> #}": "<function_calls>\ng()\n</function_calls>",
}


def use_of(tokenizer: Tokenizer, **options: Any) -> ToolUse:
    use = ToolUse.of(tokenizer, TOOLS, **options)
    assert use is not None
    return use


def accepts(tokenizer: Tokenizer, matcher: Matcher, text: str) -> bool:
    """Whether a model may write a text and end there."""
    for token in tokenizer.encode(text, add_special_tokens=False):
        mask = matcher.mask()
        if matcher.stopped or (mask is not None and not mask[token]):
            return False
        matcher.consume(token)
    mask = None if matcher.stopped else matcher.mask()
    return matcher.stopped or mask is None or bool(mask[list(tokenizer.eos_ids)].any())


SPELLED = [name for name in CALLS if "oss" not in name and "llama4" not in name]


@pytest.mark.parametrize(
    ("template", "marks"), [*((name, True) for name in CALLS), *((name, False) for name in SPELLED)]
)
def test_a_choice_decides_about_calls(template: str, marks: bool) -> None:
    tokenizer = make_tokenizer(template, marks=marks)
    compiler = make_compiler(tokenizer)
    call = CALLS[template]
    text = "<|channel|>final<|message|>Text." if "oss" in template else "Text."

    def allowed(choice: str, written: str) -> bool:
        compiled = use_of(tokenizer, choice=choice).compile(compiler)
        return accepts(tokenizer, constrain(tokenizer, [1], *_begin(compiled)), written)

    assert allowed("auto", call) and allowed("required", call) and allowed("g", call)
    assert allowed("auto", text)
    assert not allowed("required", text) and not allowed("g", text)
    assert not allowed("f", call)


def _begin(compiled: Any) -> tuple[Any, frozenset[int]]:
    return compiled.grammar, compiled.triggers


def test_text_before_a_call_is_free_and_a_call_is_held() -> None:
    for marks in (True, False):
        tokenizer = make_tokenizer("published/qwen3.jinja", marks=marks)
        compiled = use_of(tokenizer).compile(make_compiler(tokenizer))
        for written, expected in (
            ("Let me see <tool\n" + CALLS["published/qwen3.jinja"], True),
            ('Hm <tool_call>\n{"name": "h", "arguments": {}}\n</tool_call>', False),
            ('Hm <tool_call>\n{"name": "g", "arguments": {"x": 1}}\n</tool_call>', False),
            ("Hm <tool_call>", False),
        ):
            matcher = constrain(tokenizer, [1], *_begin(compiled))
            assert accepts(tokenizer, matcher, written) is expected, (marks, written)


def test_a_family_with_a_mark_is_not_constrained_before_it() -> None:
    tokenizer = make_tokenizer("published/qwen3.jinja")
    matcher = constrain(
        tokenizer, [1], *_begin(use_of(tokenizer).compile(make_compiler(tokenizer)))
    )
    assert matcher.mask() is None
    matcher.consume(tokenizer.token_id("<tool_call>") or 0)
    mask = matcher.mask()
    assert mask is not None and np.count_nonzero(mask) == 1


def test_several_calls_come_only_if_they_may() -> None:
    tokenizer = make_tokenizer("published/qwen3.jinja")
    twice = "\n".join([CALLS["published/qwen3.jinja"]] * 2)
    for parallel in (True, False):
        compiled = use_of(tokenizer, choice="required", parallel=parallel).compile(
            make_compiler(tokenizer)
        )
        assert accepts(tokenizer, compiled.grammar.matcher(), twice) is parallel


@pytest.mark.parametrize("template", ["published/qwen3.jinja", "published/gpt_oss.jinja"])
def test_an_answer_with_a_schema_may_be_a_call_as_well(template: str) -> None:
    tokenizer = make_tokenizer(template)
    compiler = make_compiler(tokenizer)
    form = compiler.json_schema({"const": {"a": 1}})
    compiled = use_of(tokenizer).compile(compiler, form)
    frame = "<|channel|>final<|message|>" if "oss" in template else ""
    for written, expected in (
        (CALLS[template], True),
        (frame + '{"a": 1}', True),
        (frame + "text", False),
    ):
        assert accepts(tokenizer, compiled.grammar.matcher(), written) is expected


def test_a_schema_is_held_within_the_headers_of_a_channel() -> None:
    tokenizer = make_tokenizer("published/gpt_oss.jinja")
    compiler = make_compiler(tokenizer)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    form = compiler.json_schema({"type": "boolean"})
    framed = framed_answer(tokenizer, compiler, prompt, form)
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>true"
    )
    assert accepts(tokenizer, framed.matcher(), text)
    assert not accepts(tokenizer, framed.matcher(), "true")
    assert framed.is_json
    assert framed_answer(tokenizer, compiler, tokenizer.encode("raw text"), form) is form


def test_random_answers_of_an_unconstrained_form_give_calls_too() -> None:
    tokenizer = make_tokenizer("{{ messages[-1].content }} {# <function_calls> #}")
    use = use_of(tokenizer, choice="required")
    compiled = use.compile(make_compiler(tokenizer))
    for seed in range(5):
        tokens, ended = write(tokenizer, compiled.grammar.matcher(), seed)
        events = collect(AnswerReader(tokenizer, [1], (), use.parser()), tokens)
        assert not ended or any(isinstance(event, CallStarted) for event in events)


def test_values_with_bare_keys_follow_their_schema() -> None:
    tokenizer = make_tokenizer(
        '{{ messages[-1].content }} {# <|tool_call>call: <tool_call|> <|"|> #}'
    )
    unit = {"enum": ["C", "F"]}
    parameters = {
        "properties": {
            "s": {"type": "string"},
            "u": {"$ref": "#/$defs/unit"},
            "l": {"type": "array", "items": {"type": ["integer", "null"]}},
            "o": {"type": "object", "properties": {"k": {"type": "boolean"}}},
        },
        "required": ["s"],
        "$defs": {"unit": unit},
    }
    use = ToolUse.of(tokenizer, [{"name": "f", "parameters": parameters}], "required")
    assert use is not None
    compiled = use.compile(make_compiler(tokenizer))
    text = '<|"|>{}<|"|>'.format
    for arguments, expected in (
        (f"s:{text('a, b')}", True),
        (f"s:{text('')},u:{text('C')},l:[1,null],o:{{k:true}}", True),
        (f"s:{text('x')},o:{{}}", True),
        ("s:5", False),
        (f"u:{text('C')}", False),
        (f"s:{text('x')},u:{text('K')}", False),
        (f"s:{text('x')},o:{{j:1}}", False),
    ):
        written = f"<|tool_call>call:f{{{arguments}}}<tool_call|>"
        assert accepts(tokenizer, compiled.grammar.matcher(), written) is expected, arguments


def test_a_strict_tool_names_a_keyword_that_cannot_be_held_and_another_warns() -> None:
    tokenizer = make_tokenizer("published/qwen3.jinja")
    parameters = {"properties": {"t": {"type": "array", "uniqueItems": True}}}
    for strict in (True, False):
        use = ToolUse.of(tokenizer, [{"name": "f", "parameters": parameters, "strict": strict}])
        assert use is not None
        if strict:
            with pytest.raises(UnsupportedSchema, match="#/properties/t/uniqueItems"):
                use.compile(make_compiler(tokenizer))
        else:
            assert "uniqueItems" in use.compile(make_compiler(tokenizer)).warnings[0]


def test_wrong_choices_are_refused() -> None:
    tokenizer = make_tokenizer("published/qwen3.jinja")
    with pytest.raises(InvalidInput, match="auto, none, required, f, g"):
        use_of(tokenizer, choice="h")
    with pytest.raises(InvalidInput, match="no tools"):
        ToolUse.of(tokenizer, [], "required")
    assert ToolUse.of(tokenizer, []) is None


def test_a_template_without_tools_gets_them_described() -> None:
    tokenizer = make_tokenizer("gemma.jinja")
    use = use_of(tokenizer)
    assert not use.native and "no place for tools" in use.warnings[0]
    call = {"id": "1", "function": {"name": "g", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "two", "tool_call_id": "1"},
    ]
    given, variables = use.prompt(tokenizer, messages)
    text = tokenizer.apply_chat_template(given, tokenize=False, **variables)
    assert '"name": "g"' in text and text.count("<tool_response>") == 2
    assert messages[1]["tool_calls"] == [call, call]  # the caller's messages are left alone


def test_a_template_with_tools_of_its_own_name_gets_them_there() -> None:
    tokenizer = make_tokenizer("{{ xml_tools }} <tool_call> {{ messages[-1].content }}")
    assert list(use_of(tokenizer).prompt(tokenizer, [{"role": "user", "content": "x"}])[1]) == [
        "xml_tools"
    ]


@pytest.mark.parametrize("template", ["published/qwen3_coder.jinja", "gemma.jinja"])
def test_earlier_calls_are_rendered_where_no_tools_are_offered_any_more(template: str) -> None:
    tokenizer = make_tokenizer(template)
    plain = [{"role": "user", "content": "x"}]
    assert render_calls(tokenizer, plain) is plain
    call = {"id": "1", "type": "function", "function": {"name": "g", "arguments": '{"a": "b"}'}}
    messages = [
        *plain,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "one", "tool_call_id": "1"},
    ]
    text = tokenizer.apply_chat_template(render_calls(tokenizer, messages), tokenize=False)
    assert ("<function=g>" if "coder" in template else '"name": "g"') in text
    assert "<tool_response>" in text
