"""The prefix cache: the tokens of a cold start, shared beginnings once, limits, and reasons of a miss."""

import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.engine import Engine, GenerationRequest, PromptReport
from mlxarch.engine.admission import MemoryRoom, one_token_caches
from mlxarch.engine.prefix.tree import PrefixCache
from mlxarch.generation.sampling import Sampling
from mlxarch.kv_cache import FullCache
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization


def load(name: str) -> CausalLM:
    model = load_model(parity.GOLDEN / name)[0]
    mx.eval(model.parameters())
    return model


def ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 48, length).tolist())


def run(
    engine: Engine, prompt: tuple[int, ...], tokens: int = 8, **settings: Any
) -> tuple[tuple[int, ...], PromptReport]:
    sampling = Sampling(temperature=1.0, seed=1)
    request = GenerationRequest(prompt=prompt, max_tokens=tokens, sampling=sampling, **settings)
    outputs = list(engine.stream(request))
    report = next(output.prompt for output in outputs if output.prompt is not None)
    return tuple(token for output in outputs for token in output.tokens), report


KINDS = {
    "full": ("qwen3", None),
    "full, 8 bits": ("qwen3", 8),
    "latent": ("deepseek_v3", None),
    "chosen keys": ("deepseek_v32", None),
    "sliding": ("gemma3_text", None),
    "sliding, 4 bits": ("gemma3_text", 4),
    "chunked": ("llama4_scout", None),
    "recurrent states": ("qwen3_5", None),
    "shared": ("gemma3n_text", None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_that_goes_on_continues_from_the_cache(kind: str) -> None:
    name, bits = KINDS[kind]
    model = load(name)
    kv = None if bits is None else Quantization(bits, 64)
    first, system = ids(45, 0), ids(30, 2)
    with (
        Engine(model, kv=kv, chunk=16) as engine,
        Engine(model, kv=kv, chunk=16, prefix_cache_bytes=0) as cold,
    ):
        answer, report = run(engine, first)
        assert report.cached_tokens == 0 and report.first_difference is None
        second = first + answer + ids(20, 1)
        again, report = run(engine, second)
        # the last token of an answer was never computed with
        assert report.cached_tokens >= len(first) + len(answer) - 1
        assert report.first_difference is None
        assert again == run(cold, second)[0] and run(cold, second)[1].cached_tokens == 0
        # the third prompt with a beginning continues where the first two began to differ
        run(engine, system + ids(9, 3))
        run(engine, system + ids(12, 4))
        prompt = system + ids(15, 5)
        got, report = run(engine, prompt)
        assert report.cached_tokens >= 30 and report.first_difference == report.cached_tokens
        assert got == run(cold, prompt)[0]


def test_the_same_prompt_twice_reads_its_last_token_only() -> None:
    with Engine(load("qwen3"), chunk=16) as engine:
        answer, _ = run(engine, ids(40, 0))
        again, report = run(engine, ids(40, 0))
    assert report.cached_tokens == 39 and again == answer


def test_requests_that_arrive_together_read_their_beginning_once() -> None:
    engine = Engine(load("qwen3"), chunk=16)
    shared = ids(64, 0)
    handles = []
    for seed in range(4):
        request = GenerationRequest(prompt=shared + ids(5, seed + 1), max_tokens=2)
        handles.append(engine.submit(request, lambda output: None))
    assert all(handle.done.wait(20) for handle in handles)
    counters = engine.status().counters
    engine.close()
    assert counters["cached_tokens"] >= 3 * 64
    assert counters["prompt_tokens"] <= 64 + 4 * 5


def filled(length: int, seed: int = 0) -> list[Any]:
    cache = FullCache()
    keys = mx.random.normal((1, 2, length, 8), key=mx.random.key(seed))
    cache.append(keys, keys)
    return [cache, None]


TOKEN_BYTES = 2 * 2 * 8 * 4


def test_a_shared_beginning_is_stored_once() -> None:
    tree = PrefixCache(10**6)
    for seed in range(4):
        tree.insert(ids(100, 0) + (50 + seed,) * 20, filled(120))
    assert tree.nbytes == (100 + 4 * 20) * TOKEN_BYTES
    assert tree.find(ids(100, 0) + (51,) * 20, cuts=True).length == 119
    assert tree.find(ids(100, 0) + (60,) * 20, cuts=True).length == 100


def test_the_tree_returns_what_was_stored() -> None:
    tree = PrefixCache(10**6)
    tree.insert(ids(100, 0), filled(100))
    tree.insert(ids(60, 0) + ids(20, 9), filled(80))
    hit = tree.find(ids(100, 0) + (1,), cuts=True)
    caches = [FullCache(), None]
    hit.restore(caches)
    one = mx.ones((1, 2, 1, 8))
    wanted = filled(100)[0].append(one, one)[0]
    assert hit.length == 100 and mx.array_equal(caches[0].append(one, one)[0], wanted)  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]


@pytest.mark.parametrize(
    ("prompt", "length", "matched", "differs"),
    [
        (ids(50, 0), 49, 50, False),
        (ids(50, 0) + (7,), 50, 50, False),
        (ids(20, 0) + (49,) * 9, 20, 20, True),
        ((49,), 0, 0, True),
        (ids(10, 0), 9, 10, False),
    ],
)
def test_a_hit_says_where_the_prompt_begins_to_differ(
    prompt: tuple[int, ...], length: int, matched: int, differs: bool
) -> None:
    tree = PrefixCache(10**6)
    tree.insert(ids(50, 0), filled(50))
    hit = tree.find(prompt, cuts=True)
    assert (hit.length, hit.matched, hit.differs) == (length, matched, differs)


def test_the_least_recently_used_are_dropped_at_the_limit() -> None:
    tree = PrefixCache(250 * TOKEN_BYTES)
    for seed in (0, 1):
        tree.insert(ids(100, seed), filled(100))
    tree.find(ids(100, 0), cuts=True)
    tree.insert(ids(100, 2), filled(100))
    found = [tree.find(ids(100, seed), cuts=True).length for seed in (0, 1, 2)]
    assert found[0] == found[2] == 99 and found[1] < 99
    assert tree.nbytes <= 250 * TOKEN_BYTES
    assert tree.insert(ids(300, 3), filled(300)) is None
    assert tree.insert(ids(100, 4), filled(100), free=-50 * TOKEN_BYTES) is not None
    assert tree.nbytes <= 150 * TOKEN_BYTES
    tree.clear()
    assert tree.nbytes == 0


def test_rows_come_before_cached_prompts() -> None:
    model = load("qwen3")
    room = MemoryRoom(None, one_token_caches(model, model.make_caches)).bytes_for(200) * 2
    with Engine(model, room_bytes=room, chunk=64) as engine:
        for seed in range(6):
            run(engine, ids(120, seed), tokens=4)
            assert engine.status().prefix_bytes <= room
        # the newest of six was kept, beside the reservation of a row that takes half of the room
        assert run(engine, ids(120, 5), tokens=4)[1].cached_tokens == 119


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_a_deterministic_engine_continues_at_chunks_of_prompts_only(name: str) -> None:
    with Engine(load(name), chunk=16, deterministic=True) as engine:
        answer, _ = run(engine, ids(45, 0), tokens=20)
        _, report = run(engine, ids(45, 0) + answer + ids(20, 1))
        assert report.cached_tokens == (32 if name == "qwen3" else 0)
        _, report = run(engine, ids(45, 0) + answer + ids(20, 2))
        assert report.cached_tokens % 16 == 0 and report.cached_tokens >= 32


def test_cached_prompts_are_not_used_for_log_probabilities_of_a_prompt() -> None:
    with Engine(load("qwen3"), chunk=16) as engine:
        run(engine, ids(40, 0))
        _, report = run(engine, ids(40, 0), prompt_logprobs=True)
    assert report.cached_tokens == 0 and len(report.logprobs) == 40


def test_the_beginning_of_the_next_prompt_is_dropped_last() -> None:
    """Room for one row and one cached prompt; the older one is that of the next request."""
    model = load("qwen3")
    row = MemoryRoom(None, one_token_caches(model, model.make_caches)).bytes_for(200)
    with Engine(model, room_bytes=row + row * 130 // 256, chunk=64) as engine:
        run(engine, ids(60, 0), tokens=4)
        run(engine, ids(60, 1), tokens=4)
        assert run(engine, ids(60, 0) + ids(80, 2), tokens=4)[1].cached_tokens >= 60


def test_a_request_that_must_wait_drops_nothing() -> None:
    model = load("qwen3")
    row = MemoryRoom(None, one_token_caches(model, model.make_caches)).bytes_for(200)
    with Engine(model, room_bytes=2 * row, chunk=64) as engine:
        run(engine, ids(60, 0), tokens=4)
        held = threading.Event()
        long = GenerationRequest(prompt=ids(20, 1), max_tokens=230)
        first = engine.submit(long, lambda output: held.set())
        assert held.wait(20)
        other = GenerationRequest(prompt=ids(20, 3), max_tokens=300)  # takes the whole room
        second = engine.submit(other, lambda output: None)
        assert engine.status().prefix_bytes > 0
        second.cancel()  # while it waits: once the first has ended, it may take the room
        assert second.done.wait(20)
        assert first.done.wait(60)
        assert run(engine, ids(60, 0), tokens=4)[1].cached_tokens == 59
