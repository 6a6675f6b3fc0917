"""Qwen3 dense and Qwen2 against transformers' Qwen3ForCausalLM and Qwen2ForCausalLM."""

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
SLIDING, FULL = "sliding_attention", "full_attention"


def own_head(found: dict[str, Any], weights: parity.Weights) -> None:
    """A head beside tied embeddings counts."""
    weights["lm_head.weight"] = np.roll(weights["model.embed_tokens.weight"], 1, axis=0)


NORMS = {
    "rms_norm_eps": config(rms_norm_eps=1e-5),
    "input norm": weight("*.input_layernorm.weight", ONES),
    "post-attention norm": weight("*.post_attention_layernorm.weight", ONES),
    "last norm": weight("model.norm.weight", ONES),
}
COMMON = NORMS | {
    "weight of the query norm": weight("*.q_norm.weight", ONES),
    "weight of the key norm": weight("*.k_norm.weight", ONES),
    "QK-norm ignored": without("*.[qk]_norm.weight", model_type="llama"),
}
# Qwen2's: the biases, and a head size that is hidden / heads
BIASED = NORMS | {
    f"bias of {name}": weight(f"*.{name}_proj.bias", ZEROS) for name in ("q", "k", "v")
}
BIASED |= {
    "biases ignored": without("*_proj.bias", model_type="llama"),
    "rope_theta": config(rope_theta=1_000_000.0),
    "heads": config(num_attention_heads=2, num_key_value_heads=1),
}

CASES = {
    "qwen2": Case(BIASED | {"head of its own": own_head}),
    "qwen2_window": Case(
        {option: change for option, change in BIASED.items() if option != "biases ignored"}
        | {
            "window one token wider": config(sliding_window=9),
            "window one token narrower": config(sliding_window=7),
            "window ignored": config(layer_types=[FULL, FULL]),
            "window on every layer": config(layer_types=[SLIDING, SLIDING]),
            "tie_word_embeddings": without("lm_head.weight", tie_word_embeddings=True),
        }
    ),
    "qwen3": Case(
        COMMON | {"rope_theta": config(rope_theta=10_000.0), "head of its own": own_head}
    ),
    "qwen3_vl": Case(
        {
            "rms_norm_eps": config(rms_norm_eps=1e-2),
            "weight of the query norm": weight("*.q_norm.weight", ONES),
            "last norm": weight("*language_model.norm.weight", ONES),
            "rope_theta": config(rope_theta=1_000_000.0),
        }
    ),
    "qwen2_5_vl": Case(
        {
            "rms_norm_eps": config(rms_norm_eps=1e-2),
            "biases": weight("*.self_attn.k_proj.bias", lambda b: b + 1),
            "bias of values": weight("model.layers.*.v_proj.bias", ZEROS),
        }
    ),
    "qwen3_yarn": Case(
        COMMON
        | {
            "tie_word_embeddings": without("lm_head.weight", tie_word_embeddings=True),
            "rope_theta": config(rope_theta=1_000_000.0),
            "rope type ignored": config(rope_scaling=None),
            "rope type linear": config(rope_scaling={"rope_type": "linear"}),
            "factor": config(rope_scaling={"factor": 2.0}),
            "factor from the two contexts": config(rope_scaling={"factor": 8.0}),
            "original_max_position_embeddings": config(
                rope_scaling={"original_max_position_embeddings": 64}
            ),
            "attention factor ignored": config(rope_scaling={"attention_factor": 1.0}),
            "beta_fast, ends of the ramp equal": config(rope_scaling={"beta_fast": 0.5}),
            "beta_slow": config(rope_scaling={"beta_slow": 0.25}),
            "truncate": config(rope_scaling={"truncate": False}),
        }
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_qwen3_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_qwen3_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"use_sliding_window": True, "layer_types": [FULL, SLIDING]}, "sliding_window is missing"),
        (
            {"use_sliding_window": False, "sliding_window": 8, "layer_types": [FULL, SLIDING]},
            "switched off",
        ),
        ({"layer_types": [FULL]}, "layer_types has 1 values"),
        ({"layer_types": [FULL, "linear_attention"]}, "linear_attention"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias"),
        ({"rope_theta": None}, "rope_theta"),
        ({"num_experts": 8}, "num_experts"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "qwen3" / "config.json").read_text())
    architecture(published).build()  # as it stands it is accepted
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()


def test_a_window_that_is_switched_off_is_no_window(tmp_path: Path) -> None:
    # Qwen2.5 and some of its successors state one beside use_sliding_window = false
    assert (
        parity.effect("qwen3", "config.json", config(sliding_window=4), tmp_path)
        <= parity.TOLERANCE
    )


def test_the_first_layer_with_a_window_shows(tmp_path: Path) -> None:
    # in the older dialect; transformers 5 writes layer_types out
    change = config(max_window_layers=0)
    assert parity.effect("qwen2_window", "config.json", change, tmp_path) >= 3 * parity.TOLERANCE


@pytest.mark.parametrize("name", ["q", "v"])
def test_a_missing_bias_of_qwen2_is_named(name: str, tmp_path: Path) -> None:
    folder = parity.copy(
        "qwen2", "config.json", tmp_path, without(f"*.layers.1.self_attn.{name}_proj.bias")
    )
    with pytest.raises(CheckpointError, match=f"model.layers.1.self_attn.{name}_proj.bias"):
        load_model(folder)


@pytest.mark.parametrize("pattern", ["*.layers.1.*.q_norm.weight", "*.layers.0.*.k_norm.weight"])
def test_a_missing_qk_norm_is_named(pattern: str, tmp_path: Path) -> None:
    folder = parity.copy("qwen3", "config.json", tmp_path, without(pattern))
    with pytest.raises(CheckpointError, match=pattern[2:].replace("*", "self_attn")):
        load_model(folder)
