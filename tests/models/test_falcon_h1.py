"""Falcon-H1, Mamba-2 beside attention, against transformers."""

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
MULTIPLIERS = (
    "attention_in_multiplier",
    "attention_out_multiplier",
    "embedding_multiplier",
    "key_multiplier",
    "lm_head_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)
SSM = [0.7, 0.5, 0.6, 0.9, 0.8]
CASES = {
    "falcon_h1": Case(
        {name: config(**{name: 1.0}) for name in MULTIPLIERS if name != "embedding_multiplier"}
        | {
            f"ssm_multipliers, {i}": config(ssm_multipliers=[*SSM[:i], 0.3, *SSM[i + 1 :]])
            for i in range(5)
        }
        | {
            "embedding_multiplier": config(embedding_multiplier=0.1),
            "factor of the gate": config(mlp_multipliers=[1.0, 0.58]),
            "factor of the feed-forward": config(mlp_multipliers=[0.88, 1.0]),
            "decay": weight("*.A_log", lambda a: a + 0.5),
            "bias of the convolution": weight("*.conv1d.bias", ZEROS),
            "skipped inputs": weight("*.mamba.D", ZEROS),
            "attention": weight("*.self_attn.o_proj.weight", ZEROS),
            "rope_theta": config(rope_theta=100.0),
            "last norm": weight("model.final_layernorm.weight", ONES),
        },
        tolerance=1.2e-4,
    ),
    "falcon_h1_norm": Case(
        {
            "norm of the outputs": weight("*.mamba.norm.weight", ONES),
            "order of norm and gate": config(mamba_norm_before_gate=False),
            "groups": config(rms_norm_eps=1e-1),
        },
        tolerance=1.2e-4,
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_falcon_h1_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_falcon_h1_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("falcon_h1", {"mamba_n_heads": 5}, "mamba_n_heads"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers"),
        ("falcon_h1", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    name: str, settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / name / "config.json").read_text())
    architecture(published).build()
    config(**settings)(published, {})
    with pytest.raises(ConfigError, match=named):
        architecture(published).build()
