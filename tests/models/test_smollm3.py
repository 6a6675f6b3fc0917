"""SmolLM3 against transformers' SmolLM3ForCausalLM."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.blocks import NoRoPE
from mlxarch.errors import ConfigError
from mlxarch.loading.registry import architecture
from parity import Case, config, weight, without

ONES, ZEROS = np.ones_like, np.zeros_like
SLIDING, FULL = "sliding_attention", "full_attention"


def own_head(found: dict[str, Any], weights: parity.Weights) -> None:
    """A head beside tied embeddings counts."""
    weights["lm_head.weight"] = np.roll(weights["model.embed_tokens.weight"], 1, axis=0)


COMMON = {
    "rms_norm_eps": config(rms_norm_eps=1e-5),
    "input norm": weight("*.input_layernorm.weight", ONES),
    "post-attention norm": weight("*.post_attention_layernorm.weight", ONES),
    "last norm": weight("model.norm.weight", ONES),
    "rope_theta": config(rope_theta=500.0),
}
CASES = {
    "smollm3": Case(
        COMMON
        | {
            "RoPE on every layer": config(no_rope_layers=[1, 1, 1, 1]),
            "a 1 for no RoPE": config(no_rope_layers=[0, 0, 0, 1]),
            "another layer without RoPE": config(no_rope_layers=[1, 1, 0, 1]),
            "head of its own": own_head,
        }
    ),
    "smollm3_window": Case(
        COMMON
        | {f"bias of {name}": weight(f"*.{name}_proj.bias", ZEROS) for name in ("q", "k", "v", "o")}
        | {
            f"bias of {name}": weight(f"*.{name}_proj.bias", ZEROS)
            for name in ("gate", "up", "down")
        }
        | {
            "attention_bias": without("*.self_attn.*.bias", attention_bias=False),
            "mlp_bias": without("*.mlp.*.bias", mlp_bias=False),
            "tie_word_embeddings": without("lm_head.weight", tie_word_embeddings=True),
            "window one token wider": config(sliding_window=9),
            "window one token narrower": config(sliding_window=7),
            "window on the other layers": config(layer_types=[SLIDING, FULL, SLIDING]),
            "window on every layer": config(layer_types=[SLIDING] * 3),
            "window ignored": config(layer_types=[FULL] * 3),
            "RoPE on every layer": config(no_rope_layers=[1, 1, 1]),
        }
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_smollm3_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_smollm3_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize(
    "settings",
    [{"no_rope_layer_interval": 3}, {"use_sliding_window": False}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_only_the_older_dialect_leaves_to_a_rule_shows(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    effect = parity.effect("smollm3_window", "config.json", config(**settings), tmp_path)
    assert effect >= 3 * parity.TOLERANCE


def published(name: str = "smollm3", **settings: Any) -> dict[str, Any]:
    return json.loads((parity.GOLDEN / name / "config.json").read_text()) | settings


@pytest.mark.parametrize("settings", [{}, {"no_rope_layers": None}], ids=["listed", "by rule"])
def test_every_fourth_layer_has_no_positions(settings: dict[str, Any]) -> None:
    layers: list[Any] = list(architecture(published(**settings)).build().layers)
    attentions = [layer.self_attn for layer in layers]
    assert [isinstance(attention.rope, NoRoPE) for attention in attentions] == [
        False,
        False,
        False,
        True,
    ]


def test_a_window_that_is_switched_off_is_no_window(tmp_path: Path) -> None:
    assert (
        parity.effect("smollm3", "config.json", config(sliding_window=4), tmp_path)
        <= parity.TOLERANCE
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"no_rope_layers": [1, 1, 1]}, "no_rope_layers has 3 values"),
        ({"no_rope_layers": [1, 1, 1, 2]}, "no_rope_layers"),
        ({"layer_types": [FULL, FULL, FULL, SLIDING], "sliding_window": 8}, "switched off"),
        ({"layer_types": [FULL, FULL, FULL, "linear_attention"]}, "linear_attention"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    architecture(published()).build()  # as it stands it is accepted
    with pytest.raises(ConfigError, match=named):
        architecture(published(**settings)).build()
