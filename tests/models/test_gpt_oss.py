"""GPT-OSS against transformers, and its MXFP4 form against the format's definition."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

import parity
from mlxarch.blocks import CausalLM
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.quantize import convert
from parity import Case, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like
NAME = "gpt_oss"


def halves(stored: np.ndarray) -> np.ndarray:
    """Gate and up one behind the other instead of alternating."""
    return np.concatenate([stored[..., ::2], stored[..., 1::2]], axis=-1)


CASES = {
    NAME: Case(
        {
            "rms_norm_eps": config(rms_norm_eps=1e-5),
            "post-attention norm": weight("*.post_attention_layernorm.weight", ONES),
            "sinks": weight("*.sinks", lambda found: found - 100),
            "biases of q, k and v": weight("*.[qkv]_proj.bias", ZEROS),
            "bias of o": weight("*.o_proj.bias", ZEROS),
            "bias of the router": weight("*.router.bias", ZEROS),
            "bias of gate and up": weight("*.gate_up_proj_bias", ZEROS),
            "bias of down": weight("*.down_proj_bias", ZEROS),
            "gate and up alternate": weight("*.gate_up_proj", halves),
            "their biases alternate": weight("*.gate_up_proj_bias", halves),
            "down the other way": weight(
                "*.experts.down_proj", lambda found: found.swapaxes(1, 2).copy()
            ),
            "the wrong experts": weight("*.router.weight", lambda found: np.roll(found, 1, axis=0)),
            "num_experts_per_tok": config(num_experts_per_tok=1),
            "swiglu_limit": config(swiglu_limit=7.0),
            "swiglu_alpha": config(swiglu_alpha=1.0),
            "sliding_window": config(sliding_window=9),
            "which layers slide": config(layer_types=["full_attention", "sliding_attention"]),
            "rope_theta": config(rope_theta=10_000),
            "YaRN ignored": config(rope_scaling=None),
            "truncate": config(rope_scaling={"truncate": True}),
            "beta_fast": config(rope_scaling={"beta_fast": 32.0}),
            "YaRN's attention factor": config(rope_scaling={"attention_factor": 1.0}),
        }
    )
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_gpt_oss_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_gpt_oss_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def test_layers_alternate_where_the_config_does_not_say_which_slide(tmp_path: Path) -> None:
    change = config(layer_types=None)
    assert parity.effect(NAME, "config.json", change, tmp_path) <= parity.TOLERANCE


# MXFP4, as the published files have it: X_blocks and X_scales for X, whose matrices are not transposed

E2M1 = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
)  # by code (OCP MX 1.0, table 5)
EXPERTS = ("gate_up_proj", "down_proj")


def encode(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(…, in) -> codes (…, in / 32, 16) and scales (…, in / 32), both bytes; element 0 in a byte's lower half."""
    groups = values.reshape(*values.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1, keepdims=True))) - 2
    codes = np.abs(groups[..., None] / 2 ** exponents[..., None] - E2M1).argmin(-1).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents[..., 0] + 127).astype(np.uint8)


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = E2M1[codes] * 2.0 ** (scales[..., None].astype(int) - 127)
    return values.reshape(*blocks.shape[:-2], -1).astype(np.float32)


def packed(found: dict[str, Any], weights: parity.Weights) -> None:
    found["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn"],
    }
    for name in [name for name in weights if name.endswith(EXPERTS)]:
        weights[f"{name}_blocks"], weights[f"{name}_scales"] = encode(
            weights.pop(name).swapaxes(1, 2)
        )


def unpacked(found: dict[str, Any], weights: parity.Weights) -> None:
    """The same values in the other form."""
    for name in [name for name in weights if name.endswith(EXPERTS)]:
        weights[name] = decode(*encode(weights[name].swapaxes(1, 2))).swapaxes(1, 2).copy()


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    return parity.copy(NAME, "config.json", tmp_path, packed)


def logits(folder: Path) -> tuple[CausalLM, np.ndarray]:
    model, _ = load_model(folder, dtype="float32")
    return model, np.array(model(mx.array(parity.reference(NAME)["input_ids"])))


def test_mxfp4_experts_stand_for_what_the_format_says_and_stay_packed(
    mxfp4: Path, tmp_path: Path
) -> None:
    model, found = logits(mxfp4)
    experts: Any = model.model["layers"][0].mlp.experts
    assert experts.gate_proj.weight.dtype == mx.uint32 and experts.gate_proj.weight.shape == (
        3,
        32,
        4,
    )
    (tmp_path / "other").mkdir()
    _, wanted = logits(parity.copy(NAME, "config.json", tmp_path / "other", unpacked))
    assert np.abs(found - wanted).max() <= parity.TOLERANCE
    assert (
        np.abs(found - parity.reference(NAME)["logits"]).max() >= 3 * parity.TOLERANCE
    )  # four bits are not none


def test_a_copy_holds_the_codes_of_the_source(mxfp4: Path, tmp_path: Path) -> None:
    summary = convert(mxfp4, tmp_path / "copy", bits=None)
    assert summary.quantized == 6
    before, after = (
        load_file(mxfp4 / "model.safetensors"),
        load_file(tmp_path / "copy" / "model.safetensors"),
    )
    path = "model.layers.1.mlp.experts"
    for part, rows in {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}.items():
        codes = before[f"{path}.gate_up_proj_blocks"][:, rows].reshape(3, 32, 16)
        assert np.array_equal(after[f"{path}.{part}.weight"].view(np.uint8), codes)
        assert np.array_equal(
            after[f"{path}.{part}.scales"], before[f"{path}.gate_up_proj_scales"][:, rows]
        )
        assert np.array_equal(
            after[f"{path}.{part}.bias"], before[f"{path}.gate_up_proj_bias"][:, rows]
        )
    assert np.array_equal(logits(tmp_path / "copy")[1], logits(mxfp4)[1])


def test_attention_takes_the_bits_asked_for_and_the_experts_keep_theirs(
    mxfp4: Path, tmp_path: Path
) -> None:
    convert(mxfp4, tmp_path / "copy", bits=None)
    convert(mxfp4, tmp_path / "eight", bits=8, group_size=32, method="round")
    copy, eight = (load_file(tmp_path / name / "model.safetensors") for name in ("copy", "eight"))
    name = "model.layers.0.mlp.experts.down_proj.weight"
    assert np.array_equal(copy[name], eight[name])
    assert "model.layers.0.self_attn.q_proj.scales" in eight.keys() - copy.keys()
    model, _ = load_model(tmp_path / "eight", dtype="float32")
    first: Any = model.layers[0]
    attention = first.self_attn
    assert attention.q_proj.quantization.bits == 8
    assert not any(".router.scales" in name for name in eight)


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_half_of_an_mxfp4_tensor_is_refused_by_name(part: str, mxfp4: Path, tmp_path: Path) -> None:
    def without(found: dict[str, Any], weights: parity.Weights) -> None:
        packed(found, weights)
        del weights[f"model.layers.0.mlp.experts.down_proj_{part}"]

    (tmp_path / "half").mkdir()
    with pytest.raises(
        CheckpointError, match=rf"no .*layers\.0\.mlp\.experts\.down_proj_{part} beside it"
    ):
        load_model(parity.copy(NAME, "config.json", tmp_path / "half", without))


@pytest.mark.parametrize(
    ("tensor", "damage"),
    [
        ("blocks", lambda found: found[..., :8].copy()),
        ("blocks", lambda found: found[:, :, :0].copy()),
        ("blocks", lambda found: found.astype(np.int8)),
        ("blocks", lambda found: found[..., :3].copy()),
        ("scales", lambda found: found[:-1].copy()),
        ("scales", lambda found: found.astype(np.float32)),
    ],
)
def test_damaged_mxfp4_tensors_do_not_reach_mlx(tensor: str, damage: Any, tmp_path: Path) -> None:
    def damaged(found: dict[str, Any], weights: parity.Weights) -> None:
        packed(found, weights)
        name = f"model.layers.1.mlp.experts.gate_up_proj_{tensor}"
        weights[name] = damage(weights[name])

    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.(gate_up|gate|up)_proj"):
        load_model(parity.copy(NAME, "config.json", tmp_path, damaged))


def test_a_scale_that_is_nan_is_refused_by_name(tmp_path: Path) -> None:
    def damaged(found: dict[str, Any], weights: parity.Weights) -> None:
        packed(found, weights)
        weights["model.layers.1.mlp.experts.down_proj_scales"][0, 3] = 255

    folder = parity.copy(NAME, "config.json", tmp_path, damaged)
    refusal = pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj\.weight has a scale that is NaN"
    )
    with refusal:
        load_model(folder)
    for bits in (None, 2):
        with refusal:
            convert(folder, tmp_path / f"{bits}", bits=bits, group_size=32, method="round")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": None}, "sliding_window"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"sliding_window_pattern": 3}, "sliding_window_pattern"),
        ({"swiglu_limit": 0}, "swiglu_limit"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / NAME / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()
