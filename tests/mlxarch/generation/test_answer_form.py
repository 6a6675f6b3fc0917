"""Answers of a model under a schema or a grammar."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from talker import CONTEXT, VOCABULARY

import mlxarch
from mlxarch import LanguageModel
from mlxarch.blocks import CausalLM
from mlxarch.errors import InvalidInput, UnsupportedSchema

MESSAGES = [{"role": "user", "content": "hello"}]
END = 461


@dataclass
class Person:
    name: bool
    age: int


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "boolean"}, "age": {"type": "integer", "maximum": 999}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(talker: Path) -> LanguageModel:
    return mlxarch.load(talker)


@pytest.fixture
def likes(monkeypatch: pytest.MonkeyPatch, model: LanguageModel) -> Any:
    """Let the model like the tokens of a text, the first most."""

    def like(text: str) -> None:
        logits = [0.0] * VOCABULARY
        for rank, token in enumerate(model.tokenizer.encode(text, add_special_tokens=False)):
            logits[token] = max(logits[token], 100.0 - rank)
        row = mx.array(logits)

        def head(self: CausalLM, state: mx.array) -> mx.array:
            return mx.broadcast_to(row, (*state.shape[:2], VOCABULARY))

        monkeypatch.setattr(CausalLM, "head", head)

    return like


def test_an_answer_keeps_its_form_from_the_first_token_on(model: LanguageModel) -> None:
    free = model.generate(MESSAGES, temperature=1, seed=5, max_tokens=20)
    assert not free.text.startswith("{")
    held = model.generate(MESSAGES, temperature=1, seed=5, max_tokens=20, schema=Person)
    assert held.text.startswith('{"name": ')


def test_a_complete_answer_ends_without_an_end_token_and_is_parsed(
    model: LanguageModel, likes: Any
) -> None:
    likes('}7,"')
    result = model.generate(MESSAGES, schema=PERSON)
    assert result.finish_reason == "stop"
    assert result.tokens[-1] != END
    assert result.parsed == {"name": result.text.startswith('{"name": true'), "age": 7}
    assert model.generate(MESSAGES, schema=Person).parsed == Person(result.parsed["name"], 7)
    assert not result.warnings


def test_an_answer_that_is_cut_off_has_no_value(model: LanguageModel) -> None:
    result = model.generate(MESSAGES, schema=PERSON, max_tokens=3)
    assert (result.finish_reason, result.parsed) == ("length", None)


def test_seeds_and_greedy_answers_hold_and_the_session_goes_on(model: LanguageModel) -> None:
    session = model.session()
    first = model.generate(MESSAGES, schema=PERSON, session=session, temperature=1, seed=3)
    again = model.generate(MESSAGES, schema=PERSON, temperature=1, seed=3)
    assert first.tokens == again.tokens
    later = [*MESSAGES, {"role": "assistant", "content": first.text}, *MESSAGES]
    turn = model.generate(later, session=session, max_tokens=5)
    assert turn.timings.reused_tokens > 0
    assert turn.tokens == model.generate(later, max_tokens=5).tokens


def test_a_mask_changes_only_what_it_excludes(model: LanguageModel, likes: Any) -> None:
    likes("ab")
    plain = model.generate(MESSAGES, max_tokens=30, temperature=1, seed=1)
    masked = model.generate(
        MESSAGES, max_tokens=30, temperature=1, seed=1, grammar=model.grammars.regex("[a-z]*")
    )
    digits = model.grammars.regex("[0-9]*")
    other = model.generate(MESSAGES, max_tokens=30, temperature=1, seed=1, grammar=digits)
    assert masked.tokens == plain.tokens
    assert other.text.isdigit() and other.parsed is None and not other.warnings


def test_the_context_may_shift_while_a_grammar_holds(model: LanguageModel) -> None:
    digits = model.grammars.regex("[0-9]+")
    prompt = model.tokenizer.encode("x" * (CONTEXT - 10))
    result = model.generate(
        prompt[: CONTEXT - 10],
        grammar=digits,
        overflow="keep-ends",
        max_tokens=40,
        logit_bias={END: -100},
    )
    assert result.timings.dropped_tokens > 0
    assert result.text.isdigit()


def test_lenient_grammars_warn_and_check_the_finished_answer(
    model: LanguageModel, likes: Any
) -> None:
    likes("]7, ")
    schema = {"type": "array", "items": {"enum": [7]}, "minItems": 2, "uniqueItems": True}
    with pytest.raises(UnsupportedSchema, match="#/uniqueItems"):
        model.generate(MESSAGES, schema=schema)
    result = model.generate(MESSAGES, grammar=model.grammars.json_schema(schema))
    assert result.parsed == [7, 7]
    assert len(result.warnings) == 2
    assert "$ breaks uniqueItems" in result.warnings


def test_a_schema_and_a_grammar_exclude_each_other(model: LanguageModel) -> None:
    with pytest.raises(InvalidInput, match="a schema and a grammar"):
        model.generate(MESSAGES, schema=PERSON, grammar=model.grammars.json_object())


def test_an_answer_with_its_stop_string_inside_is_named(model: LanguageModel, likes: Any) -> None:
    likes('}7,"')
    result = model.generate(MESSAGES, schema=PERSON, stop="age")
    assert result.parsed is None
    assert "cannot be read" in result.warnings[0]


def test_a_batch_keeps_its_form_as_single_answers_do(model: LanguageModel, likes: Any) -> None:
    likes('}7,"')
    prompts = [MESSAGES, [{"role": "user", "content": "another"}]]
    held = model.generate_batch(prompts, schema=Person, top_logprobs=1)
    alone = [model.generate(prompt, schema=Person, top_logprobs=1) for prompt in prompts]
    for one, other in zip(held, alone, strict=True):
        assert isinstance(one.parsed, Person)
        assert (one.parsed, one.tokens, one.finish_reason) == (other.parsed, other.tokens, "stop")
        assert [each.token for each in one.logprobs] == one.tokens
    cut = model.generate_batch(prompts, schema=Person, max_tokens=3)
    assert [each.finish_reason for each in cut] == ["length", "length"]
    assert cut[0].parsed is None
