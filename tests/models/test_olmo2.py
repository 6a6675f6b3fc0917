"""OLMo 2 and OLMo 3 against transformers' Olmo2ForCausalLM and Olmo3ForCausalLM."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from parity import Case, Change, config, weight, without

ONES = np.ones_like
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.2,
}


def of_full_layers(**settings: Any) -> Change:
    """Another scaling of the full layers' RoPE, in whichever dialect."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        scaling = (
            found["rope_parameters"][FULL] if "rope_parameters" in found else found["rope_scaling"]
        )
        scaling.update(settings)

    return change


def base(*kinds: str) -> Change:
    """A RoPE base of 1000 for these kinds of layers, as the newer dialect says it."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        scaling = found.get("rope_scaling") or found["rope_parameters"][FULL]
        both = {
            FULL: {"rope_theta": 5e5, **scaling},
            SLIDING: {"rope_theta": 5e5, "rope_type": "default"},
        }
        found["rope_parameters"] = both
        for kind in kinds:
            both[kind]["rope_theta"] = 1e3

    return change


def scaled_everywhere(found: dict[str, Any], weights: parity.Weights) -> None:
    found["rope_parameters"] = {kind: {"rope_theta": 5e5, **YARN} for kind in (SLIDING, FULL)}


COMMON = {
    "rms_norm_eps": config(rms_norm_eps=1e-5),
    "norm after attention": weight("*.post_attention_layernorm.weight", ONES),
    "norm after the feed-forward": weight("*.post_feedforward_layernorm.weight", ONES),
    "last norm": weight("model.norm.weight", ONES),
    "weight of the query norm": weight("*.q_norm.weight", ONES),
    "weight of the key norm": weight("*.k_norm.weight", ONES),
    "heads": config(num_attention_heads=2, num_key_value_heads=1),
    "tie_word_embeddings": without("lm_head.weight", tie_word_embeddings=True),
}
CASES = {
    "olmo2": Case(
        COMMON
        | {
            "rope_theta": config(rope_theta=5e5),
            "rope type": config(rope_scaling={"rope_type": "yarn"} | YARN),
        }
    ),
    "olmo3": Case(
        COMMON
        | {
            "window ignored": config(sliding_window=4096),
            "window one token wider": config(sliding_window=9),
            "window one token narrower": config(sliding_window=7),
            "kinds of layers": config(layer_types=[SLIDING, SLIDING, FULL, SLIDING]),
            "every layer full": config(layer_types=[FULL] * 4),
            "rope_theta of the full layers": base(FULL),
            "rope_theta of the sliding layers": base(SLIDING),
            "YaRN ignored": of_full_layers(rope_type="default"),
            "YaRN on the sliding layers": scaled_everywhere,
            "factor": of_full_layers(factor=4.0),
            "attention_factor": of_full_layers(attention_factor=1.0),
            "original_max_position_embeddings": of_full_layers(
                original_max_position_embeddings=4096
            ),
        }
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_olmo_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_olmo_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def flat(found: dict[str, Any], weights: parity.Weights) -> None:
    """YaRN as the newer dialect says it of a model with one kind of layers."""
    found["rope_parameters"] = {"rope_theta": found.pop("rope_theta"), **found.pop("rope_scaling")}


@pytest.mark.parametrize(
    "change", [config(layer_types=None), base(), flat], ids=["pattern", "by kind", "flat"]
)
def test_what_says_the_same_computes_the_same(change: Change, tmp_path: Path) -> None:
    assert parity.effect("olmo3", "config.json", change, tmp_path) <= parity.TOLERANCE


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("olmo2", {"sliding_window": 8}, "sliding_window"),
        ("olmo2", {"layer_types": [SLIDING, FULL]}, "sliding_attention"),
        ("olmo2", {"rope_theta": None}, "rope_theta"),
        ("olmo3", {"sliding_window": None}, "sliding_window"),
        ("olmo3", {"layer_types": [FULL, SLIDING]}, "layer_types has 2 values"),
        ("olmo3", {"layer_types": [FULL, "chunked_attention"] * 2}, "chunked_attention"),
        (
            "olmo3",
            {"rope_parameters": {FULL: {"rope_theta": 5e5}}, "rope_theta": None},
            "rope_theta",
        ),
        ("olmo3", {"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    name: str, settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / name / "config.json").read_text())
    architecture(published).build()  # as it stands it is accepted
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()


def test_a_missing_norm_is_named(tmp_path: Path) -> None:
    folder = parity.copy(
        "olmo2", "config.json", tmp_path, without("*.layers.1.post_feedforward_layernorm.*")
    )
    with pytest.raises(CheckpointError, match="model.layers.1.post_feedforward_layernorm.weight"):
        load_model(folder)
