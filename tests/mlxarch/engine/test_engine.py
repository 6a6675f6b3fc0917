"""The engine: answers do not depend on neighbours, and every end of a request is reported."""

import random
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.engine import Engine, GenerationRequest, RowOutput
from mlxarch.errors import (
    ContextLengthError,
    EngineStopped,
    GenerationError,
    InvalidInput,
    NonFiniteLogits,
    QueueFull,
)
from mlxarch.generation import pace
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.load import load_model


@cache
def model_of(name: str) -> CausalLM:
    model = load_model(parity.GOLDEN / name)[0]
    mx.eval(model.parameters())
    return model


@pytest.fixture
def model() -> CausalLM:
    return model_of("qwen3")


@pytest.fixture
def engine(model: CausalLM) -> Iterator[Engine]:
    with Engine(model, max_rows=4, chunk=16) as engine:
        yield engine


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 60, length).tolist())


def request(length: int = 5, **settings: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": prompt(length), "max_tokens": 6, **settings})


def tokens_of(outputs: list[RowOutput]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def alone(model: CausalLM, wanted: GenerationRequest) -> list[int]:
    steps = decode(
        model, Session(model.make_caches()), wanted.prompt, wanted.sampling, wanted.max_tokens
    )
    return [token for token, _ in steps]


def test_a_request_gets_the_tokens_that_it_gets_without_an_engine(
    engine: Engine, model: CausalLM
) -> None:
    wanted = request(40, sampling=Sampling(temperature=1.0, seed=3))
    outputs = list(engine.stream(wanted))
    assert tokens_of(outputs) == alone(model, wanted)
    assert [output.progress for output in outputs[:3]] == [(16, 40), (32, 40), (39, 40)]
    first, last = outputs[3], outputs[-1]
    assert first.prompt is not None and first.prompt.tokens == 40
    assert last.finish_reason == "length" and last.timings is not None
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)


def test_an_end_token_is_delivered_and_ends_the_request(engine: Engine, model: CausalLM) -> None:
    answer = alone(model, request(max_tokens=6))
    outputs = list(engine.stream(request(max_tokens=6, end_tokens=frozenset([answer[2]]))))
    assert tokens_of(outputs) == answer[: answer.index(answer[2]) + 1]
    assert outputs[-1].finish_reason == "stop"


def test_log_probabilities_are_the_models_own(engine: Engine, model: CausalLM) -> None:
    wanted = request(
        20, top_logprobs=3, prompt_logprobs=True, sampling=Sampling(logit_bias={7: 50.0})
    )
    outputs = list(engine.stream(wanted))
    answer = tokens_of(outputs)
    assert set(answer) == {7}
    ids = [*wanted.prompt, *answer]
    logits = model(mx.array([ids]))[0].astype(mx.float32)
    expected = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    report = next(output.prompt for output in outputs if output.prompt is not None)
    assert report.logprobs[0] is None
    found = [*report.logprobs[1:], *(entry for output in outputs for entry in output.logprobs)]
    assert len(found) == len(ids) - 1
    for index, entry in enumerate(found):
        assert entry is not None and entry.token == ids[index + 1]
        row = expected[index]
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-4)
        assert [token for token, _ in entry.top] == np.argsort(-row)[:3].tolist()
        assert [value for _, value in entry.top] == pytest.approx(sorted(row)[:-4:-1], abs=1e-4)


def test_a_prompt_can_be_scored_alone(engine: Engine) -> None:
    outputs = list(engine.stream(request(20, max_tokens=0, prompt_logprobs=True)))
    assert tokens_of(outputs) == [] and outputs[-1].finish_reason == "length"
    assert outputs[-1].prompt is not None and len(outputs[-1].prompt.logprobs) == 20


class EvenTokens:
    """Matcher that allows even tokens only, and stops after three."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    @property
    def stopped(self) -> bool:
        return len(self.taken) == 3

    def mask(self) -> np.ndarray | None:
        return np.arange(model_of("qwen3").vocab_size) % 2 == 0

    def consume(self, token: int) -> None:
        self.taken.append(token)


def test_a_matcher_restricts_its_own_row_and_ends_it(engine: Engine, model: CausalLM) -> None:
    free = request(9, max_tokens=12)
    done: list[RowOutput] = []
    handle = engine.submit(free, done.append)
    matcher = EvenTokens()
    outputs = list(engine.stream(request(9, max_tokens=12, matcher=matcher)))
    assert handle.done.wait(20)
    assert tokens_of(outputs) == matcher.taken
    assert outputs[-1].finish_reason == "stop"
    assert all(token % 2 == 0 for token in matcher.taken)
    assert tokens_of(done) == alone(model, free)


class FailingMatcher(EvenTokens):
    """Matcher that fails after a number of tokens, in one method or the other."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def mask(self) -> np.ndarray | None:
        if self.where == "mask" and self.taken:
            raise ValueError("no mask")
        return super().mask()

    def consume(self, token: int) -> None:
        super().consume(token)
        if self.where == "consume":
            raise ValueError("not allowed")


@pytest.mark.parametrize("where", ["mask", "consume"])
def test_a_matcher_that_fails_ends_its_own_row(where: str, engine: Engine, model: CausalLM) -> None:
    done: list[RowOutput] = []
    handle = engine.submit(request(9, max_tokens=12), done.append)
    with pytest.raises(GenerationError, match="constraint"):
        list(engine.stream(request(matcher=FailingMatcher(where))))
    assert handle.done.wait(20)
    assert tokens_of(done) == alone(model, request(9, max_tokens=12))


def test_a_cancelled_request_ends_and_its_caches_are_gone(engine: Engine) -> None:
    begun = threading.Event()
    outputs: list[RowOutput] = []

    def deliver(output: RowOutput) -> None:
        outputs.append(output)
        begun.set()

    handle = engine.submit(request(max_tokens=100), deliver)
    assert begun.wait(20)
    handle.cancel()
    assert handle.done.wait(20)
    assert outputs[-1].finish_reason == "cancelled" and len(tokens_of(outputs)) < 100
    assert engine.status().row_bytes == 0


def test_not_a_number_ends_one_row_and_not_its_neighbours(
    engine: Engine, model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = 77
    embed = CausalLM.embed

    def poisoned(self: CausalLM, tokens: mx.array, context: Any) -> mx.array:
        return mx.where((tokens == bad)[..., None], mx.nan, embed(self, tokens, context))

    wanted = request(7, max_tokens=8)
    expected = alone(model, wanted)
    assert bad not in [*wanted.prompt, *expected]
    monkeypatch.setattr(CausalLM, "embed", poisoned)
    outputs: list[RowOutput] = []
    handle = engine.submit(wanted, outputs.append)
    with pytest.raises(NonFiniteLogits):
        list(engine.stream(request(prompt=(1, 2, bad))))
    assert handle.done.wait(20) and tokens_of(outputs) == expected


def test_a_full_queue_refuses_with_a_time(model: CausalLM) -> None:
    with Engine(model, max_rows=1, max_waiting=1) as engine:
        handles = [engine.submit(request(max_tokens=200), lambda _: None) for _ in range(2)]
        with pytest.raises(QueueFull) as refused:
            for _ in range(3):
                handles.append(engine.submit(request(max_tokens=200), lambda _: None))
        assert refused.value.retry_after > 0
        for handle in handles:
            handle.cancel()
        assert all(handle.done.wait(20) for handle in handles)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"prompt": ()}, InvalidInput),
        ({"prompt": (100_000,)}, InvalidInput),
        ({"sampling": Sampling(logit_bias={100_000: 1.0})}, InvalidInput),
        ({"max_tokens": 10**9}, ContextLengthError),
    ],
)
def test_a_request_out_of_range_is_refused(
    engine: Engine, settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        engine.submit(request(**settings), lambda _: None)
    assert len(tokens_of(list(engine.stream(request())))) == 6


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"top_logprobs": 21}, {"max_tokens": 1.5}])
def test_a_request_checks_its_values(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        request(**settings)


def test_a_receiver_that_fails_ends_its_own_request(engine: Engine, model: CausalLM) -> None:
    def fail(output: RowOutput) -> None:
        raise ValueError("no")

    handle = engine.submit(request(max_tokens=50), fail)
    assert handle.done.wait(20)
    assert tokens_of(list(engine.stream(request()))) == alone(model, request())


def test_a_closed_engine_lets_requests_finish_and_takes_no_more(model: CausalLM) -> None:
    engine = Engine(model)
    outputs: list[RowOutput] = []
    engine.submit(request(), outputs.append)
    engine.close(timeout=20)
    assert outputs[-1].finish_reason == "length"
    with pytest.raises(EngineStopped):
        engine.submit(request(), outputs.append)
    assert not engine.status().alive


def test_a_failure_ends_all_requests_and_is_told(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[BaseException] = []

    def fail(self: CausalLM, state: mx.array) -> mx.array:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(CausalLM, "head", fail)
    engine = Engine(model, on_death=deaths.append)
    outputs: list[RowOutput] = []
    handle = engine.submit(request(), outputs.append)
    assert handle.done.wait(20)
    assert isinstance(outputs[-1].error, EngineStopped)
    engine.close()
    assert [str(error) for error in deaths] == ["out of memory"]


def test_a_cancelled_prompt_ends_within_its_chunk(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is evaluated layer by layer where that takes long; the first layer is the last here."""
    evaluate = pace._Parts.evaluate
    evaluations: list[int] = []
    outputs: list[RowOutput] = []
    submitted = threading.Event()

    def cancelling(self: Any, *state: mx.array) -> None:
        evaluations.append(1)
        assert submitted.wait(20)
        handle.cancel()
        evaluate(self, *state)

    monkeypatch.setattr(pace.Pace, "layers", lambda self, tokens: 1)
    monkeypatch.setattr(pace._Parts, "evaluate", cancelling)
    handle = engine.submit(request(200), outputs.append)
    submitted.set()
    assert handle.done.wait(20)
    assert len(evaluations) == 1
    assert [output.finish_reason for output in outputs] == ["cancelled"]
    monkeypatch.undo()
    assert len(tokens_of(list(engine.stream(request())))) == 6


def test_requests_that_end_at_any_moment_leave_no_bytes(model: CausalLM) -> None:
    rng = random.Random(0)
    with Engine(model, max_rows=4, chunk=16, prefix_cache_bytes=0) as engine:
        list(engine.stream(request(60)))
        baseline = mx.get_active_memory()
        for _ in range(25):
            events = rng.randrange(12)
            outputs = engine.stream(request(60, max_tokens=40))
            for _ in range(events):
                next(outputs)
            outputs.close()  # pyright: ignore[reportAttributeAccessIssue]
        list(engine.stream(request(60)))  # behind the last one that was cancelled
        assert engine.status().row_bytes == 0
        assert mx.get_active_memory() <= 1.01 * baseline
