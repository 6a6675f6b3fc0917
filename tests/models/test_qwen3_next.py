"""Qwen3-Next against transformers' Qwen3NextForCausalLM."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parity
from mlxarch.errors import ConfigError
from mlxarch.loading.registry import architecture
from parity import Case, config, weight

ONES, ZEROS = np.ones_like, np.zeros_like


def flat(matrix: np.ndarray) -> np.ndarray:
    """All queries, then all keys, values and gates, in place of those of each key head."""
    parts = np.split(matrix.reshape(2, -1, matrix.shape[-1]), [8, 16, 48], axis=1)
    return np.concatenate([part.reshape(-1, matrix.shape[-1]) for part in parts])


CASES = {
    "qwen3_next": Case(
        {
            "rms_norm_eps": config(rms_norm_eps=1e-2),
            "norm_topk_prob": config(norm_topk_prob=False),
            "num_experts_per_tok": config(num_experts_per_tok=2),
            "shared expert": weight("*.shared_expert.down_proj.weight", ZEROS),
            "rows by key head": weight("*.in_proj_qkvz.weight", flat),
            "write strength and decay": weight("*.in_proj_ba.weight", lambda w: w[::-1].copy()),
            "decay": weight("*.A_log", lambda a: a + 0.5),
            "norm of the DeltaNet": weight("*.linear_attn.norm.weight", ONES),
            "rotary share": config(partial_rotary_factor=0.5, rope_scaling=None),
        },
        tolerance=2e-4,
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_qwen3_next_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_qwen3_next_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "qwen3_next" / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings)
