"""LFM2, dense and MoE, against transformers' Lfm2ForCausalLM and Lfm2MoeForCausalLM."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.errors import ConfigError
from mlxarch.loading.load import open_resolved
from mlxarch.loading.registry import architecture
from parity import Case, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like


def roll_thirds(matrix: np.ndarray) -> np.ndarray:
    """B, C and x in another order."""
    return np.roll(matrix, len(matrix) // 3, axis=0)


COMMON = {
    "norm before the mixer": weight("*.operator_norm.weight", ONES),
    "norm before the feed-forward": weight("*.ffn_norm.weight", ONES),
    "last norm": weight("model.embedding_norm.weight", ONES),
    "query norm": weight("*.q_layernorm.weight", ONES),
    "key norm": weight("*.k_layernorm.weight", ONES),
    "order of the thirds": weight("*.conv.in_proj.weight", roll_thirds),
    "convolution backwards": weight("*.conv.conv.weight", lambda w: w[..., ::-1].copy()),
    "oldest input": weight("*.conv.conv.weight", lambda w: w * np.array([0, 1, 1], np.float32)),
    "rope_theta": config(rope_theta=1_000_000.0),
    "norm_eps": config(norm_eps=1e-2),
}
CASES = {
    "lfm2": Case(
        COMMON
        | {
            "gate and up": weight("*.feed_forward.w1.weight", ZEROS),
        }
    ),
    "lfm2_moe": Case(
        COMMON
        | {
            "num_experts_per_tok": config(num_experts_per_tok=2),
            "norm_topk_prob": config(norm_topk_prob=False),
            "routed_scaling_factor": config(routed_scaling_factor=1.0),
            "bias of the choice": weight("*.expert_bias", ZEROS),
        }
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_lfm2_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_lfm2_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def test_a_convolution_of_mlx_lm_is_recognised(tmp_path: Path) -> None:
    change = weight("*.conv.conv.weight", lambda w: w.swapaxes(-1, -2).copy())
    assert parity.effect("lfm2", "config.json", change, tmp_path) <= parity.TOLERANCE


def test_names_of_a_converted_checkpoint_are_the_published_ones() -> None:
    with open_resolved(parity.GOLDEN / "lfm2_moe") as found:
        names = set(found.published)
        source = set(found.source.tensors)
    assert names - source == {
        f"model.layers.{layer}.feed_forward.switch_mlp.{name}_proj.weight"
        for layer in (1, 2)
        for name in ("gate", "up", "down")
    }


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layer_types": ["conv"]}, "layer_types"),
        ({"use_expert_bias": False}, "use_expert_bias"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "lfm2_moe" / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings)
