"""Qwen3.5, dense and MoE, against transformers' Qwen3_5ForConditionalGeneration and its MoE."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model, open_resolved
from mlxarch.loading.registry import architecture
from parity import Case, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like


def halves(matrix: np.ndarray) -> np.ndarray:
    """Queries of all heads, then all gates, in place of query and gate of each head."""
    return matrix.reshape(4, 2, 16, -1).swapaxes(0, 1).reshape(matrix.shape)


COMMON = {
    "rms_norm_eps": config(rms_norm_eps=1e-2),
    "input norm": weight("*.input_layernorm.weight", ZEROS),
    "last norm": weight("*language_model.norm.weight", ZEROS),
    "query norm": weight("*.q_norm.weight", ZEROS),
    "rope_theta": config(rope_theta=1_000_000.0),
    "rotary share": config(rope_scaling={"partial_rotary_factor": 0.5}),
    "gates of attention": weight("*.self_attn.q_proj.weight", halves),
    "decay": weight("*.A_log", lambda a: a + 0.5),
    "no memory": weight("*.A_log", lambda a: a + 9),
    "bias of the decay": weight("*.dt_bias", ZEROS),
    "write strength": weight("*.in_proj_b.weight", ZEROS),
    "decay by token": weight("*.in_proj_a.weight", ZEROS),
    "gate of the DeltaNet": weight("*.in_proj_z.weight", ZEROS),
    "norm of the DeltaNet": weight("*.linear_attn.norm.weight", ONES),
    "convolution backwards": weight("*.conv1d.weight", lambda w: w[..., ::-1].copy()),
    "last input of the convolution": weight(
        "*.conv1d.weight", lambda w: w * np.array([0, 1, 1, 1], np.float32)
    ),
    "key heads": weight("*.in_proj_qkv.weight", lambda w: np.roll(w, 8, axis=0)),
}
CASES = {
    "qwen3_5": Case(COMMON, tolerance=2e-4),
    "qwen3_5_tied": Case(tolerance=2e-4),
    "qwen3_5_moe": Case(
        {
            "num_experts_per_tok": config(num_experts_per_tok=2),
            "router": weight("*.mlp.gate.weight", lambda w: np.roll(w, 1, axis=0)),
            "shared expert": weight("*.shared_expert.down_proj.weight", ZEROS),
            "gate of the shared expert": weight("*.shared_expert_gate.weight", ZEROS),
            "gate and up": weight("*.experts.gate_up_proj", lambda w: np.roll(w, 12, axis=1)),
        },
        tolerance=2e-4,
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_qwen3_5_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_qwen3_5_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def as_mlx_lm(found: dict[str, Any], weights: parity.Weights) -> None:
    """Norms as 1 + weight, convolutions as (C, kernel, 1), as MLX-LM writes them."""
    for name, value in weights.items():
        if name.endswith("conv1d.weight"):
            weights[name] = value.swapaxes(-1, -2).copy()
        elif "norm" in name and "linear_attn" not in name and "visual" not in name:
            weights[name] = value + 1


def test_norms_that_contain_the_1_are_recognised(tmp_path: Path) -> None:
    assert parity.effect("qwen3_5", "config.json", as_mlx_lm, tmp_path) <= 2e-4


def test_norms_alone_are_not_shifted(tmp_path: Path) -> None:
    def norms(found: dict[str, Any], weights: parity.Weights) -> None:
        convolutions = {n: w for n, w in weights.items() if n.endswith("conv1d.weight")}
        as_mlx_lm(found, weights)
        weights.update(convolutions)

    assert parity.effect("qwen3_5", "config.json", norms, tmp_path) > 0.1


def test_tower_and_prediction_head_are_left_out_by_name() -> None:
    with open_resolved(parity.GOLDEN / "qwen3_5") as found:
        reasons = {name.split(".")[0]: reason for name, reason in found.ignored.items()}
        named = set(found.ignored.values())
    assert reasons["mtp"] == "multi-token prediction head"
    assert named == {"tower", "multi-token prediction head"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layer_types": ["linear_attention"] * 2}, "layer_types has 2 values"),
        ({"layer_types": ["linear_attention", "mamba", "full_attention"]}, "layer_types"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads"),
        ({"attn_output_gate": False}, "attn_output_gate"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_experts": 4}, "moe_intermediate_size"),
        ({"sliding_window": 8}, "sliding_window"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "qwen3_5" / "config.json").read_text())
    architecture(published).build()
    published["text_config"] |= settings
    with pytest.raises(ConfigError, match=named):
        architecture(published)


def test_a_missing_state_parameter_is_named(tmp_path: Path) -> None:
    change = parity.without("*.layers.2.linear_attn.A_log")
    folder = parity.copy("qwen3_5", "config.json", tmp_path, change)
    with pytest.raises(CheckpointError, match=r"layers\.2\.linear_attn\.A_log"):
        load_model(folder)
