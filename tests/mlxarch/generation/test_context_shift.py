"""More tokens than the context holds: what is left out, what stays, and that the answer is that of what stays."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import parity
from mlxarch.blocks import CausalLM
from mlxarch.errors import ContextLengthError, InvalidInput
from mlxarch.generation.context_shift import KEPT_TOKENS, decode_with_shift, protected_tokens, shift
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.language_model import LanguageModel, load
from mlxarch.loading.load import load_model

CONTEXT, FIRST = 24, 4
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One two three. " * 40},
]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(parity.GOLDEN / "gpt_oss", dtype="float32")[0]


@pytest.fixture(scope="module")
def talking(talker: Path) -> LanguageModel:
    return load(talker, context=128)


@given(count=st.integers(1, 500), first=st.integers(0, 100), context=st.integers(1, 90))
def test_the_opening_and_the_latest_stay_and_fit(count: int, first: int, context: int) -> None:
    tokens = list(range(count))
    found = shift(tokens, first, context)
    if count < context:
        assert found == tokens
        return
    assert len(found) < context or context == 1
    assert len(found) >= context - max(context // 4, 1) or len(found) == count
    opened = min(first, max(context // 4, 1))
    gap = next((index for index, token in enumerate(found) if token != index), len(found))
    assert gap >= min(opened, len(found))
    assert found[gap:] == tokens[count - len(found) + gap :]


@given(count=st.integers(24, 300))
def test_most_tokens_only_add_to_what_was_left(count: int) -> None:
    before, after = (shift(list(range(n)), FIRST, CONTEXT) for n in (count, count + 1))
    assert after == [*before, count] or len(before) == CONTEXT - 1


def test_an_answer_goes_on_as_if_only_what_is_left_had_been_said(
    model: CausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlxarch.generation.context_shift")
    prompt, session = list(range(3, 20)), Session(model.make_caches())
    steps = list(decode_with_shift(model, session, prompt, Sampling(), 30, CONTEXT, FIRST))
    found, timings = [token for token, _ in steps], steps[-1][1]
    whole = prompt + found
    for index in range(30):
        view = shift(whole[: len(prompt) + index], FIRST, CONTEXT)
        [(token, _)] = decode(model, Session(model.make_caches()), view, Sampling(), 1)
        assert token == found[index]
    assert (timings.prompt_tokens, timings.generated_tokens, timings.dropped_tokens) == (17, 30, 24)
    assert len(session.tokens) < CONTEXT
    assert [
        record.levelno
        for record in caplog.records
        if record.name == "mlxarch.generation.context_shift"
    ] == [logging.INFO] * 4
    # negative control: with all of it in view it is another answer
    assert found != [
        token for token, _ in decode(model, Session(model.make_caches()), prompt, Sampling(), 30)
    ]


def test_a_draw_is_repeatable_and_does_not_begin_anew_where_something_is_left_out(
    model: CausalLM,
) -> None:
    sampling = Sampling(temperature=1.0, seed=2**64 - 1)

    def drawn() -> list[int]:
        session = Session(model.make_caches())
        return [
            token
            for token, _ in decode_with_shift(
                model, session, [5, 6, 7], sampling, 60, CONTEXT, FIRST
            )
        ]

    assert drawn() == drawn()


def test_a_later_turn_ends_an_answer_even_between_two_views(model: CausalLM) -> None:
    session, prompt = Session(model.make_caches()), list(range(3, 20))
    steps = decode_with_shift(model, session, prompt, Sampling(), 60, CONTEXT, FIRST)
    for _ in range(CONTEXT - len(prompt)):
        next(steps)
    list(decode(model, session, [9, 8, 7], Sampling(), 2))
    with pytest.raises(InvalidInput, match="another turn"):
        next(steps)


def test_a_prompt_that_is_too_long_is_refused_unless_its_middle_may_go(
    talking: LanguageModel,
) -> None:
    with pytest.raises(ContextLengthError, match="do not fit into the context of 128 tokens"):
        talking.generate(MESSAGES, max_tokens=5)
    result = talking.generate(MESSAGES, max_tokens=5, overflow="keep-ends")
    tokens = talking.tokens_of(MESSAGES)
    assert result.timings.prompt_tokens == len(tokens) > 128
    assert result.timings.dropped_tokens >= len(tokens) - 128
    first = protected_tokens(MESSAGES, tokens, talking.tokens_of)
    assert "Be brief." in talking.tokenizer.decode(tokens[:first], skip_special_tokens=False)
    assert result.tokens == talking.generate(shift(tokens, first, 128), max_tokens=5).tokens
    with pytest.raises(InvalidInput, match="overflow must be refuse or keep-ends, found 'shift'"):
        talking.stream("Hello", overflow="shift")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="max_tokens must be a whole number"):
        talking.stream("Hello", overflow="keep-ends", max_tokens=0)


def test_an_answer_may_be_longer_than_the_context(talking: LanguageModel) -> None:
    result = talking.generate(
        "One two",
        max_tokens=300,
        overflow="keep-ends",
        logit_bias=dict.fromkeys(talking.tokenizer.eos_ids, -99),
    )
    assert len(result.tokens) == 300 and result.finish_reason == "length"
    assert talking.generate("One two", overflow="keep-ends").timings.generated_tokens <= 128


def test_the_turns_of_a_long_conversation_reuse_what_they_share(talker: Path) -> None:
    talking = load(talker)
    session, messages, seen = talking.session(), [MESSAGES[0]], []
    for turn in range(12):
        messages = [*messages, {"role": "user", "content": f"Question {turn}"}]
        result = talking.generate(messages, max_tokens=4, session=session, overflow="keep-ends")
        seen.append(result.timings)
        messages = [*messages, {"role": "assistant", "content": result.text}]
        assert (
            result.tokens
            == talking.generate(messages[:-1], max_tokens=4, overflow="keep-ends").tokens
        )
    same = [n for n in range(1, 12) if seen[n].dropped_tokens == seen[n - 1].dropped_tokens > 0]
    assert same and all(seen[n].reused_tokens > 64 for n in same), seen


def test_a_text_keeps_its_first_tokens_and_so_does_a_template_that_wants_more(
    talking: LanguageModel,
) -> None:
    def refuse(messages: object) -> list[int]:
        raise InvalidInput("a tool is missing")

    assert protected_tokens("some text", [1, 2, 3], refuse) == KEPT_TOKENS
    assert protected_tokens([1, 2, 3], [1, 2, 3], refuse) == KEPT_TOKENS
    assert protected_tokens(MESSAGES, [1, 2, 3], refuse) == KEPT_TOKENS
