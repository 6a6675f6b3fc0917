"""DeepSeek V4: a window and compressed entries, residual streams, hashed experts."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.errors import CheckpointError, ConfigError, InvalidInput
from mlxarch.generation.decode import decode, decode_batch
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.generation.timings import Timings
from mlxarch.kv_cache import CompressedCache, join_rows
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.planner.blueprint import blueprint_from_config
from mlxarch.quantization.scheme import Quantization
from parity import Case, config, weight

ZEROS = np.zeros_like
NAME = "deepseek_v4"


def rolled(found: np.ndarray) -> np.ndarray:
    return np.roll(found, 1, axis=0)


def published() -> dict[str, Any]:
    return json.loads((parity.GOLDEN / NAME / "config.json").read_text())


def rates(chosen: int, heavy: int) -> parity.Change:
    return config(
        compress_rates={
            "compressed_sparse_attention": chosen,
            "heavily_compressed_attention": heavy,
        }
    )


def theta(found: dict[str, Any], weights: parity.Weights) -> None:
    found["compress_rope_theta"] = 1000.0
    if "rope_parameters" in found:
        found["rope_parameters"]["compress"]["rope_theta"] = 1000.0


def factor(found: dict[str, Any], weights: parity.Weights) -> None:
    section = found.get("rope_scaling") or found["rope_parameters"]["compress"]
    section["factor"] = 4


CASES = {
    NAME: Case(
        {
            "rms_norm_eps": config(rms_norm_eps=1e-3),
            "window": config(sliding_window=9),
            "index_topk": config(index_topk=3),
            "all entries": config(index_topk=64),
            "base of layers with entries": theta,
            "YaRN's factor": factor,
            "sinks": weight("*.attn_sink", ZEROS),
            "norm of vectors": weight("*.kv_norm.weight", rolled),
            "groups of outputs": weight("*.wo_a.weight", rolled),
            "places in an entry": weight("*.attn.compressor.ape", rolled),
            "halves of an entry": weight(
                "*.1.attn.compressor.wkv.weight", lambda w: np.roll(w, 32, axis=0)
            ),
            "weights of an entry": weight("*.attn.compressor.wgate.weight", ZEROS),
            "norm of entries": weight("*.attn.compressor.norm.weight", rolled),
            "index queries": weight("*.indexer.wq_b.weight", rolled),
            "index entries": weight("*.indexer.compressor.wkv.weight", rolled),
            "signs of index heads": weight("*.indexer.weights_proj.weight", np.negative),
            "experts of a token": weight("*.tid2eid", rolled),
            "bias of the choice": weight("*.ffn.gate.bias", lambda b: b[::-1].copy()),
            "routed_scaling_factor": config(routed_scaling_factor=1.0),
            "limit of SwiGLU": config(swiglu_limit=0.5),
            "Sinkhorn iterations": config(hc_sinkhorn_iters=1),
            "last sum of the streams": weight("hc_head_base", lambda b: b[::-1].copy()),
        },
        tolerance=2e-4,
    )
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_deepseek_v4_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_deepseek_v4_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(parity.GOLDEN / NAME, dtype="float32")[0]


def text(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(8, 96) for _ in range(count)]


def answer(model: CausalLM, session: Session, prompt: list[int]) -> tuple[list[int], int]:
    steps = list(decode(model, session, prompt, Sampling(), 5))
    return [token for token, _ in steps], steps[-1][1].reused_tokens


def fresh(model: CausalLM, prompt: list[int]) -> list[int]:
    return answer(model, Session(model.make_caches(), rewind=0), prompt)[0]


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 16, 33])
def test_entries_that_straddle_two_passes_are_the_same(model: CausalLM, chunk: int) -> None:
    tokens = mx.array([text(random.Random(3), 70)])
    caches = model.make_caches()
    parts = [model(tokens[:, at : at + chunk], caches) for at in range(0, 70, chunk)]
    assert float(mx.abs(mx.concatenate(parts, axis=1) - model(tokens)).max()) <= 1e-4


@pytest.mark.parametrize("seed", range(2))
def test_random_edits_give_what_fresh_sessions_give(model: CausalLM, seed: int) -> None:
    rng = random.Random(seed)
    session = Session(model.make_caches(), prefill_chunk=7)
    prompt = text(rng, 40)
    reused = 0
    for _ in range(6):
        found, again = answer(model, session, prompt)
        reused += again
        assert found == fresh(model, prompt)
        match rng.randrange(3):
            case 0:
                prompt = prompt + found + text(rng, rng.randrange(1, 20))
            case 1:
                prompt = prompt[:-3] + found + text(rng, 9)
            case _:
                prompt = prompt[: rng.randrange(1, len(prompt))] + text(rng, 9)
    assert reused > 0


def test_rows_of_different_lengths(model: CausalLM) -> None:
    rng = random.Random(5)
    prompts = [text(rng, count) for count in (31, 4, 17)]
    rows = [model.make_caches() for _ in prompts]
    for prompt, caches in zip(prompts, rows, strict=True):
        model(mx.array([prompt]), caches)
    found = model(mx.array([[9], [10], [11], [11]]), join_rows(rows, 4))
    for index, prompt in enumerate(prompts):
        wanted = model(mx.array([[*prompt, 9 + index]]))[0, -1]
        assert float(mx.abs(found[index, 0] - wanted).max()) <= 1e-4
    padded = decode_batch(model, prompts, Sampling(), 5, Timings(), prefill_chunk=9)
    answers = [list(row) for row in zip(*padded, strict=True)]
    assert answers == [fresh(model, prompt) for prompt in prompts]


def test_an_entry_of_other_tokens_would_show(model: CausalLM) -> None:
    caches = model.make_caches()
    model(mx.array([text(random.Random(2), 30)]), caches)
    cache = caches[1]
    assert isinstance(cache, CompressedCache)
    right = model(mx.array([[9]]), caches)
    again = model.make_caches()
    model(mx.array([text(random.Random(2), 30)]), again)
    cache = again[1]
    assert isinstance(cache, CompressedCache)
    window, entries, *others = cache.state
    cache.state = (window, mx.zeros_like(entries), *others)
    assert float(mx.abs(model(mx.array([[9]]), again) - right).max()) > 1e-3


@pytest.mark.parametrize("length", [3, 20, 63, 64])
def test_planned_bytes_are_those_of_real_caches(model: CausalLM, length: int) -> None:
    footprint = blueprint_from_config(NAME, published()).footprint()
    caches = model.make_caches()
    model(mx.array([text(random.Random(0), length)]), caches)
    found = [cache for cache in caches if cache]
    real = sum(cache.nbytes for cache in found)
    assert footprint.kv_bytes(length, float_bytes=4) == {"compressed layers": real}
    assert sum(cache.bytes_at(length) for cache in found) == real
    assert footprint.has_states and footprint.snapshot_bytes(length, 4) == real


def test_a_quantized_cache_is_refused(model: CausalLM) -> None:
    with pytest.raises(InvalidInput, match="kv_bits"):
        model.make_caches(kv=Quantization(8, 64))


def test_experts_that_a_token_has_not_are_refused(tmp_path: Path) -> None:
    change = weight("*.tid2eid", lambda table: table + 4)
    with pytest.raises(CheckpointError, match="tid2eid has indices from 4 to 9"):
        load_model(parity.copy(NAME, "config.json", tmp_path, change))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"compress_ratios": [0, 4]}, "compress_ratios"),
        ({"compress_ratios": [0, 4, 8, 4, 0]}, "compress_ratios"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"o_groups": 3}, "o_groups"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    architecture(published()).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published() | settings).build()
