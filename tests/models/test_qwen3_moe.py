"""Qwen3 MoE and Qwen2 MoE against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from parity import Case, config, weight, without

ONES, ZEROS = np.ones_like, np.zeros_like


def swap_experts(found: dict[str, Any], weights: parity.Weights) -> None:
    """The router's rows in another order: each token goes to the neighbour of its expert."""
    for name in weights:
        if name.endswith("mlp.gate.weight"):
            weights[name] = np.roll(weights[name], 1, axis=0)


COMMON = {
    "rms_norm_eps": config(rms_norm_eps=1e-5),
    "post-attention norm": weight("*.post_attention_layernorm.weight", ONES),
    "num_experts_per_tok": config(num_experts_per_tok=2),
    "the wrong experts": swap_experts,
    "rope_theta": config(rope_theta=1_000_000.0),
}
CASES = {
    "qwen3_moe": Case(
        COMMON
        | {
            "norm_topk_prob": config(norm_topk_prob=False),
            "weight of the query norm": weight("*.q_norm.weight", ONES),
            "YaRN ignored": config(rope_scaling=None),
            "YaRN's factor": config(rope_scaling={"factor": 2.0}),
        }
    ),
    "qwen3_vl_moe": Case(
        {
            "num_experts_per_tok": config(num_experts_per_tok=2),
            "weight of the query norm": weight("*.q_norm.weight", ONES),
            "gate and up": weight("*.experts.gate_up_proj", lambda w: np.roll(w, 12, axis=2)),
        }
    ),
    "qwen2_moe": Case(
        COMMON
        | {
            "norm_topk_prob": config(norm_topk_prob=True),
            "biases of q, k and v": weight("*.[qkv]_proj.bias", ZEROS),
            "shared expert": weight("*.shared_expert.down_proj.weight", ZEROS),
            "gate of the shared expert": weight("*.shared_expert_gate.weight", ZEROS),
        }
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_qwen_moe_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_qwen_moe_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def test_a_dense_layer_among_sparse_ones_is_what_the_config_says(tmp_path: Path) -> None:
    for change in (
        config(mlp_only_layers=[]),
        config(mlp_only_layers=[0]),
        config(decoder_sparse_step=2),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        with pytest.raises(CheckpointError, match=r"missing: .*mlp"):
            load_model(parity.copy("qwen3_moe", "config.json", folder, change))


@pytest.mark.parametrize(
    "pattern", ["*.layers.0.mlp.experts.3.up_proj.weight", "*.layers.2.mlp.experts.0.*"]
)
def test_a_missing_expert_is_named(pattern: str, tmp_path: Path) -> None:
    folder = parity.copy("qwen3_moe", "config.json", tmp_path, without(pattern))
    with pytest.raises(CheckpointError, match="lacks expert [30]"):
        load_model(folder)


def test_experts_of_different_shapes_are_refused(tmp_path: Path) -> None:
    change = weight("*.layers.0.mlp.experts.3.up_proj.weight", lambda found: found[:-1])
    with pytest.raises(CheckpointError, match="experts of different shapes"):
        load_model(parity.copy("qwen3_moe", "config.json", tmp_path, change))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "sliding_attention",
        ),
        ({"n_routed_experts": 4}, "n_routed_experts"),
        ({"num_experts": -1}, "num_experts"),
        ({"num_experts": 10**12}, "num_experts"),
        ({"num_experts": 1}, "num_experts_per_tok is 3, and there are 1 experts"),
        ({"layer_types": 7}, "layer_types"),
        ({"num_attention_heads": 2**31 - 1, "num_key_value_heads": 1}, "its numbers make no model"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type"),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": -1,
                }
            },
            "no frequencies",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "no frequencies"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "qwen3_moe" / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()


def test_experts_of_transformers_5_are_not_transposed(tmp_path: Path) -> None:
    change = weight("*.experts.*_proj", lambda w: w.swapaxes(1, 2).copy())
    assert parity.effect("qwen3_vl_moe", "config.json", change, tmp_path) <= parity.TOLERANCE
