"""LanguageModel: prompts, answers, stop strings, limits."""

import contextlib
import inspect
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from talker import CONTEXT, TOKENIZERS, VOCABULARY, make_talker

import mlxarch
from mlxarch import LanguageModel, Result, Sampling
from mlxarch.blocks import CausalLM
from mlxarch.engine import steps
from mlxarch.errors import (
    ContextLengthError,
    ForkedProcess,
    InvalidInput,
    NonFiniteLogits,
    TokenizerError,
)
from mlxarch.generation.sampling import RowSampler, SamplingArguments
from mlxarch.language_model import AnswerArguments

MESSAGES = [{"role": "user", "content": "hello"}]
TOKENS, END = 465, 461

Speak = Callable[..., None]


@pytest.fixture(scope="module")
def model(talker: Path) -> LanguageModel:
    return mlxarch.load(talker)


@pytest.fixture
def speak(monkeypatch: pytest.MonkeyPatch) -> Speak:
    """Let the model say given tokens, for each prompt of a batch its own; the last is repeated."""

    def script(*rows: Sequence[int]) -> None:
        step = -1
        said: dict[int, list[int]] = {}  # by sampler: row, tokens said

        def head(self: CausalLM, state: mx.array) -> mx.array:
            nonlocal step
            step += 1
            ids = mx.array([row[min(step, len(row) - 1)] for row in rows])
            return (mx.arange(VOCABULARY) == ids[:, None, None]).astype(mx.float32)

        def sample(samplers: Sequence[RowSampler], *_: Any) -> mx.array:
            tokens: list[int] = []
            for sampler in samplers:
                place = said.setdefault(id(sampler), [len(said), -1])
                place[1] += 1
                row = rows[place[0]]
                tokens.append(row[min(place[1], len(row) - 1)])
            return mx.array(tokens, mx.uint32)

        if len(rows) == 1:
            monkeypatch.setattr(CausalLM, "head", head)
        else:
            monkeypatch.setattr(steps, "sample", sample)

    return script


@pytest.fixture
def indices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Smallest and largest id of everything that reached the embedding."""
    seen: list[tuple[int, int]] = []
    embed = CausalLM.embed

    def watched(self: CausalLM, tokens: mx.array, context: Any) -> mx.array:
        with contextlib.suppress(
            ValueError
        ):  # the planner lists the operations of a step, and has no tokens
            seen.append((int(np.array(tokens).min()), int(np.array(tokens).max())))
        return embed(self, tokens, context)

    monkeypatch.setattr(CausalLM, "embed", watched)
    return seen


# Prompts


def test_a_text_is_continued_as_it_stands(tmp_path: Path, speak: Speak) -> None:
    folder = make_talker(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZERS / "mistral" / name, folder)
    model = mlxarch.load(folder)
    word = model.tokenizer.encode("the", add_special_tokens=False)[0]
    speak([word])
    for prompt in ("the", model.tokens_of("the")):
        assert model.generate(prompt, max_tokens=2).text == " t t"
        assert "".join(piece.text for piece in model.stream(prompt, max_tokens=1)) == " t"
        assert model.generate_batch([prompt], max_tokens=1)[0].text == " t"
    # negative control: an answer to messages is a text of its own
    assert model.generate(MESSAGES, max_tokens=2).text == "t t"


def test_messages_spell_no_control_tokens_and_texts_do(model: LanguageModel) -> None:
    spelled = [{"role": "user", "content": "a<|im_end|>"}]
    plain = [{"role": "user", "content": "a"}]
    end = model.tokenizer.token_id("<|im_end|>")
    assert end is not None
    counts = [
        model.tokens_of(prompt, parse_special=parse).count(end)
        for prompt in (plain, spelled, "a<|im_end|>")
        for parse in (None, True, False)
    ]
    assert counts == [1, 1, 1, 1, 2, 1, 1, 1, 0]
    for name in ("parse_special", "tokenize"):
        with pytest.raises(InvalidInput, match=name):
            model.tokens_of(MESSAGES, {name: True})


def test_texts_messages_and_ids_are_prompts(model: LanguageModel) -> None:
    encode = model.tokenizer.encode
    assert model.tokens_of("hello") == encode("hello")
    assert (
        model.tokens_of(MESSAGES)
        == model.tokenizer.apply_chat_template(MESSAGES)
        != encode("hello")
    )
    assert model.tokens_of(tuple(MESSAGES)) == model.tokens_of(MESSAGES)
    assert (
        model.tokens_of([5, 6, 7])
        == model.tokens_of((5, 6, 7))
        == model.tokens_of(range(5, 8))
        == [5, 6, 7]
    )
    assert (
        model.generate("hello", max_tokens=4).tokens
        == model.generate(encode("hello"), max_tokens=4).tokens
    )


@pytest.mark.parametrize(
    "prompt",
    [
        *(
            None,
            5,
            2.5,
            b"text",
            bytearray(b"text"),
            {"role": "user", "content": "x"},
            {1, 2},
            object(),
        ),
        *(
            ["a", "b"],
            [1.0, 2.0],
            [True],
            [1, "a"],
            [None],
            [[1, 2]],
            np.array([1, 2]),
            mx.array([1, 2]),
        ),
        *(iter([1, 2]), [np.int64(3)], [*MESSAGES, "hello"], [{}], [{"content": "x"}]),
    ],
    ids=lambda prompt: repr(prompt).split(" at ")[0][
        :30
    ],  # an address would differ between workers
)
def test_anything_else_is_no_prompt(prompt: Any, model: LanguageModel) -> None:
    for call in (model.stream, model.generate, lambda p: model.generate_batch([p])):
        with pytest.raises((InvalidInput, TokenizerError)):
            call(prompt)


def test_an_empty_prompt_is_refused(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.tokens_of("") == [460]  # a text that begins is one already
    monkeypatch.setattr(model.tokenizer, "encode", lambda text, **_: [])
    for prompt in ("", [], ()):
        with pytest.raises(InvalidInput, match="the prompt is empty"):
            model.stream(prompt)


def test_no_id_outside_of_the_vocabulary_reaches_the_embedding(
    model: LanguageModel, indices: list[tuple[int, int]]
) -> None:
    draw, refused = np.random.default_rng(3), 0
    wild = (-1, VOCABULARY, VOCABULARY + 1, 2**31, 2**32, 2**63, 2**64, -(2**40), 10**30)
    for _ in range(400):
        ids = draw.integers(0, VOCABULARY, 4).tolist()
        if draw.random() < 0.7:
            ids[int(draw.integers(4))] = wrong = wild[int(draw.integers(len(wild)))]
            refused += 1
            for call in (
                model.generate,
                lambda p, **settings: model.generate_batch([[1], p], **settings),
            ):
                with pytest.raises(InvalidInput, match=f"token {wrong} lies outside"):
                    call(ids, max_tokens=1)
        else:
            assert model.generate(ids, max_tokens=1).tokens
    assert refused > 200
    assert len(indices) >= 400 - refused
    assert all(0 <= low <= high < VOCABULARY for low, high in indices)


def test_a_tokenizer_larger_than_the_vocabulary_is_an_error_that_names_the_token(
    talker: Path, indices: list[tuple[int, int]]
) -> None:
    model = mlxarch.load(talker)
    text = next(
        chr(code)
        for code in range(0x20, 0x1000)
        if max(model.tokenizer.encode(chr(code))[1:]) >= 100
    )
    model.model.vocab_size = 100
    indices.clear()  # those by which the plan was made
    wrong = next(token for token in model.tokenizer.encode(text) if token >= 100)
    with pytest.raises(
        InvalidInput, match=f"token {wrong} .* 0 … 99; tokenizer and weights belong to different"
    ):
        model.generate(text, max_tokens=1)
    assert not indices


def test_an_id_that_the_tokenizer_lacks_shows_as_nothing(
    model: LanguageModel, speak: Speak
) -> None:
    hello = model.tokenizer.encode("hello", add_special_tokens=False)
    speak([hello[0], TOKENS + 3, VOCABULARY - 1, *hello[1:], END])
    assert model.generate("x").text == "hello"


# Answers


def joined(pieces: Sequence[mlxarch.Piece]) -> str:
    return "".join(piece.text for piece in pieces)


ANSWER = "héllo 🙂 wörld, STOP. 漢字 and more"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), ANSWER),
        ("STOP", "héllo 🙂 wörld, "),
        (["never", "STOP"], "héllo 🙂 wörld, "),
        ("🙂", "héllo "),
        ("é", "h"),
        ("o 🙂 wö", "héll"),
        ("字 an", "héllo 🙂 wörld, STOP. 漢"),
        (["more", "wörld", "and"], "héllo 🙂 "),
        ("h", ""),
        ("more!", ANSWER),
        ("e", "héllo 🙂 wörld, STOP. 漢字 and mor"),
    ],
)
def test_a_stop_string_ends_the_answer_and_is_not_in_it(
    stop: Any, text: str, model: LanguageModel, speak: Speak
) -> None:
    tokens = [*model.tokenizer.encode(ANSWER, add_special_tokens=False), END]
    speak(tokens)
    pieces = list(model.stream("x", stop=stop, max_tokens=100))
    assert joined(pieces) == text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert all("�" not in piece.text for piece in pieces)
    speak(tokens)
    result = model.generate("x", stop=stop, max_tokens=100)
    assert (result.text, result.finish_reason) == (text, "stop")
    assert result.tokens == [piece.token for piece in pieces] == tokens[: len(result.tokens)]
    speak(tokens, tokens)
    assert [
        (r.text, r.tokens) for r in model.generate_batch(["x", "yy"], stop=stop, max_tokens=100)
    ] == [(text, result.tokens)] * 2


@pytest.mark.parametrize("count", range(1, 12))
def test_the_pieces_are_the_answer_wherever_it_is_cut(
    count: int, model: LanguageModel, speak: Speak
) -> None:
    tokens = model.tokenizer.encode("h🙂wör漢", add_special_tokens=False)
    speak(tokens)
    pieces = list(model.stream("x", max_tokens=count, stop=["never", "漢字"]))
    assert [piece.token for piece in pieces] == (tokens + [tokens[-1]] * 12)[:count]
    assert pieces[-1].finish_reason == "length"
    assert joined(pieces) == model.tokenizer.decode(
        [piece.token for piece in pieces if piece.token is not None]
    )
    assert pieces[-1].timings.generated_tokens == count


def test_every_end_token_ends_the_answer(model: LanguageModel, speak: Speak) -> None:
    assert {461, 463, 464} <= model.tokenizer.eos_ids
    hello = model.tokenizer.encode("hello", add_special_tokens=False)
    for end in model.tokenizer.eos_ids:
        speak([*hello, end, 70])
        result = model.generate("x", max_tokens=50)
        assert (result.text, result.tokens, result.finish_reason) == (
            "hello",
            [*hello, end],
            "stop",
        )
    speak([*hello, 462, END])  # special, and no end
    assert model.generate("x").tokens == [*hello, 462, END]


def test_an_end_at_the_limit_is_an_end(model: LanguageModel, speak: Speak) -> None:
    speak([70, 71, END])
    assert model.generate("x", max_tokens=3).finish_reason == "stop"
    speak([70, 71, END])
    assert model.generate("x", max_tokens=2).finish_reason == "length"


def test_without_a_limit_an_answer_ends_with_the_context_and_never_beyond(
    model: LanguageModel, speak: Speak
) -> None:
    for length in (3, 100, CONTEXT - 1):
        speak([70])
        session = model.session()
        result = model.generate([5] * length, session=session)
        assert (len(result.tokens), result.finish_reason) == (CONTEXT - length, "length")
        assert len(session.tokens) == CONTEXT - 1
        speak([70], [70])
        results = model.generate_batch([[5] * length, [5]])
        assert [len(r.tokens) for r in results] == [CONTEXT - length, CONTEXT - 1]
    speak([70])
    assert len(model.generate([5] * 200, max_tokens=56).tokens) == 56


def test_what_does_not_fit_into_the_context_is_refused_before_anything_runs(
    model: LanguageModel, indices: list[tuple[int, int]]
) -> None:
    for length, wanted in (
        (CONTEXT, None),
        (CONTEXT + 50, None),
        (200, 57),
        (1, CONTEXT),
        (CONTEXT, 1),
    ):
        for call in (
            model.stream,
            lambda p, **settings: model.generate_batch([[1], p], **settings),
        ):
            with pytest.raises(ContextLengthError) as error:
                call([5] * length, max_tokens=wanted)
            assert str(length) in str(error.value) and str(CONTEXT) in str(error.value)
            assert wanted is None or str(wanted) in str(error.value)
    assert not indices


@pytest.mark.parametrize("count", [0, -1, 2.5, "5", True, [3], float("inf")])
def test_max_tokens_is_a_whole_number_from_1_on(count: Any, model: LanguageModel) -> None:
    for call in (
        model.stream,
        model.generate,
        lambda p, **settings: model.generate_batch([p], **settings),
    ):
        with pytest.raises(InvalidInput, match="max_tokens"):
            call("x", max_tokens=count)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            {"temprature": 0.5},
            "unknown argument temprature; known: max_tokens, stop, .*temperature",
        ),
        ({"temperature": 0.5, "n": 2}, "unknown argument n;"),
        ({"max_token": 3}, "unknown argument max_token; known: max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"sampling": "greedy"}, "sampling must be a Sampling, found str"),
        ({"sampling": {"temperature": 1}}, "sampling must be a Sampling, found dict"),
        ({"template": 5}, "template holds variables by name"),
        ({"stop": ""}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": 5}, "stop"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(
    arguments: dict[str, Any], named: str, model: LanguageModel
) -> None:
    for call in (
        model.stream,
        model.generate,
        lambda p, **settings: model.generate_batch([p], **settings),
    ):
        with pytest.raises(InvalidInput, match=named):
            call("x", **arguments)


def test_a_bias_outside_of_the_vocabulary_is_refused_and_hurts_no_session(
    model: LanguageModel,
) -> None:
    session = model.session()
    first = model.generate("hello", max_tokens=3, session=session).tokens
    with pytest.raises(InvalidInput, match=f"{VOCABULARY}"):
        model.generate("hello you", max_tokens=3, logit_bias={VOCABULARY: 5.0}, session=session)
    assert model.generate("hello", max_tokens=3, session=session).tokens == first


def test_settings_override_the_sampling_given(model: LanguageModel) -> None:
    base = Sampling(temperature=1.0, seed=1)
    same = [model.generate("x", max_tokens=8, sampling=base).tokens for _ in range(2)]
    assert same[0] == same[1] == model.generate("x", max_tokens=8, temperature=1.0, seed=1).tokens
    assert model.generate("x", max_tokens=8, sampling=base, seed=2).tokens != same[0]
    assert (
        model.generate("x", max_tokens=8, sampling=base, temperature=0).tokens
        == model.generate("x", max_tokens=8).tokens
    )


@pytest.mark.parametrize("session", [5, {}, "session", []])
def test_a_session_comes_from_session(session: Any, model: LanguageModel) -> None:
    with pytest.raises(InvalidInput, match=r"session\(\)"):
        model.stream("x", session=session)


# Batches


def test_a_batch_answers_as_single_calls_do(model: LanguageModel) -> None:
    prompts = ["hello", MESSAGES, [5, 6, 7], "a longer text than all the others, to be sure"]
    for settings in ({}, {"temperature": 1.0, "seed": 4, "top_p": 0.9}):
        alone = [model.generate(prompt, max_tokens=12, **settings) for prompt in prompts]
        together = model.generate_batch(prompts, max_tokens=12, **settings)

        def parts(results: list[Result]) -> list[tuple[str, list[int], str]]:
            return [(r.text, r.tokens, r.finish_reason) for r in results]

        assert parts(together) == parts(alone)
        assert len({r.text for r in together}) == 4
        for one, other in zip(together, alone, strict=True):
            assert one.timings.prompt_tokens == other.timings.prompt_tokens
            assert one.timings.generated_tokens == other.timings.generated_tokens


def test_every_answer_of_a_batch_ends_for_itself(model: LanguageModel, speak: Speak) -> None:
    speak([70, END], [70, 71, 72, 73, 74], [70, 71, 72, END, 75])
    results = model.generate_batch(["x", "y", "z"], max_tokens=5)
    assert [r.finish_reason for r in results] == ["stop", "length", "stop"]
    assert [len(r.tokens) for r in results] == [2, 5, 4]


def test_a_batch_is_a_list_of_prompts(model: LanguageModel) -> None:
    assert model.generate_batch([]) == []
    for wrong in ("hello", b"hello", 5, None, iter(["x"]), {"x": 1}):
        with pytest.raises(InvalidInput, match="prompts must be a list"):
            model.generate_batch(wrong)  # type: ignore[arg-type]


# Sessions, threads, several models


def test_a_chat_computes_only_what_is_new(model: LanguageModel) -> None:
    session, messages = model.session(), list(MESSAGES)
    for turn in range(3):
        result = model.generate(messages, max_tokens=6, session=session)
        assert result.tokens == model.generate(messages, max_tokens=6).tokens
        assert (result.timings.reused_tokens > 15) == (turn > 0)
        held = list(session.tokens)
        messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": "more"}]
        prompt = model.tokens_of(messages)
        assert held[: len(prompt)] != prompt


def test_a_model_generates_in_a_thread_that_did_not_load_it(
    talker: Path, model: LanguageModel
) -> None:
    wanted = model.generate(MESSAGES, max_tokens=6, temperature=1.0, seed=1).tokens
    with ThreadPoolExecutor(1) as other:
        assert (
            other.submit(model.generate, MESSAGES, max_tokens=6, temperature=1.0, seed=1)
            .result()
            .tokens
            == wanted
        )
        loaded = other.submit(mlxarch.load, talker).result()
        batch = other.submit(
            model.generate_batch, [MESSAGES, "x"], max_tokens=6, temperature=1.0, seed=1
        ).result()
    assert batch[0].tokens == wanted
    assert loaded.generate(MESSAGES, max_tokens=6, temperature=1.0, seed=1).tokens == wanted


def test_two_models_do_not_disturb_each_other(
    talker: Path, model: LanguageModel, tmp_path: Path
) -> None:
    alone = model.generate("hello", max_tokens=10).tokens
    other = mlxarch.load(make_talker(tmp_path / "other", seed=1, tied=True, layers=3))
    alone_other = other.generate("hello", max_tokens=10).tokens
    assert alone_other != alone
    one, two = model.stream("hello", max_tokens=10), other.stream("hello", max_tokens=10)
    turns = [(next(one).token, next(two).token) for _ in range(10)]
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == [alone, alone_other]
    session = other.session()
    other.generate("hello", max_tokens=2, session=session)
    with pytest.raises(InvalidInput, match="another model"):
        model.generate("hello", max_tokens=2, session=session)


def test_a_breakdown_is_an_error_of_every_way_to_generate(talker: Path) -> None:
    model = mlxarch.load(talker)
    norm: Any = model.model.model.norm
    norm.weight = norm.weight * float("nan")
    calls = (model.generate, lambda p, **settings: model.generate_batch([p], **settings))
    for call in calls:
        with pytest.raises(NonFiniteLogits):
            call("x", max_tokens=3)


# Arguments


def test_type_checkers_and_help_know_every_argument() -> None:
    stream = inspect.signature(LanguageModel.stream).parameters
    assert list(inspect.signature(LanguageModel.generate).parameters) == list(stream)
    assert set(AnswerArguments.__annotations__) | {"self", "prompt"} == set(stream)
    assert set(SamplingArguments.__annotations__) == set(Sampling.__dataclass_fields__)
    batch = inspect.signature(LanguageModel.generate_batch).parameters
    assert set(Sampling.__dataclass_fields__) < set(batch)
    kinds = {each.kind for each in (*stream.values(), *batch.values())}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_a_batch_lists_its_own_arguments(model: LanguageModel) -> None:
    unknown: dict[str, Any] = {"session": model.session()}
    with pytest.raises(InvalidInput, match=r"unknown argument session; known: .*batch_size") as got:
        model.generate_batch(["a"], **unknown)
    assert "session," not in str(got.value).split("known:")[1]


def test_a_context_may_be_written_as_on_the_command_line(talker: Path) -> None:
    assert mlxarch.load(talker, context="128").context_length == 128
    with pytest.raises(InvalidInput, match="'4q' is no number of tokens"):
        mlxarch.load(talker, context="4q")


def test_content_in_parts_is_their_text(model: LanguageModel) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert model.tokens_of([{"role": "user", "content": parts}]) == model.tokens_of(MESSAGES)
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(InvalidInput, match=r"messages\[0\] has the part .*image_url"):
        model.tokens_of([{"role": "user", "content": image}])


def test_a_model_names_itself(model: LanguageModel) -> None:
    assert repr(model).startswith(f"<LanguageModel {model.path.name}: llama, 2 layers, ")
    assert f"{CONTEXT} tokens of context" in repr(model)


def test_the_loop_guard_ends_an_answer_that_repeats_itself(
    model: LanguageModel, speak: Speak
) -> None:
    speak([3, 4, 5, 6])  # and 6 for ever
    guarded = model.generate("x", max_tokens=200, loop_guard=True)
    assert guarded.finish_reason == "loop" and len(guarded.tokens) == 3 + 128
    speak([3, 4, 5, 6])
    assert model.generate("x", max_tokens=200).finish_reason == "length"


def test_a_prompt_says_how_far_it_is(model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    model.generate("hello world", max_tokens=1, on_prompt=lambda *report: seen.append(report))
    length = len(model.tokens_of("hello world"))
    assert seen and seen[-1][1] == length and all(done <= length for done, _ in seen)


def test_a_forked_process_is_refused_in_place_of_waiting_for_ever(model: LanguageModel) -> None:
    session = model.session()
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)
            model.generate("hello", max_tokens=1, session=session)
        except ForkedProcess:
            os._exit(5)
        finally:
            os._exit(6)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    assert model.generate("hello", max_tokens=1).tokens
