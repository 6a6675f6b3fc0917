"""MiMo V2 Flash against transformers."""

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
CASES = {
    "mimo_v2_flash": Case(
        {
            "rms_norm_eps": config(layernorm_epsilon=1e-2, rms_norm_eps=1e-2),
            "window": config(sliding_window_size=7),
            "sinks": weight("*.attention_sink_bias", lambda s: s - 1),
            "factor of values": config(attention_value_scale=1.0),
            "experts per token": config(num_experts_per_tok=2),
            "bias of the choice": weight("*.e_score_correction_bias", lambda b: b[::-1].copy()),
            "norm_topk_prob": config(norm_topk_prob=False),
            "last norm": weight("model.norm.weight", ONES),
            "order of values": weight("*.v_proj.weight", lambda w: w[::-1].copy()),
        }
    )
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_mimo_v2_flash_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_mimo_v2_flash_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern"),
        ("mimo_v2_flash", {"scoring_func": "softmax"}, "scoring_func"),
        ("mimo_v2_flash", {"topk_method": "greedy"}, "topk_method"),
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
