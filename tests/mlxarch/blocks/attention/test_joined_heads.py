"""Queries and keys of one token, normalised and rotated together."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import parity
from mlxarch.blocks import Attention, CausalLM, fuse
from mlxarch.blocks.layer import token_mixer
from mlxarch.cpu_kernels import native
from mlxarch.loading.load import load_model

MODELS = ["llama3", "qwen3", "gemma3_text", "gpt_oss", "granite"]


@pytest.fixture(autouse=True)
def mlx_alone() -> Iterator[None]:
    """The CPU kernels norm and rotate heads elsewhere."""
    with native.suspended():
        yield


def load(name: str) -> CausalLM:
    model, _ = load_model(parity.GOLDEN / name, dtype="float32")
    fuse(model)
    return model


def attentions(model: CausalLM) -> list[Any]:
    return [token_mixer(layer) for layer in model.layers]


def next_logits(model: CausalLM) -> np.ndarray:
    """Logits (2, V) of one more token behind a prompt, for two rows."""
    caches = model.make_caches()
    mx.eval(model(mx.array([[5, 9, 3, 7], [2, 4, 6, 1]]), caches))
    return np.asarray(model(mx.array([[11], [8]]), caches)[:, 0])


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "_can_join_heads", property(lambda self: False))


@pytest.mark.parametrize("name", MODELS)
def test_heads_of_one_array_are_those_of_two(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(name)
    assert all(attention._can_join_heads for attention in attentions(model))
    joined = next_logits(model)
    apart(monkeypatch)
    np.testing.assert_allclose(joined, next_logits(model), atol=2e-5)


def test_each_head_has_its_own_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("qwen3")
    for attention in attentions(model):
        norms = attention.head_norms
        norms._factors = norms._factors[::-1]  # the keys' for the first queries
    joined = next_logits(model)
    apart(monkeypatch)
    assert np.abs(joined - next_logits(model)).max() > 1e-3


def test_norms_whose_weights_were_replaced_are_apart_again() -> None:
    model = load("qwen3")
    attention = attentions(model)[0]
    before = next_logits(model)
    attention.q_norm.weight = attention.q_norm.weight * 3
    assert not attention._can_join_heads
    assert np.abs(next_logits(model) - before).max() > 1e-3


def test_an_architecture_with_positions_of_its_own_keeps_its_heads_apart() -> None:
    model = load("llama4_scout")
    assert not any(attention._can_join_heads for attention in attentions(model))
