"""Step 3.7 Flash against transformers."""

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
    "step3p7": Case(
        {
            "rms_norm_eps": config(rms_norm_eps=1e-2),
            "window": config(sliding_window=7),
            "gate of heads": weight("*.g_proj.weight", ZEROS),
            "query norm": weight("*.q_norm.weight", ZEROS),
            "norms of 1 + weight": weight("*layernorm.weight", lambda w: w - 0.2),
            "limit of experts": config(swiglu_limits=[0.0, 0.0, 0.0]),
            "limit of shared experts": config(swiglu_limits_shared=[0.0, 0.0, 0.0]),
            "factor of experts": config(moe_router_scaling_factor=1.0),
            "bias of the choice": weight("*.router_bias", lambda b: b[::-1].copy()),
            "shared expert": weight("*.share_expert.down_proj.weight", ZEROS),
            "the wrong experts": weight("*.moe.gate.weight", lambda w: np.roll(w, 1, axis=0)),
        }
    )
}


def test_positions_of_layer_types_differ(tmp_path: Path) -> None:
    for key, value in (
        ("rope_theta", [1000.0, 50.0, 1000.0, 50.0]),
        ("partial_rotary_factors", [1.0] * 4),
        ("yarn_only_types", ["sliding_attention"]),
    ):
        folder = tmp_path / key
        folder.mkdir()
        change = config(**{key: value})
        assert parity.effect("step3p7", "config.json", change, folder) > 1e-3


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_step3p7_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_step3p7_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("step3p7", {"rope_theta": [1.0, 2.0, 3.0, 2.0]}, "rope_theta"),
        ("step3p7", {"sink": True}, "sink"),
        ("step3p7", {"zero_centered": False}, "zero_centered"),
        ("step3p7", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar"),
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
