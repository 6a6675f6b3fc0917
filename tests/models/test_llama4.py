"""Llama 4 against transformers."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from parity import Case, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like


def all_layers(value: int) -> parity.Change:
    """RoPE and chunks on all layers, or on none."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        found["no_rope_layers"] = [value] * found["num_hidden_layers"]
        found.pop("layer_types", None)

    return change


def up_before_gate(stored: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(stored, 2, axis=-1)[::-1], axis=-1)


COMMON = {
    "rms_norm_eps": config(rms_norm_eps=1e-6),
    "post-attention norm": weight("*.post_attention_layernorm.weight", ONES),
    "attention_chunk_size": config(attention_chunk_size=9),
    "no chunks within the prompt": config(attention_chunk_size=64),
    "layers without positions": all_layers(1),
    "layers with positions": all_layers(0),
    "attn_temperature_tuning": config(attn_temperature_tuning=False),
    "attn_scale": config(attn_scale=0.1),
    "floor_scale": config(floor_scale=9),
    "rope_theta": config(rope_theta=500.0),
    "use_qk_norm": lambda found, weights: found.update(use_qk_norm=not found["use_qk_norm"]),
    "shared expert": weight("*.shared_expert.down_proj.weight", ZEROS),
    "the wrong experts": weight("*.router.weight", lambda found: np.roll(found, 1, axis=0)),
    "weight of the chosen expert": weight("*.router.weight", lambda found: 2 * found),
    "gate and up exchanged": weight("*.experts.gate_up_proj", up_before_gate),
}
CASES = {
    "llama4_scout": Case(
        COMMON
        | {
            "RoPE scaling ignored": config(rope_scaling=None),
            "its factor": config(rope_scaling={"factor": 8.0}),
        }
    ),
    "llama4_maverick": Case(
        COMMON | {"dense layers": weight("*.layers.[02].feed_forward.down_proj.weight", ZEROS)},
    ),
    "llama4_two_experts": Case(COMMON | {"one expert": config(num_experts_per_tok=1)}),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_llama4_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_llama4_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def test_the_eps_of_the_qk_norm_is_that_of_the_config(tmp_path: Path) -> None:
    model, _ = load_model(parity.copy("llama4_scout", "config.json", tmp_path), dtype="float32")
    wanted = parity.reference("llama4_scout")
    layers: list[Any] = list(model.layers[:3])
    for layer in layers:
        attention = layer.self_attn
        assert attention.eps == 1e-3
        attention.eps = 1e-6
    difference = np.abs(np.array(model(mx.array(wanted["input_ids"]))) - wanted["logits"]).max()
    assert difference >= 3 * parity.TOLERANCE


def wrapped(found: dict[str, Any], weights: parity.Weights) -> None:
    """As the published files have it: a vision tower and its projector beside the text model."""
    text = dict(found)
    found.clear()
    found.update(model_type="llama4", text_config=text, vision_config={"hidden_size": 8})
    for name in list(weights):
        weights[f"language_model.{name}"] = weights.pop(name)
    for name in ("vision_model.class_embedding", "multi_modal_projector.linear_1.weight"):
        weights[name] = np.ones((8, 8), np.float32)


def test_the_text_model_of_a_wrapper_gives_the_same_logits(tmp_path: Path) -> None:
    assert parity.effect("llama4_scout", "config.json", wrapped, tmp_path) <= parity.TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_temperature_tuning": 4},  # as published with Scout
        {"no_rope_layers": None},
        {"no_rope_layers": [1, 1, 1, 0, 1]},  # longer than the model, as transformers allows
        {"moe_layers": [0, 1, 2, 3], "interleave_moe_layer_step": 2},
    ],
)
def test_other_spellings_of_the_same_config_give_the_same_logits(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    assert (
        parity.effect("llama4_scout", "config.json", config(**settings), tmp_path)
        <= parity.TOLERANCE
    )


def test_sparse_layers_are_those_that_the_config_says(tmp_path: Path) -> None:
    for number, settings in enumerate([{"interleave_moe_layer_step": 1}, {"moe_layers": [0, 2]}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(CheckpointError, match=r"missing: .*layers\.0\.feed_forward\.experts"):
            load_model(parity.copy("llama4_maverick", "config.json", folder, config(**settings)))


def test_padding_far_to_the_left_is_no_number_out_of_range(tmp_path: Path) -> None:
    model, _ = load_model(parity.copy("llama4_scout", "config.json", tmp_path), dtype="float32")
    ids, padding = parity.reference("llama4_scout")["input_ids"][0].tolist(), [0, 45]
    batch = mx.array([ids, [0] * padding[1] + ids[:3]])
    logits = np.array(model(batch, model.make_caches(padding=padding)))
    assert np.isfinite(logits).all()
    assert (
        np.abs(logits[1, 45:] - np.array(model(mx.array([ids[:3]]))[0])).max() <= parity.TOLERANCE
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok"),
        ({"attention_chunk_size": None}, "attention_chunk_size"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"no_rope_layers": [1, 1, 1, 2]}, "no_rope_layers"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 3 + ["linear_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "llama4_scout" / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()
