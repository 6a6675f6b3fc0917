"""Families near Llama, each against its class in transformers: what differs is what is tested."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.errors import ConfigError, UnsupportedArchitecture
from mlxarch.loading.load import load_model, open_resolved
from mlxarch.loading.registry import architecture
from parity import Case, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like
SLIDING, FULL = "sliding_attention", "full_attention"


def backwards(array: np.ndarray) -> np.ndarray:
    return array[::-1].copy()


NORMS = {
    "rms_norm_eps": config(rms_norm_eps=1e-2),
    "norm after attention": weight("*.post_attention_layernorm.weight", ONES),
    "last norm": weight("model.norm.weight", ONES),
}
EXPERTS = NORMS | {"the wrong experts": weight("*.gate.weight", lambda w: np.roll(w, 1, axis=0))}
CASES = {
    "seed_oss": Case(
        NORMS
        | {
            "biases": weight("*.q_proj.bias", ZEROS),
            "rope_theta": config(rope_theta=1e6),
        }
    ),
    "exaone4": Case(
        NORMS
        | {
            "window": config(sliding_window=9),
            "query norm": weight("*.q_norm.weight", ONES),
            "feed-forward norm": weight("*.post_feedforward_layernorm.weight", ONES),
            "scaling of RoPE": config(rope_scaling={"factor": 4.0}),
            "positions everywhere": config(sliding_window=None, layer_types=[FULL] * 3),
        }
    ),
    "exaone4_full": Case({"rope_theta": config(rope_theta=1e6)}),
    "olmoe": Case(
        EXPERTS
        | {
            "norm_topk_prob": config(norm_topk_prob=True),
            "clip_qkv": config(clip_qkv=2.0),
            "query norm": weight("*.q_norm.weight", ONES),
            "experts per token": config(num_experts_per_tok=2),
        }
    ),
    "ernie4_5": Case(NORMS | {"rope_theta": config(rope_theta=1e6)}),
    "ernie4_5_moe": Case(
        EXPERTS
        | {
            "bias of the choice": weight("*.e_score_correction_bias", lambda b: b[:, ::-1].copy()),
            "experts per token": config(moe_k=2),
            "shared experts": weight("*.shared_experts.down_proj.weight", ZEROS),
        }
    ),
    "hunyuan_v1": Case(
        NORMS
        | {
            "stretch of the base": config(rope_scaling={"alpha": 10.0}),
            "query norm": weight("*.query_layernorm.weight", ONES),
            "key norm": weight("*.key_layernorm.weight", ONES),
        }
    ),
    "minimax_m2": Case(
        EXPERTS
        | {
            "bias of the choice": weight("*.e_score_correction_bias", backwards),
            "query norm": weight("*.q_norm.weight", ONES),
            "experts per token": config(num_experts_per_tok=2),
        }
    ),
    "cohere2": Case(
        {
            "layer_norm_eps": config(layer_norm_eps=1e-1),
            "logit_scale": config(logit_scale=1.0),
            "norm": weight("*.input_layernorm.weight", ONES),
            "window": config(sliding_window=9),
            "layer types": config(layer_types=[FULL, SLIDING, FULL]),
        }
    ),
    "phi3": Case(
        NORMS
        | {
            "order of q, k and v": weight("*.qkv_proj.weight", backwards),
            "gate and up": weight("*.gate_up_proj.weight", lambda w: np.roll(w, 40, axis=0)),
        }
    ),
    "phi3_window": Case({"window": config(sliding_window=9)}),
    "phi3_short": Case(
        {
            "short_factor": config(rope_scaling={"short_factor": [1.0, 1.0, 1.0]}),
            "extension": config(max_position_embeddings=1024),
        }
    ),
    "phi3_long": Case(
        {
            "long_factor": config(rope_scaling={"long_factor": [1.0, 4.0, 1.0]}),
            "features with RoPE": config(
                partial_rotary_factor=0.5,
                rope_scaling={
                    "partial_rotary_factor": 0.5,
                    "short_factor": [1.0] * 2,
                    "long_factor": [1.0, 4.0],
                },
            ),
        }
    ),
    "apertus": Case(
        {
            "norm": weight("*.feedforward_layernorm.weight", ONES),
            "curvature above": weight("*.act_fn.alpha_p", lambda a: a + 0.5),
            "curvature below": weight("*.act_fn.alpha_n", lambda a: a + 0.5),
            "query norm": weight("*.q_norm.weight", ONES),
        }
    ),
    "mistral4": Case(
        {
            "growth of queries": config(rope_scaling={"llama_4_scaling_beta": 0.0}),
            "factor of YaRN": config(rope_scaling={"factor": 8.0}),
            "norm of the latent": weight("*.kv_a_layernorm.weight", ONES),
            "gate and up": weight("*.gate_up_proj", lambda w: np.roll(w, 8, axis=1)),
            "experts per token": config(num_experts_per_tok=3),
        }
    ),
    "muse_glimmer": Case(
        {
            "factor of queries": config(qk_scale_factor=1.0),
            "output_multiplier": config(output_multiplier=1.0),
            "post_norm_eps": config(post_norm_eps=1e-1),
            "gates": weight("*.self_attn.gate_proj.weight", ZEROS),
            "base": config(rope_theta=100.0),
            "positions in full layers": config(layer_rope_theta=[1000.0, 1000.0, 100.0]),
            "window": config(sliding_window=9),
        },
        tolerance=2e-4,
    ),
    "laguna": Case(
        EXPERTS
        | {
            "gates": weight("*.g_proj.weight", ZEROS),
            "scale of the experts": config(moe_routed_scaling_factor=1.0),
            "bias of the choice": weight("*.e_score_correction_bias", backwards),
            "shared expert": weight("*.shared_expert.down_proj.weight", ZEROS),
            "window": config(sliding_window=9),
        }
    ),
    "cohere2_moe": Case(
        {
            "the wrong experts": weight("*.gate.weight", lambda w: np.roll(w, 1, axis=0)),
            "sum of the experts": config(shared_expert_combination_strategy="sum"),
            "norm_topk_prob": config(norm_topk_prob=False),
            "weights of the experts": config(expert_selection_fn="softmax"),
            "rms_norm_eps": config(rms_norm_eps=1e-2),
            "positions of the first layer": config(prefix_dense_sliding_window_pattern=None),
        }
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_it_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize("name", ["hunyuan_v1", "minimax_m2", "ernie4_5_moe"])
def test_a_converted_checkpoint_keeps_the_published_names(name: str) -> None:
    with open_resolved(parity.GOLDEN / name) as found:
        new = set(found.published) - set(found.source.tensors)
    assert all(".switch_mlp." in tensor for tensor in new), new


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ("seed_oss", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ("hunyuan_v1", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "alpha"),
        ("hunyuan_v1", {"use_qk_norm": False}, "use_qk_norm"),
        ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func"),
        ("cohere2", {"use_qk_norm": True}, "use_qk_norm"),
        ("olmoe", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("exaone4", {"sliding_window": None}, "sliding_window"),
        ("seed_oss", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    name: str, settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / name / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()


def test_rows_of_a_fused_matrix_are_checked(tmp_path: Path) -> None:
    change = config(num_key_value_heads=1)
    folder = parity.copy("phi3", "config.json", tmp_path, change)
    with pytest.raises(Exception, match="qkv_proj"):
        load_model(folder)


@pytest.mark.parametrize(
    ("model_type", "nearest"), [("olmo4", "olmo"), ("qwen3_6", "qwen3_5"), ("gemma5", "gemma")]
)
def test_an_unknown_architecture_is_refused_with_what_it_is_nearest_to(
    model_type: str, nearest: str
) -> None:
    with pytest.raises(UnsupportedArchitecture) as refusal:
        architecture({"model_type": model_type})
    text = str(refusal.value)
    assert f"nearest by name: {nearest}" in text
    assert "docs/adding-a-model.md" in text


def test_nothing_near_is_invented() -> None:
    with pytest.raises(UnsupportedArchitecture) as refusal:
        architecture({"model_type": "zzzz"})
    assert "nearest" not in str(refusal.value)
