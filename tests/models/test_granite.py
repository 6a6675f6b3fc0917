"""Granite 3 and 4, dense and hybrid, against transformers."""

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
FACTORS = {
    "embedding_multiplier": config(embedding_multiplier=1.0),
    "residual_multiplier": config(residual_multiplier=1.0),
    "attention_multiplier": config(attention_multiplier=1.0),
    "logits_scaling": config(logits_scaling=1.0),
    "norm": weight("*.post_attention_layernorm.weight", ONES),
}
CASES = {
    "granite": Case(FACTORS | {"rope_theta": config(rope_theta=1e6)}),
    "granite_hybrid": Case(
        FACTORS
        | {
            "positions": config(position_embedding_type="rope"),
            "experts per token": config(num_experts_per_tok=2),
            "dense part": weight("*.shared_mlp.output_linear.weight", ZEROS),
            "decay": weight("*.A_log", lambda a: a + 1),
            "bias of the convolution": weight("*.conv1d.bias", ZEROS),
            "norm of the outputs": weight("*.mamba.norm.weight", ONES),
            "gate and up": weight("*.input_linear.weight", lambda w: np.roll(w, 12, axis=-2)),
        },
        tolerance=2e-4,
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_granite_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_granite_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layer_types": ["mamba"]}, "layer_types"),
        ({"normalization_function": "layernorm"}, "normalization_function"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "granite_hybrid" / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings)
