"""Admission by memory: who runs, who waits, who is refused, and who is set aside and goes on."""

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.engine import Engine, GenerationRequest, RowOutput
from mlxarch.engine.admission import MemoryRoom, one_token_caches
from mlxarch.errors import DoesNotFit
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.load import load_model


def load(name: str) -> CausalLM:
    model = load_model(parity.GOLDEN / name)[0]
    mx.eval(model.parameters())
    return model


def room_of(model: CausalLM, total: int | None = None) -> MemoryRoom:
    return MemoryRoom(total, one_token_caches(model, model.make_caches))


def request(seed: int, length: int = 20, tokens: int = 30, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        prompt=tuple((seed * 7 + index * 3) % 48 for index in range(length)),
        max_tokens=tokens,
        sampling=Sampling(temperature=1.0, seed=seed, **sampling),
    )


def alone(model: CausalLM, wanted: GenerationRequest) -> list[int]:
    session = Session(model.make_caches())
    steps = decode(model, session, wanted.prompt, wanted.sampling, wanted.max_tokens)
    return [token for token, _ in steps]


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "deepseek_v3", "gemma3n_text", "qwen3_5"])
def test_the_bytes_of_a_row_are_those_of_its_caches(name: str) -> None:
    model = load(name)
    for length in (1, 40, 300):
        caches = model.make_caches()
        model.hidden_state(mx.zeros((1, length), mx.int32), caches)
        taken = sum(cache.nbytes for cache in caches if cache is not None)
        assert taken <= room_of(model).bytes_for(length) <= 1.5 * taken


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    model = load("qwen3")
    room = room_of(model).bytes_for(300)
    with Engine(model, room_bytes=room) as engine:
        with pytest.raises(DoesNotFit, match="20 tokens of prompt and 5000 to generate take .* MB"):
            engine.submit(request(0, tokens=5000), print)
        assert list(engine.stream(request(0, tokens=5)))[-1].finish_reason == "length"


def run_all(engine: Engine, wanted: list[GenerationRequest]) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in wanted]
    handles = []
    for some, answer in zip(wanted, answers, strict=True):

        def deliver(output: RowOutput, answer: list[int] = answer) -> None:
            answer.extend(output.tokens)

        handles.append(engine.submit(some, deliver))
    assert all(handle.done.wait(60) for handle in handles)
    return answers


def test_requests_wait_until_there_is_room() -> None:
    model = load("qwen3")
    wanted = [request(seed, tokens=30) for seed in range(5)]
    most = 0
    with Engine(model, room_bytes=2 * room_of(model).bytes_for(50)) as engine:

        def watch(output: RowOutput) -> None:
            nonlocal most
            status = engine.status()
            most = max(most, status.running + status.reading)

        watched = engine.submit(wanted[0], watch)
        assert run_all(engine, wanted) == [alone(model, each) for each in wanted]
        assert watched.done.wait(20)
    assert most == 2


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte for each token, and reservations of a few tokens: rows outgrow them soon."""
    monkeypatch.setattr(MemoryRoom, "bytes_for", lambda self, tokens: tokens)
    monkeypatch.setattr(MemoryRoom, "first_tokens", 4)
    monkeypatch.setattr(MemoryRoom, "more_tokens", 4)


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "deepseek_v3", "qwen3_5"])
def test_a_row_set_aside_goes_on_with_the_same_tokens(
    name: str, on_disk: bool, tmp_path: Path, small_steps: None
) -> None:
    model = load(name)
    wanted = [request(seed, tokens=24, presence_penalty=0.1) for seed in range(3)]
    folder = tmp_path / "spill" if on_disk else None
    with Engine(model, room_bytes=72, spill_dir=folder) as engine:
        answers = run_all(engine, wanted)
        counters = engine.status().counters
        assert engine.status().row_bytes == 0
    assert answers == [alone(model, each) for each in wanted]
    assert counters["set_aside"] >= 2
    assert not on_disk or list((tmp_path / "spill").iterdir()) == []


def test_a_row_set_aside_can_be_cancelled(tmp_path: Path, small_steps: None) -> None:
    model = load("qwen3")
    with Engine(model, room_bytes=90, spill_dir=tmp_path) as engine:
        aside = threading.Event()

        def watch(output: RowOutput) -> None:
            if engine.status().counters.get("set_aside"):
                aside.set()

        old = engine.submit(request(0, tokens=60), watch)
        young = engine.submit(request(1, tokens=60), lambda output: None)
        assert aside.wait(60)
        young.cancel()
        assert young.done.wait(20) and list(tmp_path.iterdir()) == []
        assert old.done.wait(60)
