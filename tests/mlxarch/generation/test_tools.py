"""Calls of functions from Python, with a tiny model."""

from typing import Any

import pytest
from tiny_chat import make_chat_model
from tool_tokenizers import template_text

import mlxarch
from mlxarch import LanguageModel
from mlxarch.errors import InvalidInput
from mlxarch.tool_calls.events import CallArguments, CallFinished, CallStarted

MESSAGES = [{"role": "user", "content": "Hi"}]
MARKS = {
    "<tool_call>": False,
    "</tool_call>": False,
    "<think>": False,
    "</think>": False,
    "<|im_start|>": True,
    "<|im_end|>": True,
}


def switch(on: bool, level: int = 1) -> str:
    """Turn the lamp on or off."""
    return f"{on} {level}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = make_chat_model(
        tmp_path_factory.mktemp("models") / "tools",
        template=template_text("published/qwen3.jinja"),
        marks=MARKS,
    )
    return mlxarch.load(folder)


def generate(model: LanguageModel, **options: Any) -> Any:
    biases = {"<think>": -100.0, "}": 5.0}
    found = {model.tokenizer.token_id(text): value for text, value in biases.items()}
    bias = {token: value for token, value in found.items() if token is not None}
    assert len(bias) == 2
    return model.generate(MESSAGES, logit_bias=bias, seed=1, temperature=1.0, **options)


def test_a_required_call_comes_typed_and_its_result_goes_into_the_next_turn(
    model: LanguageModel,
) -> None:
    result = generate(
        model, tools=[switch], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    [call] = result.calls
    assert call.name == "switch" and isinstance(call.arguments["on"], bool)
    assert (result.text, result.finish_reason) == ("", "stop")
    messages = [*MESSAGES, result.message, call.result("done")]
    prompt = model.tokens_of(MESSAGES, {"tools": [_definition()]})
    following = model.tokens_of(messages, {"tools": [_definition()]})
    assert following[: len(prompt) + len(result.tokens)] == [*prompt, *result.tokens]


def _definition() -> dict[str, Any]:
    from mlxarch.tool_calls.tool import tool_of

    return tool_of(switch).definition


def test_a_stream_tells_a_call_as_it_comes(model: LanguageModel) -> None:
    pieces = list(
        model.stream(
            MESSAGES,
            tools=[switch],
            tool_choice="switch",
            logit_bias={model.tokenizer.token_id("<think>") or 0: -100.0},
            max_tokens=200,
        )
    )
    events = [piece.call for piece in pieces if piece.call is not None]
    assert isinstance(events[0], CallStarted) and events[0].name == "switch"
    assert isinstance(events[-1], CallFinished)
    assert sum(isinstance(event, CallArguments) for event in events) > 3
    assert not "".join(piece.text for piece in pieces)


def test_a_call_that_is_cut_off_is_given_as_text(model: LanguageModel) -> None:
    result = generate(model, tools=[switch], tool_choice="required", max_tokens=45)
    assert not result.calls and result.finish_reason == "length"
    assert result.text.startswith("<tool_call>\n{")
    assert "is given as text" in result.warnings[0]


def test_without_a_choice_text_is_free_and_none_calls_nothing(model: LanguageModel) -> None:
    plain = model.generate(MESSAGES, template={"tools": [_definition()]}, max_tokens=20)
    for choice in ("auto", "none"):
        offered = model.generate(MESSAGES, tools=[switch], tool_choice=choice, max_tokens=20)
        assert offered.tokens == plain.tokens


def test_tools_need_messages(model: LanguageModel) -> None:
    with pytest.raises(InvalidInput, match="messages"):
        model.generate("text", tools=[switch])
    with pytest.raises(InvalidInput, match="tool_choice"):
        model.generate(MESSAGES, tools=[switch], tool_choice="other")


def test_a_batch_calls_tools_as_single_answers_do(model: LanguageModel) -> None:
    bias = {model.tokenizer.token_id("<think>") or 0: -100.0}
    fields: Any = {
        "tools": [switch],
        "tool_choice": "switch",
        "max_tokens": 200,
        "logit_bias": bias,
    }
    fields["parallel_tool_calls"] = False
    one, other = model.generate_batch([MESSAGES, MESSAGES[:1]], **fields)
    assert one.calls and one.calls[0].name == "switch"
    assert one.tokens == model.generate(MESSAGES, **fields).tokens
    assert other.calls and other.finish_reason == "stop"
    with pytest.raises(InvalidInput, match=r"prompts\[1\]: tools need a prompt of messages"):
        model.generate_batch([MESSAGES, "text"], **fields)
