"""Sessions whose layers have states: every edit of a conversation gives what fresh caches give."""

import random
from collections.abc import Sequence

import mlx.core as mx
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.generation.decode import decode, decode_batch
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import RESUME_TOKENS, Session, snapshot_count
from mlxarch.generation.timings import Timings
from mlxarch.kv_cache import StateCache, join_rows
from mlxarch.loading.load import load_model

NAMES = ["qwen3_5", "qwen3_next", "lfm2", "nemotron_h", "kimi_linear", "falcon_h1", "qwen4_exp"]
VOCABULARY = 90


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> CausalLM:
    return load_model(parity.GOLDEN / request.param, dtype="float32")[0]


def answer(
    model: CausalLM, session: Session, prompt: Sequence[int], count: int = 5
) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt's were there already."""
    steps = list(decode(model, session, prompt, Sampling(), count))
    return [token for token, _ in steps], steps[-1][1].reused_tokens


def fresh(model: CausalLM, prompt: Sequence[int]) -> list[int]:
    return answer(model, Session(model.make_caches(), rewind=0), prompt)[0]


def text(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(8, VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_random_edits_give_what_fresh_sessions_give(model: CausalLM, seed: int) -> None:
    rng = random.Random(seed)
    session = Session(model.make_caches(), prefill_chunk=7)
    prompt = text(rng, 40)
    reused = 0
    for _ in range(8):
        found, again = answer(model, session, prompt)
        reused += again
        assert found == fresh(model, prompt)
        match rng.randrange(4):
            case 0:  # the next turn
                prompt = prompt + found + text(rng, rng.randrange(1, 30))
            case 1:  # the answer as the template writes it later, without its head
                prompt = prompt[:-3] + found + text(rng, 9)
            case 2:  # an edit somewhere
                prompt = prompt[: rng.randrange(1, len(prompt))] + text(rng, 9)
            case _:  # the same once more
                pass
    assert reused > 0


def test_the_head_of_an_answer_may_be_written_in_another_way(model: CausalLM) -> None:
    rng = random.Random(1)
    session = Session(model.make_caches())
    prompt = text(rng, 60)
    found, _ = answer(model, session, prompt)
    following = prompt[:-4] + found + text(rng, 6)
    second, reused = answer(model, session, following)
    assert reused == 60 - RESUME_TOKENS
    assert second == fresh(model, following)


def test_a_state_of_another_text_would_show(model: CausalLM) -> None:
    caches = model.make_caches()
    model(mx.array([text(random.Random(2), 30)]), caches)
    right = model(mx.array([[9]]), caches)
    other = model.make_caches()
    model(mx.array([text(random.Random(2), 30)]), other)
    parts = [part for cache in other if cache for part in cache.parts]
    states = [part for part in parts if isinstance(part, StateCache)]
    states[0].state = tuple(mx.zeros_like(array) for array in states[0].state)
    assert float(mx.abs(model(mx.array([[9]]), other) - right).max()) > 1e-3


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 33, 64])
def test_chunks_of_any_size_give_the_same(model: CausalLM, chunk: int) -> None:
    tokens = mx.array([text(random.Random(3), 64)])
    caches = model.make_caches()
    parts = [model(tokens[:, at : at + chunk], caches) for at in range(0, 64, chunk)]
    assert float(mx.abs(mx.concatenate(parts, axis=1) - model(tokens)).max()) <= 1e-4


def test_a_padded_batch_of_four_lengths_gives_the_tokens_of_single_runs(model: CausalLM) -> None:
    rng = random.Random(4)
    prompts = [text(rng, count) for count in (40, 7, 23, 1)]
    rows = zip(
        *decode_batch(model, prompts, Sampling(), 5, Timings(), prefill_chunk=9), strict=True
    )
    assert [list(row) for row in rows] == [fresh(model, prompt) for prompt in prompts]


def test_rows_of_different_lengths_in_one_batch(model: CausalLM) -> None:
    rng = random.Random(5)
    prompts = [text(rng, count) for count in (31, 4, 17)]
    rows = [model.make_caches() for _ in prompts]
    for prompt, caches in zip(prompts, rows, strict=True):
        model(mx.array([prompt]), caches)
    found = model(mx.array([[9], [10], [11], [11]]), join_rows(rows, 4))
    for index, prompt in enumerate(prompts):
        wanted = model(mx.array([[*prompt, 9 + index]]))[0, -1]
        assert float(mx.abs(found[index, 0] - wanted).max()) <= 1e-4


def test_at_least_one_snapshot_is_kept_of_states() -> None:
    assert snapshot_count(2**30, has_states=True) == 1
    assert snapshot_count(2**30, has_states=False) == 0
    assert snapshot_count(2**20, has_states=True) == 2
    assert snapshot_count(2**20, has_states=True, limit=0) == 0
