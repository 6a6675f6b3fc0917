"""Nemotron-H, dense and MoE, against transformers' NemotronHForCausalLM."""

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
MAMBA = {
    "layer_norm_epsilon": config(layer_norm_epsilon=1e-2),
    "norms": weight("backbone.layers.*.norm.weight", ONES),
    "last norm": weight("backbone.norm_f.weight", ONES),
    "decay": weight("*.A_log", lambda a: a + 0.5),
    "no memory": weight("*.A_log", lambda a: a + 9),
    "skipped inputs": weight("*.mixer.D", ZEROS),
    "bias of the time step": weight("*.dt_bias", ZEROS),
    "bias of the convolution": weight("*.conv1d.bias", ZEROS),
    "convolution backwards": weight("*.conv1d.weight", lambda w: w[..., ::-1].copy()),
    "norm of the outputs": weight("*.mixer.norm.weight", ONES),
    "largest time step": config(time_step_limit=[0.0, 0.5]),
}
MOE = {
    "num_experts_per_tok": config(num_experts_per_tok=2),
    "routed_scaling_factor": config(routed_scaling_factor=1.0),
    "norm_topk_prob": config(norm_topk_prob=False),
    "shared expert": weight("*.shared_experts.down_proj.weight", ZEROS),
    "bias of the choice": weight("*.e_score_correction_bias", lambda b: b[::-1].copy()),
}
CASES = {
    "nemotron_h": Case(
        MAMBA
        | {
            "heads of a group": weight("*.mixer.in_proj.weight", lambda w: np.roll(w, 8, axis=0)),
            "feed-forward": weight("*.layers.1.mixer.down_proj.weight", ZEROS),
        }
    ),
    "nemotron_h_moe": Case(MOE | {"topk_group": config(topk_group=2)}),
    "nemotron_h_latent": Case(MOE | {"latent": weight("*.fc1_latent_proj.weight", ZEROS)}),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_nemotron_h_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_nemotron_h_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hybrid_override_pattern": "M-*M"}, "hybrid_override_pattern"),
        ({"hybrid_override_pattern": "M-*MX"}, "hybrid_override_pattern"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ({"n_groups": 3}, "n_groups"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "nemotron_h" / "config.json").read_text())
    architecture(published).build()
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings)
