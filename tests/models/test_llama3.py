"""Llama 3 and its relatives against transformers' LlamaForCausalLM and MistralForCausalLM."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.blocks import Attention, Cache, ForwardContext, Full, Sliding
from mlxarch.errors import CheckpointError, ConfigError, UnsupportedArchitecture
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from parity import Case, config, weight, without

ONES, ZEROS = np.ones_like, np.zeros_like


def own_head(found: dict[str, Any], weights: parity.Weights) -> None:
    """A head beside tied embeddings counts."""
    weights["lm_head.weight"] = np.roll(weights["model.embed_tokens.weight"], 1, axis=0)


COMMON = {
    "rms_norm_eps": config(rms_norm_eps=1e-5),
    "input norm": weight("*.input_layernorm.weight", ONES),
    "post-attention norm": weight("*.post_attention_layernorm.weight", ONES),
    "last norm": weight("model.norm.weight", ONES),
}
# matrices keep their shapes, and are cut into heads of another size
HEAD_SIZE = {"head_dim": config(num_attention_heads=2, num_key_value_heads=1, head_dim=16)}
TIED = {"tie_word_embeddings": without("lm_head.weight", tie_word_embeddings=True)}

CASES = {
    "llama3": Case(
        COMMON
        | HEAD_SIZE
        | TIED
        | {
            "rope_theta": config(rope_theta=10_000.0),
            "rope type ignored": config(rope_scaling=None),
            "rope type linear": config(rope_scaling={"rope_type": "linear"}),
            "factor": config(rope_scaling={"factor": 4.0}),
            "low_freq_factor": config(rope_scaling={"low_freq_factor": 2.0}),
            "high_freq_factor": config(rope_scaling={"high_freq_factor": 8.0}),
            "original_max_position_embeddings": config(
                rope_scaling={"original_max_position_embeddings": 32}
            ),
        }
    ),
    "llama3_tied": Case(
        COMMON
        | {
            "rope_theta": config(rope_theta=10_000.0),
            "rope type ignored": config(rope_scaling=None),
            "factor": config(rope_scaling={"factor": 8.0}),
            "low_freq_factor": config(rope_scaling={"low_freq_factor": 0.25}),
            "high_freq_factor": config(rope_scaling={"high_freq_factor": 8.0}),
            "original_max_position_embeddings": config(
                rope_scaling={"original_max_position_embeddings": 64}
            ),
            "head_dim": config(num_attention_heads=8, num_key_value_heads=4, head_dim=8),
            "head of its own": own_head,
        }
    ),
    "llama_linear": Case(
        COMMON
        | HEAD_SIZE
        | TIED
        | {
            "rope_theta": config(rope_theta=5_000.0),
            "rope type ignored": config(rope_scaling=None),
            "factor": config(rope_scaling={"factor": 2.0}),
        }
    ),
    "llama_yarn": Case(
        COMMON
        | TIED
        | {
            "rope_theta": config(rope_theta=10_000.0),
            "rope type ignored": config(rope_scaling=None),
            "rope type linear": config(rope_scaling={"rope_type": "linear"}),
            "factor": config(rope_scaling={"factor": 4.0}),
            "original_max_position_embeddings": config(
                rope_scaling={"original_max_position_embeddings": 32}
            ),
            "attention_factor 1": config(rope_scaling={"attention_factor": 1.0}),
            "attention_factor derived": config(rope_scaling={"attention_factor": None}),
            "mscale": config(
                rope_scaling={"attention_factor": None, "mscale": 2.0, "mscale_all_dim": 1.0}
            ),
            "beta_fast": config(rope_scaling={"beta_fast": 2.0}),
            "beta_slow": config(rope_scaling={"beta_slow": 1.0}),
            "truncate": config(rope_scaling={"truncate": True}),
        }
    ),
    "llama_bias": Case(
        COMMON
        | TIED
        | {"rope_theta": config(rope_theta=500_000.0)}
        | {f"bias of {name}": weight(f"*.{name}_proj.bias", ZEROS) for name in ("q", "k", "v", "o")}
        | {
            f"bias of {name}": weight(f"*.{name}_proj.bias", ZEROS)
            for name in ("gate", "up", "down")
        }
        | {
            "attention_bias": without("*.self_attn.*.bias", attention_bias=False),
            "mlp_bias": without("*.mlp.*.bias", mlp_bias=False),
        }
    ),
    "mistral": Case(COMMON | HEAD_SIZE | TIED | {"rope_theta": config(rope_theta=10_000.0)}),
    "mistral_window": Case(
        COMMON
        | HEAD_SIZE
        | TIED
        | {
            "rope_theta": config(rope_theta=1_000_000.0),
            "window ignored": config(sliding_window=None),
            "window one token wider": config(sliding_window=9),
            "window one token narrower": config(sliding_window=7),
        }
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_llama3_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_llama3_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def test_positions_that_start_anew_in_every_chunk_show(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Restarting(ForwardContext):
        def __init__(self, length: int, caches: Sequence[Cache] | None = None) -> None:
            super().__init__(length, caches)
            self.offset = 0

    monkeypatch.setattr("mlxarch.blocks.decoder.ForwardContext", Restarting)
    found = parity.differences("llama3", "config.json", tmp_path)
    assert found.whole <= parity.TOLERANCE
    assert min(found.chunked, found.cached) >= 3 * parity.TOLERANCE


def published(name: str, **settings: Any) -> dict[str, Any]:
    """The published config of a fixture with some keys changed."""
    return json.loads((parity.GOLDEN / name / "config.json").read_text()) | settings


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "unknown rope type": ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
    "unknown rope type in the older spelling": (
        {"rope_scaling": {"type": "spiral", "factor": 2.0}},
        "spiral",
    ),
    "unknown rope type in rope_parameters": (
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}, "rope_scaling": None},
        "spiral",
    ),
    "rope type that is not computed": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "dynamic",
    ),
    "rope parameter missing": ({"rope_scaling": {"type": "linear"}}, "factor"),
    "rope parameter of another type": (
        {"rope_scaling": {"type": "linear", "factor": "4"}},
        "factor",
    ),
    "unknown activation": ({"hidden_act": "gelu_new"}, "hidden_act"),
    "unknown kind of layer": (
        {"layer_types": ["full_attention", "linear_attention"]},
        "linear_attention",
    ),
    "part of a head is rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "the same in the dialect of transformers 5": (
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        "partial_rotary_factor",
    ),
    "heads that no group size fits": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "hidden size that no head count divides": ({"hidden_size": 33}, "hidden_size"),
    "odd head size": ({"head_dim": 7}, "7"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "text for a number": ({"hidden_size": "32"}, "hidden_size"),
    "negative eps": ({"rms_norm_eps": -1e-5}, "rms_norm_eps"),
    "theta of zero": ({"rope_theta": 0}, "rope_theta"),
}


@pytest.mark.parametrize("name", ["llama_linear", "mistral"])
@pytest.mark.parametrize("reason", WRONG)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(name: str, reason: str) -> None:
    settings, named = WRONG[reason]
    architecture(published(name)).build()  # as it stands it is accepted
    with pytest.raises(ConfigError, match=named):
        architecture(published(name, **settings)).build()


def test_all_missing_keys_are_named_at_once() -> None:
    found = published("llama3")
    missing = ["hidden_size", "num_hidden_layers", "vocab_size"]
    for key in missing:
        del found[key]
    with pytest.raises(ConfigError) as error:
        architecture(found)
    assert all(key in str(error.value) for key in missing)
    assert "num_attention_heads" not in str(error.value)


@pytest.mark.parametrize("kind", ["llama5", None, ["llama"], "../llama3", "llama3.py"])
def test_an_unknown_model_type_is_refused_and_the_known_ones_are_named(kind: Any) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"known: .*\bllama, .*\bmistral\b"):
        architecture(published("llama3", model_type=kind))


@pytest.mark.parametrize(
    ("name", "change", "tensor"),
    [
        (
            "llama3",
            without("model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.up_proj.weight",
        ),
        ("llama3", without("lm_head.weight"), "lm_head.weight"),
        ("llama3_tied", config(tie_word_embeddings=False), "lm_head.weight"),
        ("llama3_tied", config(head_dim=8), "self_attn."),
        ("llama3", config(num_key_value_heads=1), "self_attn.k_proj.weight"),
        ("llama3", config(num_hidden_layers=1), "model.layers.1."),
        ("llama3", config(attention_bias=True), "self_attn.q_proj.bias"),
        ("llama_bias", config(mlp_bias=False), "mlp.down_proj.bias"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(
    name: str, change: parity.Change, tensor: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as error:
        load_model(parity.copy(name, "config.json", tmp_path, change))
    assert tensor in str(error.value)


def test_a_mistral_config_without_a_window_key_has_the_window_of_transformers() -> None:
    published = json.loads((parity.GOLDEN / "mistral" / "config.json").read_text())
    silent = {key: value for key, value in published.items() if key != "sliding_window"}
    for found, span in ((published, Full()), (silent, Sliding(4096))):
        layer: Any = architecture(found).build().layers[0]
        attention = layer.self_attn
        assert isinstance(attention, Attention)
        assert attention.span == span
