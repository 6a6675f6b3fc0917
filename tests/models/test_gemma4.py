"""Gemma 4 against transformers' Gemma4ForConditionalGeneration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.errors import ConfigError
from mlxarch.loading.load import load_model, open_resolved
from mlxarch.loading.registry import architecture
from mlxarch.ssd_streaming.embeddings import tables_of
from parity import Case, Change, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like
FULL, SLIDING = "full_attention", "sliding_attention"


def rope(layer_type: str, **settings: Any) -> Change:
    """Changes the RoPE of one type of layers."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        parameters = found["text_config"]["rope_parameters"]
        found["text_config"]["rope_parameters"] = parameters | {
            layer_type: parameters[layer_type] | settings
        }

    return change


COMMON = {
    "window one token wider": config(sliding_window=9),
    "soft cap of the logits": config(final_logit_softcapping=15.0),
    "base of sliding layers": rope(SLIDING, rope_theta=1000.0),
    "base of full layers": rope(FULL, rope_theta=10_000.0),
    "share of full layers": rope(FULL, partial_rotary_factor=0.5),
    "proportional RoPE": rope(FULL, rope_type="default", partial_rotary_factor=1.0),
    "factors of layers": weight("*.layer_scalar", ONES),
    "query norm": weight("*language_model*.q_norm.weight", ONES),
    "norm after attention": weight("*language_model*.post_attention_layernorm.weight", ONES),
}
CASES = {
    "gemma4": Case(COMMON, tolerance=2e-4),
    "gemma4_e2b": Case(
        COMMON
        | {
            "projection of the embeddings": weight("*.per_layer_model_projection.weight", ZEROS),
            "table of the embeddings": weight("*.embed_tokens_per_layer.weight", ZEROS),
            "norm of the embeddings": weight("*.post_per_layer_input_norm.weight", ONES),
            "wide feed-forwards": weight("*.layers.3.mlp.down_proj.weight", ZEROS),
        },
        tolerance=2e-4,
    ),
    "gemma4_moe": Case(
        COMMON
        | {
            "experts per token": config(top_k_experts=2),
            "scale of the router": weight("*.router.scale", ONES),
            "factors of experts": weight("*.router.per_expert_scale", ONES),
            "norm before the experts": weight("*.pre_feedforward_layernorm_2.weight", ONES),
            "norm after the experts": weight("*.post_feedforward_layernorm_2.weight", ONES),
            "norm after the dense part": weight("*.post_feedforward_layernorm_1.weight", ONES),
        },
        tolerance=2e-4,
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_gemma4_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_gemma4_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def published(name: str, **settings: Any) -> dict[str, Any]:
    found = json.loads((parity.GOLDEN / name / "config.json").read_text())
    return found | {"text_config": found["text_config"] | settings}


def test_the_unified_model_is_the_dense_one(tmp_path: Path) -> None:
    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        found["model_type"] = "gemma4_unified"
        found["text_config"]["model_type"] = "gemma4_unified_text"
        weights["model.vision_embedder.patch_dense.weight"] = np.ones((2, 2), np.float32)

    assert parity.effect("gemma4", "config.json", change, tmp_path) <= 2e-4


def test_only_models_with_per_layer_embeddings_have_a_table() -> None:
    assert tables_of(architecture(published("gemma4_e2b")).build()) == (
        "model.embed_tokens_per_layer",
    )
    assert tables_of(architecture(published("gemma4")).build()) == ()


def test_towers_are_left_out_by_name() -> None:
    with open_resolved(parity.GOLDEN / "gemma4") as found:
        assert set(found.ignored.values()) == {"tower"}


def test_sharing_layers_have_no_cache_of_their_own() -> None:
    model, _ = load_model(parity.GOLDEN / "gemma4_e2b", dtype="float32")
    assert [cache is None for cache in model.make_caches()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"enable_moe_block": True}, "top_k_experts"),
        ({"per_layer_config": {"0": {"sliding_window": 9}}}, "sliding_window"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    architecture(published("gemma4")).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published("gemma4", **settings)).build()
