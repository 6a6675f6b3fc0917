"""LongRoPE of Phi-4 mini: exact on both sides of the original context, and across it.

A pass over a whole text without caches is the reference for texts of any length; the fixtures of
``test_near_llama`` compare such passes with transformers.
"""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.errors import ConfigError
from mlxarch.generation.decode import decode, decode_batch
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.generation.timings import Timings
from mlxarch.kv_cache import can_batch, join_rows
from mlxarch.kv_cache.recording import RecordingCache
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.quantization.scheme import Quantization
from parity import config

ORIGINAL = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    change = config(original_max_position_embeddings=ORIGINAL)
    folder = parity.copy("phi3_long", "config.json", tmp_path_factory.mktemp("long"), change)
    return load_model(folder, dtype="float32")[0]


def text(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(8, 90) for _ in range(count)]


def last_logits(model: CausalLM, tokens: list[int]) -> mx.array:
    return model(mx.array([tokens]))[0, -1]


@pytest.mark.parametrize("kv", [None, Quantization(8, 32)])
@pytest.mark.parametrize("chunk", [1, 3, 7, 19])
def test_a_text_that_outgrows_the_original_context_is_read_again(
    model: CausalLM, chunk: int, kv: Quantization | None
) -> None:
    tokens = text(0, 50)
    caches = model.make_caches(kv=kv)
    for at in range(0, 50, chunk):
        found = model(mx.array([tokens[at : at + chunk]]), caches)[0, -1]
        if kv is None:
            wanted = last_logits(model, tokens[: at + chunk])
        else:
            fresh = model.make_caches(kv=kv)
            wanted = model(mx.array([tokens[: at + chunk]]), fresh)[0, -1]
        tolerance = 1e-4 if kv is None else 0.3
        assert float(mx.abs(found - wanted).max()) <= tolerance, at


def test_short_factors_beyond_the_original_context_would_show(model: CausalLM) -> None:
    tokens = text(0, 30)
    caches = model.make_caches()
    model(mx.array([tokens[:18]]), caches)
    first = caches[0]
    assert isinstance(first, RecordingCache)
    first.recorded_at = (18, [True])  # as if they had the long factors
    found = model(mx.array([tokens[18:]]), caches)[0, -1]
    assert float(mx.abs(found - last_logits(model, tokens)).max()) > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_random_edits_give_what_fresh_sessions_give(model: CausalLM, seed: int) -> None:
    rng = random.Random(seed)
    session = Session(model.make_caches(), prefill_chunk=7)
    prompt = text(seed, 12)
    for _ in range(10):
        fresh = Session(model.make_caches(), rewind=0)
        found, wanted = (
            [token for token, _ in decode(model, each, prompt, Sampling(), 6)]
            for each in (session, fresh)
        )
        assert found == wanted
        if rng.random() < 0.5:
            prompt = prompt + found + text(rng.randrange(99), 4)
        else:  # back below the original context, or on another way
            prompt = prompt[: rng.randrange(3, len(prompt))] + text(rng.randrange(99), 2)


def test_exported_parts_of_different_texts_are_read_again(model: CausalLM) -> None:
    tokens = text(3, 40)
    short, long, joined = (model.make_caches() for _ in range(3))
    model(mx.array([tokens[:10]]), short)
    model(mx.array([tokens]), long)
    for target, *sources in zip(joined, short, long, strict=True):
        assert target and sources[0] and sources[1]
        target.restore(40, [sources[1].export()])
    found = model(mx.array([[9]]), joined)[0, -1]
    assert float(mx.abs(found - last_logits(model, [*tokens, 9])).max()) <= 1e-4
    for cache, source in zip(joined, long, strict=True):
        assert cache and source
        cache.restore(40, [source.export()])
        cache.truncate(10)
    found = model(mx.array([[9]]), joined)[0, -1]
    assert float(mx.abs(found - last_logits(model, [*tokens[:10], 9])).max()) <= 1e-4


def test_rows_of_a_batch_have_the_factors_of_their_own_lengths(model: CausalLM) -> None:
    prompts = [text(seed, count) for seed, count in enumerate((31, 4, 18, 20))]
    rows = [model.make_caches() for _ in prompts]
    for prompt, caches in zip(prompts, rows, strict=True):
        model(mx.array([prompt]), caches)
    assert not can_batch(rows[0])  # shared arrays have no room for the records
    for token in (9, 10, 11):  # the third row grows beyond it with the last
        prompts = [[*prompt, token] for prompt in prompts]
        found = model(mx.array([[token]] * 5), join_rows(rows, 5))
        for index, prompt in enumerate(prompts):
            wanted = last_logits(model, prompt)
            assert float(mx.abs(found[index, 0] - wanted).max()) <= 1e-4


def test_a_padded_batch_gives_the_tokens_of_single_runs(model: CausalLM) -> None:
    prompts = [text(seed, count) for seed, count in enumerate((30, 7, 16, 1))]
    rows = zip(
        *decode_batch(model, prompts, Sampling(), 8, Timings(), prefill_chunk=9), strict=True
    )
    for prompt, row in zip(prompts, rows, strict=True):
        session = Session(model.make_caches(), rewind=0)
        assert list(row) == [token for token, _ in decode(model, session, prompt, Sampling(), 8)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_scaling": {"long_factor": [1.0]}}, "long_factor"),
        ({"rope_scaling": {"short_factor": [1.0, 0.0, 1.0]}}, "short_factor"),
        ({"sliding_window": 1}, "sliding_window"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    published = json.loads((parity.GOLDEN / "phi3_long" / "config.json").read_text())
    architecture(published).build()
    config(**settings)(published, {})
    with pytest.raises(ConfigError, match=named):
        architecture(published).build()
