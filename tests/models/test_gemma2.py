"""Gemma 2 against transformers' Gemma2ForCausalLM."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import CausalLM, swiglu
from mlxarch.errors import ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from parity import Case, config, weight

SLIDING, FULL = "sliding_attention", "full_attention"


def own_head(found: dict[str, Any], weights: parity.Weights) -> None:
    """A head beside tied embeddings counts."""
    weights["lm_head.weight"] = np.roll(weights["model.embed_tokens.weight"], 1, axis=0)


NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
CASES = {
    "gemma2": Case(
        {f"{norm} ignored": weight(f"*.{norm}.weight", np.zeros_like) for norm in NORMS}
        | {
            "last norm ignored": weight("model.norm.weight", np.zeros_like),
            "weights that are not around zero": weight("*norm.weight", lambda w: w - 1),
            "rms_norm_eps": config(rms_norm_eps=1e-5),
            "rope_theta": config(rope_theta=1e6),
            "attention's soft cap ignored": config(attn_logit_softcapping=None),
            "attention's soft cap": config(attn_logit_softcapping=5.0),
            "logits' soft cap ignored": config(final_logit_softcapping=None),
            "logits' soft cap": config(final_logit_softcapping=11.0),
            "query_pre_attn_scalar": config(query_pre_attn_scalar=16),
            "heads": config(num_attention_heads=8, num_key_value_heads=4, head_dim=8),
            "window ignored": config(sliding_window=4096),
            "window one token wider": config(sliding_window=9),
            "window one token narrower": config(sliding_window=7),
            "kinds of layers exchanged": config(layer_types=[FULL, SLIDING, FULL]),
            "head of its own": own_head,
        }
    )
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_gemma2_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_gemma2_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def no_scale(model: CausalLM) -> None:
    model.embed_scale = None


def scale_rounded_as_in_bfloat16(model: CausalLM) -> None:
    model.embed_scale = float(np.array(mx.array(32**0.5, mx.bfloat16).astype(mx.float32)))


def other_gate(model: CausalLM) -> None:
    for layer in model.layers:
        layer.mlp.activation = swiglu  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("mistake", [no_scale, scale_rounded_as_in_bfloat16, other_gate])
def test_what_no_key_of_the_config_says_shows_too(mistake: Any, tmp_path: Path) -> None:
    model, _ = load_model(parity.copy("gemma2", "config.json", tmp_path), dtype="float32")
    wanted = parity.reference("gemma2")
    ids = mx.array(wanted["input_ids"])
    assert np.abs(np.array(model(ids)) - wanted["logits"]).max() <= parity.TOLERANCE
    mistake(model)
    assert np.abs(np.array(model(ids)) - wanted["logits"]).max() >= 3 * parity.TOLERANCE


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"layer_types": [SLIDING, FULL]}, "layer_types has 2 values"),
        ({"layer_types": [SLIDING, FULL, "chunked_attention"]}, "layer_types"),
        ({"sliding_window": None}, "sliding_window"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    published = json.loads((parity.GOLDEN / "gemma2" / "config.json").read_text())
    architecture(published).build()  # as it stands it is accepted
    with pytest.raises(ConfigError, match=named):
        architecture(published | settings).build()
