"""Gemma 3, alone and inside its vision wrapper, against transformers' Gemma3 classes."""

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.loading.resolve import resolve
from mlxarch.quantize import convert
from parity import Case, Change, config, weight, without

SLIDING, FULL = "sliding_attention", "full_attention"
OLDER = {SLIDING: "rope_local_base_freq", FULL: "rope_theta"}


def base(kind: str, theta: float) -> Change:
    """Another RoPE base for one kind of layers, in whichever dialect."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        if "rope_parameters" in found:
            found["rope_parameters"][kind]["rope_theta"] = theta
        else:
            found[OLDER[kind]] = theta

    return change


def scaling(**settings: Any) -> Change:
    """Another scaling of the full layers' RoPE."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        if "rope_parameters" in found:
            found["rope_parameters"][FULL] |= settings
        else:
            found["rope_scaling"] = (found.get("rope_scaling") or {}) | settings

    return change


def scaled_everywhere(found: dict[str, Any], weights: parity.Weights) -> None:
    """The newer dialect can say what the older cannot: sliding layers with a scaling."""
    bases = {SLIDING: 1e4, FULL: 1e6}
    both = {
        kind: {"rope_theta": theta, "rope_type": "linear", "factor": 8.0}
        for kind, theta in bases.items()
    }
    found["rope_parameters"] = both


def in_text(change: Change) -> Change:
    """A change of the wrapper's text model."""
    return lambda found, weights: change(found["text_config"], weights)


NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
COMMON = {
    f"{norm} ignored": weight(f"*language_model*.{norm}.weight", np.zeros_like) for norm in NORMS
} | {
    "last norm ignored": weight("*model.norm.weight", np.zeros_like),
    "query norm ignored": weight("*.q_norm.weight", np.zeros_like),
    "key norm ignored": weight("*.k_norm.weight", np.zeros_like),
    "weights that are not around zero": weight("*language_model*norm.weight", lambda w: w - 1),
    "rope base of the sliding layers": base(SLIDING, 1e6),
    "rope base of the full layers": base(FULL, 1e4),
    "scaling of the full layers": scaling(rope_type="linear", factor=4.0),
    "query_pre_attn_scalar": config(query_pre_attn_scalar=16),
    "window ignored": config(sliding_window=4096),
    "window one token wider": config(sliding_window=9),
    "window one token narrower": config(sliding_window=7),
}


CASES = {
    "gemma3_text": Case(
        {f"{norm} ignored": weight(f"*.{norm}.weight", np.zeros_like) for norm in NORMS}
        | {
            name: change
            for name, change in COMMON.items()
            if "around" not in name and "layernorm" not in name
        }
        | {
            "weights that are not around zero": weight("*norm.weight", lambda w: w - 1),
            "rms_norm_eps": config(rms_norm_eps=1e-5),
            "scaling of the sliding layers": scaled_everywhere,
            "kinds of layers": config(layer_types=[SLIDING, FULL, SLIDING]),
            "tie_word_embeddings": lambda found, weights: weights.update(
                {"lm_head.weight": np.roll(weights["model.embed_tokens.weight"], 1, axis=0)}
            ),
        }
    ),
    "gemma3": Case(
        {name: in_text(change) for name, change in COMMON.items()}
        | {
            "scaling ignored": in_text(scaling(rope_type="default", factor=1.0)),
            "scaling of the sliding layers": in_text(scaled_everywhere),
            "rms_norm_eps": in_text(config(rms_norm_eps=1e-4)),
            "kinds of layers": in_text(config(layer_types=[SLIDING] * 6)),
        }
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_gemma3_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_gemma3_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


def test_the_older_pattern_shows_in_the_logits(tmp_path: Path) -> None:
    assert (
        parity.effect("gemma3_text", "config.json", config(sliding_window_pattern=2), tmp_path)
        >= 1e-3
    )


def published(name: str, dialect: str = "config.json") -> dict[str, Any]:
    return json.loads((parity.GOLDEN / name / dialect).read_text())


def test_a_sparse_text_config_means_what_transformers_writes_out() -> None:
    sparse, full = (
        architecture(published("gemma3")),
        architecture(published("gemma3", "config.transformers5.json")),
    )
    left_out = full.config.__dict__.keys() - published("gemma3")["text_config"].keys()
    assert {"vocab_size", "rms_norm_eps", "max_position_embeddings"} & left_out == {
        "rms_norm_eps",
        "max_position_embeddings",
    }
    spelled = {"rope_parameters", "rope_scaling", "layer_types"}
    for key in full.config.__dict__.keys() - spelled:
        assert getattr(sparse.config, key) == getattr(full.config, key), key
    for kind in (SLIDING, FULL):
        assert sparse.config.rope_for(kind).theta == full.config.rope_for(kind).theta
        assert sparse.config.rope_for(kind).type == full.config.rope_for(kind).type


def test_the_first_published_sizes_follow_from_the_defaults() -> None:
    # google/gemma-3-4b-it states these six keys and no more
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
    }
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    c = architecture({"model_type": "gemma3", "text_config": text}).config
    assert (c.vocab_size, c.num_attention_heads, c.kv_heads, c.head_size) == (262_208, 8, 4, 256)
    assert c.tie_word_embeddings


def renamed(prefix: str, to: str) -> Change:
    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        for name in [name for name in weights if name.startswith(prefix)]:
            weights[to + name.removeprefix(prefix)] = weights.pop(name)

    return change


def test_both_spellings_of_the_prefix_are_read(tmp_path: Path) -> None:
    change = renamed("language_model.model.", "model.language_model.")
    assert parity.effect("gemma3", "config.json", change, tmp_path) <= parity.TOLERANCE


def test_the_towers_are_left_out_and_named(tmp_path: Path) -> None:
    ignored = resolve(open_checkpoint(parity.copy("gemma3", "config.json", tmp_path))).ignored
    assert ignored["vision_tower.post_layernorm.weight"] == "tower"
    assert ignored["multi_modal_projector.mm_soft_emb_norm.weight"] == "tower"


def test_a_missing_norm_is_named(tmp_path: Path) -> None:
    folder = parity.copy(
        "gemma3_text", "config.json", tmp_path, without("*.layers.1.pre_feedforward_layernorm.*")
    )
    with pytest.raises(CheckpointError, match="model.layers.1.pre_feedforward_layernorm.weight"):
        load_model(folder)


def test_a_copy_keeps_the_norms_as_published(tmp_path: Path) -> None:
    folder = parity.copy("gemma3_text", "config.json", tmp_path)
    load_model(folder)[0](mx.array([[8, 9]]))  # the sum with 1 is the model's own
    convert(folder, tmp_path / "copy", bits=None)
    name = "model.layers.0.input_layernorm.weight"
    kept, wanted = (
        open_checkpoint(place).tensors[name].load() for place in (tmp_path / "copy", folder)
    )
    assert mx.array_equal(kept, wanted)
    assert float(np.abs(np.array(wanted)).max()) < 1


def test_a_norm_notices_that_its_weight_was_replaced() -> None:
    from mlxarch.blocks import ZeroCenteredRMSNorm

    norm, x = ZeroCenteredRMSNorm(4, 1e-6), mx.array([1.0, -1.0, 1.0, -1.0])
    before = norm(x)
    norm.weight = mx.ones((4,))
    assert mx.allclose(norm(x), 2 * before)
    assert [*norm.parameters()] == ["weight"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"layer_types": [SLIDING, FULL]}, "layer_types has 2 values"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_parameters must hold those of",
        ),
        (
            {"rope_parameters": {FULL: {"rope_theta": 1e6}}},
            "rope_parameters must hold those of 'sliding_attention'",
        ),
        ({"rope_local_base_freq": 0}, "rope_local_base_freq"),
    ],
)
@pytest.mark.parametrize("name", ["gemma3_text", "gemma3"])
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str, name: str
) -> None:
    found = published(name)
    architecture(copy.deepcopy(found)).build()  # as it stands it is accepted
    found.get("text_config", found).update(settings)
    with pytest.raises(ConfigError, match=named):
        architecture(found).build()
