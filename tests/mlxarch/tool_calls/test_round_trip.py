"""Calls of every family: written under the grammar, read while they stream, rendered again.

The next prompt begins with the tokens that the model wrote, or its KV cache would be of no use.
"""

import json
from typing import Any

import jsonschema
import pytest
from tool_tokenizers import collect, make_compiler, make_tokenizer, write

from mlxarch import Result, Tokenizer
from mlxarch.generation.answer import AnswerCollector, AnswerReader
from mlxarch.generation.answer_form import constrain
from mlxarch.generation.timings import Timings
from mlxarch.tool_calls.detect import call_form
from mlxarch.tool_calls.events import CallArguments, CallFinished, CallStarted
from mlxarch.tool_calls.use import ToolUse

SMALL = {"type": "integer", "minimum": 0, "maximum": 99}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 9},
            "days": SMALL,
            "metric": {"type": "boolean"},
            "unit": {"enum": ["C", "F"]},
            "hours": {"type": "array", "items": SMALL, "maxItems": 2},
        },
        "required": ["city", "days"],
    },
}
NOW = {"name": "now", "description": "Time of day."}
SCHEMAS = {"weather": WEATHER["parameters"] | {"additionalProperties": False}, "now": {}}
MESSAGES = [{"role": "user", "content": "Hi there"}]

# Template, form, variables of the template, what the model writes in front of its calls
FAMILIES: list[tuple[str, str, dict[str, Any], str]] = [
    ("published/qwen3.jinja", "TaggedObjects", {}, ""),
    ("qwen3_thinking.jinja", "TaggedObjects", {}, ""),
    ("published/qwen3_coder.jinja", "TaggedParameters", {}, ""),
    ("llama3.jinja", "BareCalls", {}, ""),
    ("llama4.jinja", "BareCalls", {}, ""),
    ("mistral3.jinja", "MarkedNames", {}, ""),
    ("mistral_inst.jinja", "MarkedList", {}, ""),
    ("deepseek_v3.jinja", "FencedSections", {}, ""),
    ("kimi_k2.jinja", "NumberedSections", {}, "<think></think>"),
    ("glm4_moe.jinja", "TaggedPairs", {"enable_thinking": False}, "\n"),
    *((name, "TaggedObjects", {}, "") for name in ("gemma.jinja", "grok2.jinja", "olmo2.jinja")),
    ("chatml_default_system.jinja", "TaggedObjects", {}, ""),
    ("published/smollm3.jinja", "TaggedObjects", {"enable_thinking": False}, ""),
]
# It writes an id behind the arguments of each call, which the model does not
ADDS_IDS = "mistral_inst.jinja"
DROPS_BLANK = "grok2.jinja"  # its prompt ends with a colon, and history has a blank behind it


def read(tokenizer: Tokenizer, use: ToolUse, prompt: list[int], tokens: list[int]) -> Result:
    reader = AnswerReader(tokenizer, prompt, (), use.parser())
    answer = AnswerCollector()
    for event in collect(reader, tokens):
        answer.add(event)
    return answer.result(tokens, "stop", Timings(), reader.warnings)


def render(tokenizer: Tokenizer, use: ToolUse, messages: Any, variables: Any) -> list[int]:
    given, offered = use.prompt(tokenizer, messages)
    return tokenizer.apply_chat_template(given, **{**variables, **offered})


@pytest.mark.parametrize(("template", "form", "variables", "before"), FAMILIES)
def test_calls_are_valid_and_the_next_prompt_begins_with_what_was_written(
    template: str, form: str, variables: dict[str, Any], before: str
) -> None:
    tokenizer = make_tokenizer(template)
    compiler = make_compiler(tokenizer)
    several = 0
    known = call_form(tokenizer)
    one_at_a_time = known is not None and not known.parallel
    for seed in range(7):
        parallel = seed % 2 == 0
        use = ToolUse.of(tokenizer, [WEATHER, NOW], "required", parallel)
        assert use is not None and type(use.form).__name__ == form
        prompt = render(tokenizer, use, MESSAGES, variables)
        compiled = use.compile(compiler)
        matcher = constrain(tokenizer, prompt, compiled.grammar, compiled.triggers)
        chosen, ended = write(tokenizer, matcher, seed)
        if not ended:
            continue
        text = tokenizer.decode(chosen, skip_special_tokens=False)
        tokens = tokenizer.encode(before + text.lstrip("\n"), add_special_tokens=False)
        result = read(tokenizer, use, prompt, tokens)
        assert result.calls and not result.text and result.warnings == use.warnings, text
        assert parallel or len(result.calls) == 1
        several += len(result.calls) > 1
        for call in result.calls:
            jsonschema.validate(json.loads(call.text), SCHEMAS[call.name])
            assert call.arguments == json.loads(call.text)
        results = [call.result("sunny") for call in result.calls]
        following = render(tokenizer, use, [*MESSAGES, result.message, *results], variables)
        written = [*prompt, *tokens]
        if template in (ADDS_IDS, DROPS_BLANK):
            assert following[: len(prompt)] == prompt
            assert following[: len(written)] != written
        else:
            assert following[: len(written)] == written, text
    assert several or one_at_a_time


@pytest.mark.parametrize(
    ("template", "header"),
    [
        ("harmony.jinja", "<|channel|>commentary to=functions.weather <|constrain|>json"),
        ("published/gpt_oss.jinja", " to=functions.weather<|channel|>commentary json"),
    ],
)
def test_messages_to_functions_are_calls(template: str, header: str) -> None:
    tokenizer = make_tokenizer(template, more=("<|constrain|>",))
    use = ToolUse.of(tokenizer, [WEATHER, NOW])
    assert use is not None
    prompt = render(tokenizer, use, MESSAGES, {})
    arguments = '{"city": "Köln", "days": 3}'
    text = (
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{header}<|message|>{arguments}"
    )
    tokens = tokenizer.encode(text, add_special_tokens=False)
    matcher = use.compile(make_compiler(tokenizer)).grammar.matcher()
    for token in tokens:
        mask = matcher.mask()
        assert mask is not None and mask[token]
        matcher.consume(token)
    assert matcher.stopped
    result = read(tokenizer, use, prompt, tokens)
    assert [(call.name, call.text) for call in result.calls] == [("weather", arguments)]
    assert (result.text, result.thinking) == ("", "Hm.")
    following = render(
        tokenizer, use, [*MESSAGES, result.message, result.calls[0].result("sunny")], {}
    )
    if template == "published/gpt_oss.jinja":
        written = [*prompt, *tokens]
        assert following[: len(written)] == written
    else:  # it drops the thinking
        assert tokenizer.decode(following, skip_special_tokens=False).count(header) == 1


@pytest.mark.parametrize("name", ["published/qwen3.jinja", "published/qwen3_coder.jinja"])
def test_arguments_are_passed_on_while_they_come(name: str) -> None:
    tokenizer = make_tokenizer(name)
    use = ToolUse.of(tokenizer, [WEATHER])
    assert use is not None
    city = "a long name of a city"
    text = f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}", "days": 1}}}}\n</tool_call>'
    if "coder" in name:
        text = (
            f"<tool_call>\n<function=weather>\n<parameter=city>\n{city}\n</parameter>\n"
            "<parameter=days>\n1\n</parameter>\n</function>\n</tool_call>"
        )
    reader = AnswerReader(tokenizer, render(tokenizer, use, MESSAGES, {}), (), use.parser())
    events = collect(reader, tokenizer.encode(text, add_special_tokens=False))
    assert isinstance(events[0], CallStarted) and isinstance(events[-1], CallFinished)
    parts = [event.text for event in events if isinstance(event, CallArguments)]
    assert len(parts) > 10
    assert json.loads("".join(parts)) == {"city": city, "days": 1}


@pytest.mark.parametrize("number", ["1.0", "1e3", "-0.50"])
def test_the_text_of_numbers_survives_where_the_template_takes_text(number: str) -> None:
    tokenizer = make_tokenizer("published/qwen3.jinja")
    use = ToolUse.of(tokenizer, [{"name": "f", "parameters": {"properties": {"x": {}}}}])
    assert use is not None
    prompt = render(tokenizer, use, MESSAGES, {})
    text = f'<tool_call>\n{{"name": "f", "arguments": {{"x":{number}}}}}\n</tool_call>'
    tokens = tokenizer.encode(text, add_special_tokens=False)
    result = read(tokenizer, use, prompt, tokens)
    results = [call.result(3) for call in result.calls]
    following = render(tokenizer, use, [*MESSAGES, result.message, *results], {})
    assert following[: len(prompt) + len(tokens)] == [*prompt, *tokens]
