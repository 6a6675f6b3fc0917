"""Kimi Linear and Ling 3, which have Kimi Delta Attention, against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.errors import ConfigError
from mlxarch.loading.registry import architecture
from parity import Case, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like


def backwards(array: np.ndarray) -> np.ndarray:
    return array[::-1].copy()


def of_kda(prefix: str) -> dict[str, parity.Change]:
    """Options of KDA, for tensors of layer 0, whose names begin with ``prefix``."""
    return {
        "decays of other features": weight(f"{prefix}.dt_bias", backwards),
        "decay": weight(f"{prefix}.A_log", lambda a: a + 0.5),
        "write strength": weight(f"{prefix}.b_proj.weight", ZEROS),
        "convolution of keys": weight(f"{prefix}.k_conv1d.weight", lambda w: w[..., ::-1].copy()),
        "convolution of queries": weight(f"{prefix}.q_conv1d.weight", backwards),
        "norm of the outputs": weight(f"{prefix}.o_norm.weight", ONES),
        "heads": weight(f"{prefix}.v_proj.weight", lambda w: np.roll(w, 8, axis=0)),
    }


MOE = {
    "rms_norm_eps": config(rms_norm_eps=1e-2),
    "routed_scaling_factor": config(routed_scaling_factor=1.0),
    "shared expert": weight("*.shared_experts.down_proj.weight", ZEROS),
    "norm of the latent": weight("*.kv_a_layernorm.weight", ONES),
    "last norm": weight("model.norm.weight", ONES),
}
KDA, LING = "model.layers.0.self_attn", "model.layers.0.attention"
CASES = {
    "kimi_linear": Case(
        MOE
        | of_kda(KDA)
        | {
            "gate of the outputs": weight(f"{KDA}.g_b_proj.weight", ZEROS),
            "narrow matrix of the decay": weight(f"{KDA}.f_a_proj.weight", backwards),
            "experts per token": config(num_experts_per_token=2),
            "bias of the choice": weight("*.e_score_correction_bias", backwards),
        },
        tolerance=2e-4,
    ),
    "bailing_hybrid": Case(
        MOE
        | of_kda(LING)
        | {
            "smallest decay": config(kda_lower_bound=-4.0),
            "gate of the outputs": weight(f"{LING}.g_proj.weight", ZEROS),
            "gate of attention": weight("model.layers.1.attention.g_proj.weight", backwards),
            "rope_theta": config(rope_theta=100.0),
            "bias of the choice": weight("*.expert_bias", backwards),
        },
        tolerance=2e-4,
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_kimi_linear_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_kimi_linear_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("kimi_linear", {"linear_attn_config": {"num_heads": 0}}, "linear_attn_config"),
        ("kimi_linear", {"moe_router_activation_func": "softmax"}, "moe_router_activation_func"),
        ("bailing_hybrid", {"no_kda_lora": False}, "no_kda_lora"),
        ("bailing_hybrid", {"layer_types": ["full_attention"]}, "layer_types"),
        ("bailing_hybrid", {"moe_shared_expert_intermediate_size": 24}, "moe_shared_expert"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    name: str, settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / name / "config.json").read_text())
    architecture(published).build()
    config(**settings)(published, {})
    with pytest.raises(ConfigError, match=named):
        architecture(published).build()
