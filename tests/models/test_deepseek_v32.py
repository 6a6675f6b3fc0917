"""DeepSeek V3.2 and GLM-5, whose indexers choose keys, against transformers."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import CausalLM
from mlxarch.errors import ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from parity import Case, config, weight, without

ONES, ZEROS = np.ones_like, np.zeros_like
INDEXER = "*.self_attn.indexer"


def rolled(found: np.ndarray) -> np.ndarray:
    return np.roll(found, 1, axis=0)


def paired_otherwise(found: np.ndarray) -> np.ndarray:
    """Rows of a key whose 16 turned features come as neighbours instead of as halves, or back."""
    return np.concatenate([found[:16:2], found[1:16:2], found[16:]])


OPTIONS = {
    "index_topk": config(index_topk=15),
    "dense": config(index_topk=64),
    "index queries": weight(f"{INDEXER}.wq_b.weight", rolled),
    "index keys": weight(f"{INDEXER}.wk.weight", rolled),
    "pairing of an index key": weight(f"{INDEXER}.wk.weight", paired_otherwise),
    "norm of index keys": weight(f"{INDEXER}.k_norm.weight", ONES),
    "bias of index keys": weight(f"{INDEXER}.k_norm.bias", ZEROS),
    "weights of index heads": weight(f"{INDEXER}.weights_proj.weight", rolled),
    "signs of index heads": weight(f"{INDEXER}.weights_proj.weight", np.negative),
    "pairing of the indexer": lambda found, weights: found.update(
        indexer_rope_interleave=not found.get("indexer_rope_interleave", False)
    ),
    "rope_theta": config(rope_theta=100.0),
    "norm of the latent": weight("*.kv_a_layernorm.weight", ONES),
    "num_experts_per_tok": config(num_experts_per_tok=2),
    "correction bias": weight("*.e_score_correction_bias", ZEROS),
}
CASES = {
    "deepseek_v32": Case(
        OPTIONS
        | {
            "no groups": config(n_group=1, topk_group=1),
            "YaRN's factor": config(rope_scaling={"factor": 20}),
        },
        tolerance=2e-4,
    ),
    "glm_moe_dsa": Case(OPTIONS | {"rms_norm_eps": config(rms_norm_eps=1e-3)}),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_models_with_an_indexer_match_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_the_indexer_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def shared_second(tmp_path: Path, **settings: Any) -> CausalLM:
    """GLM-5 whose second layer has no indexer."""
    change = without("*.layers.1.self_attn.indexer.*", **settings)
    return load_model(parity.copy("glm_moe_dsa", "config.json", tmp_path, change), dtype="float32")[
        0
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"indexer_types": ["full", "shared", "full"]},
        {"index_topk_freq": 2, "index_skip_topk_offset": 1},
    ],
)
def test_a_layer_without_an_indexer_takes_the_choice_of_the_one_before(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = shared_second(tmp_path, **settings)
    ids = mx.array(parity.reference("glm_moe_dsa")["input_ids"])
    first, second = (cache for cache in model.make_caches()[:2] if cache)
    whole = model(ids)
    caches = model.make_caches()
    parts = [model(ids[:, at : at + 7], caches) for at in range(0, ids.shape[1], 7)]
    assert float(mx.abs(mx.concatenate(parts, axis=1) - whole).max()) <= 1e-4
    first, second = caches[0], caches[1]
    assert first is not None and second is not None
    assert [len(first.arrays()), len(second.arrays())] == [2, 1]  # latents, and index keys
    # negative control: with a choice of its own the layer attends to other tokens
    reference = parity.reference("glm_moe_dsa")["logits"]
    assert float(mx.abs(whole - mx.array(reference)).max()) > 1e-2


def test_index_keys_are_in_the_cache_and_are_cut_with_it() -> None:
    model, _ = load_model(parity.GOLDEN / "deepseek_v32", dtype="float32")
    rng = random.Random(0)
    caches = model.make_caches()
    text = [rng.randrange(8, 96) for _ in range(40)]
    model(mx.array([text]), caches)
    for cache in caches:
        assert cache is not None and cache.truncate(23)
    again = [*text[:23], *reversed(text)]
    found = model(mx.array([again[23:]]), caches)
    wanted = model(mx.array([again]))[:, 23:]
    assert float(mx.abs(found - wanted).max()) <= 1e-4
    # negative control: keys of other tokens choose others
    for cache in caches:
        assert cache is not None
        latents, keys = cache.arrays()
        cache.restore(cache.length, [(latents[:, :, : cache.length], keys[:, :, -cache.length :])])
    moved = model(mx.array([again[-1:]]), caches)
    assert float(mx.abs(moved - model(mx.array([[*again, again[-1]]]))[:, -1:]).max()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"indexer_types": ["shared", "full", "full"]}, "indexer_types"),
        ({"indexer_types": ["full"]}, "indexer_types"),
        ({"index_topk_freq": 3}, "index_skip_topk_offset"),
        ({"index_topk_pattern": "FSS"}, "index_topk_pattern"),
        ({"q_lora_rank": None}, "q_lora_rank"),
        ({"index_head_dim": 8}, "index_head_dim"),
        ({"n_group": 2}, "n_group"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "glm_moe_dsa" / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()
