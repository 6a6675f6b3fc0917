"""How much of a pass is evaluated at once, by a clock that the tests turn."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.cpu_kernels import native
from mlxarch.generation import pace as pace_module
from mlxarch.generation.decode import decode
from mlxarch.generation.pace import Pace
from mlxarch.generation.prefill import prefill
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.load import load_model

pytestmark = pytest.mark.without_kernels  # with them the passes do not follow the speed
PROMPT = [3, 99, 14, 15, 92, 65, 35, 89, 79, 27, 18, 28]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The aim of an evaluation is what it is outside of the suite."""
    monkeypatch.setattr(pace_module, "EVALUATION_SECONDS", 0.1)
    monkeypatch.setattr(pace_module, "FIRST_BYTES", 1)


@pytest.fixture
def model() -> CausalLM:
    return load_model(parity.GOLDEN / "llama3", dtype="float32")[0]


def clocked(model: CausalLM, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """Let each evaluation take ``seconds``; gives a list that grows by one for each."""
    counted: list[int] = []
    evaluate = pace_module.evaluate_caches

    def counting(*arguments: Any) -> None:
        counted.append(1)
        evaluate(*arguments)

    monkeypatch.setattr(pace_module, "evaluate_caches", counting)
    monkeypatch.setattr(pace_module.time, "perf_counter", lambda: len(counted) * seconds)
    model.__dict__.pop("_pace", None)  # nothing is known of the machine yet
    return counted


def begun(model: CausalLM) -> Session:
    return Session(model.make_caches())


def answer(model: CausalLM, session: Session | None = None) -> list[int]:
    steps = decode(model, session or begun(model), PROMPT, Sampling(), 6)
    return [token for token, _ in steps]


@pytest.fixture
def mlx_alone() -> Iterator[None]:
    """Without the CPU kernels, of which products of few and of many rows differ by rounding."""
    with native.suspended():
        yield


@pytest.mark.usefixtures("mlx_alone")
def test_a_slow_machine_evaluates_each_layer_and_computes_the_same_bits(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tokens = np.asarray(prefill(model, begun(model), PROMPT)), answer(model)
    layers = len(model.layers)
    counted = clocked(model, monkeypatch, 100.0)
    session = begun(model)
    slow = np.asarray(prefill(model, session, PROMPT))
    # on a CPU each pass has one token from the second on, and the last layer only fills its cache
    passes = len(PROMPT) if mx.default_device() == mx.cpu else 1
    assert len(counted) == (passes - 1) * (layers - 1) + layers
    assert np.array_equal(slow, whole) or mx.default_device() != mx.cpu
    assert session.tokens == PROMPT
    counted.clear()
    assert answer(model) == tokens
    assert len(counted) >= 5 * layers  # decoding too


def test_a_fast_machine_evaluates_a_pass_at_once(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = clocked(model, monkeypatch, 1e-9)
    tokens = answer(model)  # measures
    counted.clear()
    assert answer(model) == tokens
    assert len(counted) <= 1  # of all tokens but the last; the steps are queued, not evaluated here


def test_an_interrupt_between_two_evaluations_leaves_a_usable_session(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = answer(model)
    clocked(model, monkeypatch, 100.0)
    for moment in (1, 2, 7, 12):
        session, calls = begun(model), 0

        def report(_done: int, _total: int, moment: int = moment) -> None:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(decode(model, session, PROMPT, Sampling(), 6, report=report))
        assert calls == moment
        assert {cache.length for cache in session.caches if cache} == {len(session.tokens)}
        assert answer(model, session) == tokens


def test_progress_of_a_prompt_grows_to_its_length(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked(model, monkeypatch, 100.0)
    seen: list[tuple[int, int]] = []
    logits = prefill(model, begun(model), PROMPT, lambda *report: seen.append(report))
    mx.eval(logits)
    done = [count for count, _ in seen]
    assert {total for _, total in seen} == {len(PROMPT)}
    assert done == sorted(done) and len(set(done)) > 2 and done[-1] == len(PROMPT)


def test_the_size_of_an_evaluation_follows_its_time() -> None:
    pace = Pace(layers=10, layer_bytes=1_000_000)
    assert pace.layers(64) == 1  # nothing is known yet
    pace.record(64, 1, seconds=0.02)
    assert pace.layers(64) == 5
    pace.record(64, 5, seconds=1e-4)
    assert pace.is_one_evaluation(64)
    pace.record_pass(64, seconds=0.05)  # may have been finished before
    assert pace.is_one_evaluation(64)
    pace.record_pass(64, seconds=1.0)
    assert pace.layers(64) == 1


@pytest.mark.parametrize("cpu", [True, False])
def test_only_a_cpu_shortens_passes(cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "_is_cpu", lambda: cpu)
    monkeypatch.setattr(pace_module, "FIRST_BYTES", 50e6)
    monkeypatch.setattr(pace_module, "KERNEL_SPEEDUP", 1)
    pace = Pace(layers=10, layer_bytes=25_000_000)
    assert pace.tokens(512) == (2 if cpu else 512)
    pace.record(2, 1, seconds=0.01)
    assert pace.tokens(512) == (20 if cpu else 512)
    assert pace.tokens(512, batch=4) == (5 if cpu else 512)
    pace.record(1, 1, seconds=9.0)
    assert pace.tokens(512) == (1 if cpu else 512)
