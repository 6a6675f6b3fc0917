"""RoPE in config.json: two dialects in one file, defaults, and the context that scaling gives."""

import json
import logging
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import RoPE
from mlxarch.loading.registry import architecture

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def config(name: str, **keys: Any) -> Any:
    found = json.loads((parity.GOLDEN / name / "config.json").read_text())
    for key in ("rope_scaling", "rope_theta", "rope_parameters"):
        found.pop(key, None)
    return architecture(found | keys).config


def angles(config: Any, layer_type: str = "full_attention") -> np.ndarray:
    """A vector after the rotation, at some positions."""
    rope = RoPE(16, config.rope_for(layer_type))
    return np.array(rope(mx.ones((1, 1, 40, 16)), 50))


@pytest.mark.parametrize("name", ["llama3", "qwen3", "olmo2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_scaling_counts_beside_rope_parameters(name: str, kind: str, key: str) -> None:
    scaling = {key: kind, **SCALINGS[kind]}
    wanted = angles(config(name, rope_scaling=scaling, rope_theta=1e4))
    plain = angles(config(name, rope_parameters=PLAIN))
    assert np.abs(wanted - plain).max() > 0.01
    for both in (scaling | {"rope_theta": 1e4}, scaling):  # the base may be in either
        assert np.array_equal(
            angles(config(name, rope_parameters=PLAIN, rope_scaling=both)), wanted
        )
    off = config(name, rope_parameters=scaling | {"rope_theta": 1e4}, rope_scaling=PLAIN)
    assert np.array_equal(angles(off), plain)
    nothing = config(name, rope_parameters=scaling | {"rope_theta": 1e4}, rope_scaling={})
    assert np.array_equal(angles(nothing), wanted)


@pytest.mark.parametrize("name", ["gemma3_text", "gemma3n_text", "olmo3"])
def test_where_layer_types_differ_rope_scaling_changes_the_full_layers(name: str) -> None:
    both = {"full_attention": PLAIN, "sliding_attention": PLAIN | {"rope_theta": 500.0}}
    found = config(name, rope_parameters=both, rope_scaling={"type": "linear", "factor": 4.0})
    full = config("llama3", rope_parameters=PLAIN | {"rope_type": "linear", "factor": 4.0})
    assert np.array_equal(angles(found), angles(full))
    sliding = config("llama3", rope_parameters=PLAIN | {"rope_theta": 500.0})
    assert np.array_equal(angles(found, "sliding_attention"), angles(sliding))


def test_the_original_context_is_the_stated_one_if_it_is_left_out() -> None:
    stated = {"max_position_embeddings": 64, "rope_theta": 1e4}
    given = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    short = {"type": "yarn", "factor": 4.0}
    wanted = angles(config("qwen3", rope_scaling=given, **stated))
    assert np.array_equal(angles(config("qwen3", rope_scaling=short, **stated)), wanted)
    other = given | {"original_max_position_embeddings": 32}
    assert not np.array_equal(angles(config("qwen3", rope_scaling=other, **stated)), wanted)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("name", "stated", "scaling", "context"),
    [
        ("qwen3", 128, None, 128),
        ("qwen3", 128, YARN, 512),  # as the model cards of Qwen say
        ("qwen3", 512, YARN, 512),  # the file counts the scaling already
        ("qwen3", 2048, YARN, 2048),
        ("llama3", 128, {"type": "linear", "factor": 4.0}, 512),
        ("llama3", 512, {"rope_type": "llama3"} | SCALINGS["llama3"], 512),
        ("llama3", 128, {"type": "linear", "factor": 1e300}, 2**31 - 1),
        ("gemma3_text", 128, {"rope_type": "linear", "factor": 8.0}, 128),
    ],
)
def test_scaling_lengthens_the_context(
    name: str, stated: int, scaling: dict[str, Any] | None, context: int
) -> None:
    keys = {"max_position_embeddings": stated, "rope_theta": 1e4, "rope_scaling": scaling}
    assert config(name, **keys).context_length == context


def test_attn_factor_multiplies_what_yarn_computes(caplog: pytest.LogCaptureFixture) -> None:
    def factor(**more: float) -> float:
        return RoPE(16, config("qwen3", rope_theta=1e4, rope_scaling=YARN | more).rope).factor

    assert factor(attn_factor=0.5) == 0.5 * factor() > 0
    assert factor(attention_factor=1.5, attn_factor=0.5) == 1.5
    assert not caplog.records


def test_a_key_that_nothing_reads_is_named(caplog: pytest.LogCaptureFixture) -> None:
    config("qwen3", rope_theta=1e4, rope_scaling=YARN | {"no_such_key": 3})
    config("qwen3", rope_theta=1e4, rope_scaling=YARN | {"no_such_key": None})
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "'no_such_key'" in record.getMessage()
    both = {"full_attention": PLAIN | {"other_key": 1}, "sliding_attention": PLAIN}
    config("gemma3_text", rope_parameters=both)
    assert "'other_key'" in caplog.records[-1].getMessage()
