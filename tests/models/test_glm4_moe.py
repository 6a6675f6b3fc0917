"""GLM-4.5 and GLM-4.5 Air against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import ConfigError
from mlxarch.loading.registry import architecture
from mlxarch.loading.resolve import resolve
from parity import Case, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like


def partial_rotary_factor(found: dict[str, Any], weights: parity.Weights) -> None:
    """Set in whichever place the dialect has it."""
    (found.get("rope_parameters") or found)["partial_rotary_factor"] = 1.0


COMMON = {
    "rms_norm_eps": config(rms_norm_eps=1e-5),
    "post-attention norm": weight("*.post_attention_layernorm.weight", ONES),
    "rope_theta": config(rope_theta=1_000_000.0),
    "partial_rotary_factor": partial_rotary_factor,
    "biases of q, k and v": weight("*.[qkv]_proj.bias", ZEROS),
    "the wrong experts": weight("*.mlp.gate.weight", lambda found: np.roll(found, 1, axis=0)),
    "num_experts_per_tok": config(num_experts_per_tok=2),
    "norm_topk_prob": config(norm_topk_prob=False),
    "routed_scaling_factor": config(routed_scaling_factor=2.0),
    "correction bias": weight("*.e_score_correction_bias", ZEROS),
    "shared experts": weight("*.shared_experts.down_proj.weight", ZEROS),
}
CASES = {
    "glm4_moe": Case(
        COMMON
        | {
            "weight of the query norm": weight("*.q_norm.weight", ONES),
            "weight of the key norm": weight("*.k_norm.weight", ONES),
        }
    ),
    "glm45_air": Case(COMMON),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_glm_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_glm_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def test_half_of_a_head_is_turned_where_the_config_does_not_say(tmp_path: Path) -> None:
    change = config(partial_rotary_factor=0.5)
    published = json.loads((parity.GOLDEN / "glm4_moe" / "config.json").read_text())
    del published["partial_rotary_factor"]
    assert (
        architecture(published).config
        == architecture(published | {"partial_rotary_factor": 0.5}).config
    )
    assert parity.effect("glm4_moe", "config.json", change, tmp_path) <= parity.TOLERANCE


def test_a_layer_that_predicts_a_second_token_is_left_out_by_its_number(tmp_path: Path) -> None:
    ignored = resolve(open_checkpoint(parity.copy("glm45_air", "config.json", tmp_path))).ignored
    assert "model.layers.2.shared_head.norm.weight" in ignored
    assert all(name.startswith("model.layers.2.") for name in ignored)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.01}, "RoPE turns pairs"),
        ({"n_group": 3}, "n_group"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"sliding_window": 4096}, "sliding_window"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "glm4_moe" / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()


def test_the_dense_layers_are_counted_where_only_kinds_are_written() -> None:
    published = json.loads((parity.GOLDEN / "glm4_moe_lite" / "config.json").read_text())
    layers, dense = published["num_hidden_layers"], published.pop("first_k_dense_replace")
    kinds = ["dense"] * dense + ["sparse"] * (layers - dense)
    found: Any = architecture(published | {"mlp_layer_types": kinds}).config
    assert found.first_k_dense_replace == dense == 1
    for settings in ({"mlp_layer_types": kinds[::-1]}, {"first_k_dense_replace": 2}):
        with pytest.raises(ConfigError, match="mlp_layer_types"):
            architecture(published | {"mlp_layer_types": kinds} | settings)
