"""Mistral Small 3 inside its vision wrapper, and Ministral 3, against transformers' classes of their text models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

ONES = np.ones_like

CASES = {
    "ministral3": Case(
        {
            "rms_norm_eps": config(rms_norm_eps=1e-5),
            "input norm": weight("*.input_layernorm.weight", ONES),
            "post-attention norm": weight("*.post_attention_layernorm.weight", ONES),
            "last norm": weight("model.norm.weight", ONES),
            "tie_word_embeddings": without("lm_head.weight", tie_word_embeddings=True),
            "head_dim": config(num_attention_heads=8, num_key_value_heads=4, head_dim=8),
            "rope_theta": config(rope_theta=10_000.0),
            "growing queries ignored": config(model_type="mistral"),
            "llama_4_scaling_beta": config(rope_scaling={"llama_4_scaling_beta": 0.1}),
            "original_max_position_embeddings": config(
                rope_scaling={"original_max_position_embeddings": 17}
            ),
            "factor": config(rope_scaling={"factor": 8.0}),
            "mscale": config(rope_scaling={"mscale": 2.0}),
            "rope type linear": config(rope_scaling={"rope_type": "linear"}),
            "window": config(sliding_window=8),
        }
    ),
}


@pytest.mark.parametrize(("name", "dialect"), parity.pairs(CASES))
def test_ministral3_matches_transformers(name: str, dialect: str, tmp_path: Path) -> None:
    found = parity.differences(name, dialect, tmp_path)
    assert found.largest <= CASES[name].tolerance, found
    assert found.same_tokens


@pytest.mark.parametrize(("name", "dialect", "option"), parity.options(CASES))
def test_every_option_of_ministral3_shows_in_the_logits(
    name: str, dialect: str, option: str, tmp_path: Path
) -> None:
    case = CASES[name]
    assert parity.effect(name, dialect, case.options[option], tmp_path) >= 3 * case.tolerance


# The wrapper around a text model. It holds no mathematics, so the text model's reference is its own

PREFIXES: dict[str, Callable[[str], str]] = {
    "published": lambda name: f"language_model.{name}",
    "transformers 5": lambda name: name.replace("model.", "model.language_model.", 1),
}


def wrapped(spelling: str, inner: Change | None = None, **settings: Any) -> Change:
    """The text model, changed by ``inner``, as a part of a vision model with ``settings`` of its own."""

    def change(found: dict[str, Any], weights: parity.Weights) -> None:
        if inner is not None:
            inner(found, weights)
        text = {
            key: value
            for key, value in found.items()
            if key not in ("architectures", "tie_word_embeddings")
        }
        found.clear()
        found.update(
            model_type="mistral3",
            text_config=text,
            vision_config={"model_type": "pixtral"},
            **settings,
        )
        for name in list(weights):
            weights[PREFIXES[spelling](name)] = weights.pop(name)
        outer = "model." if spelling == "transformers 5" else ""
        weights[f"{outer}vision_tower.patch_conv.weight"] = np.zeros((2, 2), np.float32)
        weights[f"{outer}multi_modal_projector.norm.weight"] = np.ones(2, np.float32)

    return change


@pytest.mark.parametrize("spelling", PREFIXES)
@pytest.mark.parametrize("dialect", parity.DIALECTS)
@pytest.mark.parametrize("name", ["mistral", "mistral_window", "ministral3"])
def test_the_wrapper_changes_nothing(
    name: str, dialect: str, spelling: str, tmp_path: Path
) -> None:
    assert parity.effect(name, dialect, wrapped(spelling), tmp_path) <= parity.TOLERANCE


@pytest.mark.parametrize("spelling", PREFIXES)
def test_what_is_wrong_inside_the_wrapper_shows(spelling: str, tmp_path: Path) -> None:
    change = wrapped(spelling, config(rms_norm_eps=1e-5))
    assert parity.effect("mistral", "config.json", change, tmp_path) >= 3 * parity.TOLERANCE


def without_kind(found: dict[str, Any], weights: parity.Weights) -> None:
    del found["model_type"]


def test_a_text_config_without_a_kind_is_a_mistral(tmp_path: Path) -> None:
    change = wrapped("published", without_kind)
    assert parity.effect("mistral", "config.json", change, tmp_path) <= parity.TOLERANCE


def test_a_head_of_its_own_counts_whatever_the_wrapper_says(tmp_path: Path) -> None:
    change = wrapped(
        "published", tie_word_embeddings=True
    )  # the default of transformers' Mistral3Config
    assert parity.effect("mistral", "config.json", change, tmp_path) <= parity.TOLERANCE


def test_without_a_head_the_embeddings_serve_if_the_wrapper_says_so(tmp_path: Path) -> None:
    change = wrapped("published", without("lm_head.weight"), tie_word_embeddings=True)
    assert parity.effect("mistral", "config.json", change, tmp_path) >= 3 * parity.TOLERANCE


def test_without_a_head_and_without_a_word_of_it_the_head_is_missing(tmp_path: Path) -> None:
    folder = parity.copy(
        "mistral", "config.json", tmp_path, wrapped("published", without("lm_head.weight"))
    )
    with pytest.raises(CheckpointError, match="missing: lm_head.weight"):
        load_model(folder)


@pytest.mark.parametrize("spelling", PREFIXES)
def test_the_towers_are_left_out_and_named(spelling: str, tmp_path: Path) -> None:
    folder = parity.copy("mistral", "config.json", tmp_path, wrapped(spelling))
    ignored = resolve(open_checkpoint(folder)).ignored
    assert {name.removeprefix("model.").partition(".")[0] for name in ignored} == {
        "vision_tower",
        "multi_modal_projector",
    }
    assert set(ignored.values()) == {"tower"}


@pytest.mark.parametrize("spelling", PREFIXES)
def test_a_quantized_copy_has_the_published_prefix(spelling: str, tmp_path: Path) -> None:
    folder = parity.copy("ministral3", "config.json", tmp_path, wrapped(spelling))
    convert(folder, tmp_path / "quantized", group_size=32, method="round")
    tensors = open_checkpoint(tmp_path / "quantized").tensors
    assert {name.split(".")[0] for name in tensors} == {"language_model"}
    assert "language_model.lm_head.weight" in tensors
    load_model(tmp_path / "quantized")


def published(**settings: Any) -> dict[str, Any]:
    return json.loads((parity.GOLDEN / "ministral3" / "config.json").read_text()) | settings


ROPE = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 16.0}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        (
            {"rope_parameters": ROPE | {"original_max_position_embeddings": 16}},
            "llama_4_scaling_beta",
        ),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_attention"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(
    settings: dict[str, Any], named: str
) -> None:
    architecture(published()).build()  # as it stands it is accepted
    with pytest.raises(ConfigError, match=named):
        architecture(published(**settings)).build()


def test_another_text_model_in_the_wrapper_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="mistral4"):
        architecture({"model_type": "mistral3", "text_config": published(model_type="mistral4")})
