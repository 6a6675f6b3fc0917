"""DeepSeek V3, DeepSeek V2 and Kimi K2 against transformers."""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

import parity
from mlxarch.blocks.attention import latent_attention
from mlxarch.blocks.moe import routers
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.loading.resolve import resolve
from mlxarch.quantize import convert
from parity import Case, config, weight, without

ONES, ZEROS = np.ones_like, np.zeros_like


def rolled(found: np.ndarray) -> np.ndarray:
    return np.roll(found, 1, axis=0)


def halves(found: np.ndarray) -> np.ndarray:
    """The turned features of the key, 8 of 40, as halves instead of as neighbours."""
    return np.concatenate([found[:-8], found[-8::2], found[-7::2]])


COMMON = {
    "rms_norm_eps": config(rms_norm_eps=1e-5),
    "post-attention norm": weight("*.post_attention_layernorm.weight", ONES),
    "norm of the latent": weight("*.kv_a_layernorm.weight", ONES),
    "rope_theta": config(rope_theta=1_000_000.0),
    "pairs are neighbours": weight("*.kv_a_proj_with_mqa.weight", halves),
    "rows of keys, then rows of values": weight("*.kv_b_proj.weight", rolled),
    "the wrong experts": weight("*.mlp.gate.weight", rolled),
    "num_experts_per_tok": config(num_experts_per_tok=2),
    "routed_scaling_factor": config(routed_scaling_factor=2.0),
    "shared experts": weight("*.shared_experts.down_proj.weight", ZEROS),
}
GROUPS = {"no groups": config(n_group=1, topk_group=1), "topk_group": config(topk_group=3)}
YARN = {
    "YaRN ignored": config(rope_scaling=None),
    "YaRN's factor": config(rope_scaling={"factor": 20}),
    "mscale": config(rope_scaling={"mscale": 0.5}),
    "mscale_all_dim": config(rope_scaling={"mscale_all_dim": 0.5}),
}
QUERIES = {"norm of the queries": weight("*.q_a_layernorm.weight", ONES)}
SIGMOID = {
    "norm_topk_prob": config(norm_topk_prob=False),
    "correction bias": weight("*.e_score_correction_bias", ZEROS),
}
CASES = {
    "deepseek_v3": Case(COMMON | GROUPS | YARN | QUERIES | SIGMOID),
    "glm4_moe_lite": Case(
        {
            "num_experts_per_tok": config(num_experts_per_tok=2),
            "routed_scaling_factor": config(routed_scaling_factor=1.0),
            "rope_theta": config(rope_theta=1_000_000.0),
            "norm of the latent": weight("*.kv_a_layernorm.weight", ONES),
        }
    ),
    "deepseek_v2": Case(
        COMMON
        | GROUPS
        | YARN
        | QUERIES
        | {
            "biases of the latents": weight("*_a_proj*.bias", ZEROS),
            "bias of the output": weight("*.o_proj.bias", ZEROS),
            "topk_method": config(topk_method="greedy"),
        }
    ),
    "deepseek_v2_lite": Case(COMMON),
    "kimi_k2": Case(
        COMMON | YARN | QUERIES | SIGMOID | {"beta_slow": config(rope_scaling={"beta_slow": 0.1})}
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_latent_attention_models_match_transformers(
    name: str, dialect: str, tmp_path: Path
) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_these_models_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def unchanged(found: dict[str, Any], weights: parity.Weights) -> None:
    pass


@pytest.mark.parametrize("name", CASES)
def test_the_inner_norms_do_not_take_the_eps_of_the_config(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_attention, "EPS", 1e-4)
    assert parity.effect(name, "config.json", unchanged, tmp_path) >= 3 * parity.TOLERANCE


def test_a_closed_group_stays_closed_though_open_experts_score_below_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = routers.limit_to_top_groups

    def closed_by_zero(*arguments: Any, **named: Any) -> mx.array:
        scores = limited(*arguments, **named)
        return mx.where(mx.isinf(scores), 0, scores)

    monkeypatch.setattr(routers, "limit_to_top_groups", closed_by_zero)
    assert parity.effect("deepseek_v3", "config.json", unchanged, tmp_path) >= 3 * parity.TOLERANCE


def test_a_layer_that_predicts_a_second_token_is_left_out_by_its_number(tmp_path: Path) -> None:
    resolved = resolve(open_checkpoint(parity.copy("deepseek_v3", "config.json", tmp_path)))
    assert "model.layers.2.eh_proj.weight" in resolved.ignored
    assert all(name.startswith("model.layers.2.") for name in resolved.ignored)
    (tmp_path / "more").mkdir()
    more = parity.copy("deepseek_v3", "config.json", tmp_path / "more", config(num_hidden_layers=3))
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.2\.mlp\.switch_mlp\.up_proj\.weight lacks expert 0"
    ):
        resolve(open_checkpoint(more))


def test_keys_and_values_of_other_heads_than_the_config_says_are_refused(tmp_path: Path) -> None:
    change = weight("*.layers.1.self_attn.kv_b_proj.weight", lambda found: found[:-1])
    with pytest.raises(
        CheckpointError, match=r"layers\.1.*kv_b_proj.* \(95, 32\).* 2 heads of 48 rows"
    ):
        load_model(parity.copy("deepseek_v3", "config.json", tmp_path, change))
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match=r"missing: .*layers\.1\.self_attn\.embed_q\.weight"):
        load_model(
            parity.copy(
                "deepseek_v3", "config.json", tmp_path / "none", without("*.layers.1.*.kv_b_proj.*")
            )
        )


def packed(pattern: str, bits: int) -> parity.Change:
    """As MLX packs the matrices that match."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        found["quantization"] = {"bits": bits, "group_size": 32}
        for name in [name for name in weights if fnmatchcase(name, pattern)]:
            parts = mx.quantize(mx.array(weights.pop(name)), 32, bits)
            for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
                weights[f"{name.removesuffix('.weight')}.{part}"] = np.array(array)

    return change


def unpacked(pattern: str, bits: int) -> parity.Change:
    """The values that they then stand for."""

    def change(found: np.ndarray) -> np.ndarray:
        return np.array(
            mx.dequantize(*mx.quantize(mx.array(found), 32, bits), group_size=32, bits=bits)
        )

    return weight(pattern, change)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_a_packed_matrix_of_keys_and_values_counts_as_what_it_stands_for(
    name: str, tmp_path: Path
) -> None:
    logits = []
    for change in (packed, unpacked):
        folder = tmp_path / change.__name__
        folder.mkdir()
        model, _ = load_model(
            parity.copy(name, "config.json", folder, change("*.layers.[01].*.kv_b_proj.weight", 4)),
            dtype="float32",
        )
        logits.append(np.array(model(mx.array(parity.reference(name)["input_ids"]))))
    assert np.abs(logits[0] - logits[1]).max() <= parity.TOLERANCE
    assert np.abs(logits[0] - parity.reference(name)["logits"]).max() >= 3 * parity.TOLERANCE


def test_the_correction_bias_stays_float32(tmp_path: Path) -> None:
    source, name = (
        parity.copy("deepseek_v3", "config.json", tmp_path),
        "model.layers.1.mlp.gate.e_score_correction_bias",
    )
    model, _ = load_model(source, dtype="bfloat16")
    gate: Any = model.model["layers"][1].mlp.gate
    assert gate.e_score_correction_bias.dtype == mx.float32 and gate.weight.dtype == mx.bfloat16
    summary = convert(
        source, tmp_path / "half", bits=4, group_size=32, dtype="float16", method="round"
    )
    stored, written = (
        load_file(source / "model.safetensors"),
        load_file(summary.output / "model.safetensors"),
    )
    assert np.array_equal(written[name], stored[name])
    assert written["model.norm.weight"].dtype == np.float16


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("deepseek_v3", {"hidden_act": "gelu"}, "hidden_act"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {"mlp_bias": True}, "mlp_bias"),
        ("deepseek_v3", {"n_group": 3}, "n_group"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group"),
        ("deepseek_v3", {"topk_group": 1}, "num_experts_per_tok"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 4}, "n_group"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank"),
        ("deepseek_v3", {"v_head_dim": 1 << 20}, "1048576 features"),
        ("deepseek_v3", {"n_shared_experts": -1}, "n_shared_experts"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "RoPE turns pairs"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "mscale_all_dim": 1.0}}, "factor"),
        ("deepseek_v3", {"rope_scaling": {"type": "dynamic"}}, "dynamic"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("kimi_k2", {"n_group": 2}, "n_group"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    name: str, settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / name / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()
