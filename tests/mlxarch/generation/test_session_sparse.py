"""Sessions and batches of models whose attention chooses keys: index keys follow their tokens."""

import json
import random
from collections.abc import Sequence

import mlx.core as mx
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.kv_cache import join_rows
from mlxarch.loading.load import load_model
from mlxarch.planner.blueprint import blueprint_from_config

NAMES = ["deepseek_v32", "qwen4_exp", "glm5_next"]
VOCABULARY = 90


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> CausalLM:
    return load_model(parity.GOLDEN / name, dtype="float32")[0]


def answer(model: CausalLM, session: Session, prompt: Sequence[int]) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt's were there already."""
    steps = list(decode(model, session, prompt, Sampling(), 4))
    return [token for token, _ in steps], steps[-1][1].reused_tokens


def text(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(8, VOCABULARY) for _ in range(count)]


@pytest.mark.parametrize("seed", range(2))
def test_random_edits_give_what_fresh_sessions_give(model: CausalLM, seed: int) -> None:
    rng = random.Random(seed)
    session = Session(model.make_caches(), prefill_chunk=7)
    prompt = text(rng, 40)
    reused = 0
    for _ in range(6):
        found, again = answer(model, session, prompt)
        reused += again
        assert found == answer(model, Session(model.make_caches(), rewind=0), prompt)[0]
        match rng.randrange(3):
            case 0:  # the next turn
                prompt = prompt + found + text(rng, rng.randrange(1, 20))
            case 1:  # the answer as the template writes it later, without its head
                prompt = prompt[:-3] + found + text(rng, 9)
            case _:  # an edit somewhere
                prompt = prompt[: rng.randrange(1, len(prompt))] + text(rng, 9)
    assert reused > 0


@pytest.mark.parametrize("chunk", [1, 3, 16, 33])
def test_chunks_of_any_size_give_the_same(model: CausalLM, chunk: int) -> None:
    tokens = mx.array([text(random.Random(3), 64)])
    caches = model.make_caches()
    parts = [model(tokens[:, at : at + chunk], caches) for at in range(0, 64, chunk)]
    assert float(mx.abs(mx.concatenate(parts, axis=1) - model(tokens)).max()) <= 1e-4


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
    # negative control: the rows' tokens are chosen from their own texts
    assert float(mx.abs(found[0, 0] - found[2, 0]).max()) > 1e-2


def test_planned_bytes_are_those_of_real_caches(name: str, model: CausalLM) -> None:
    config = json.loads((parity.GOLDEN / name / "config.json").read_text())
    footprint = blueprint_from_config(name, config).footprint()
    caches = model.make_caches(capacity=256)
    model(mx.array([list(range(8, 90))]), caches)
    real = sum(cache.nbytes for cache in caches if cache)
    assert sum(footprint.kv_bytes(256, float_bytes=4).values()) == real
