"""Attention in NumPy computes what MLX computes, whatever may be seen, and leaves other kinds of attention alone."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks import Attention, ForwardContext
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.loading.registry import architecture
from mlxarch.loading.resolve import resolve
from mlxarch.quantize.calibration import numpy_attention

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"


def drawn(heads: int, keys: int, length: int = 150, size: int = 16) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(0)
    return tuple(
        draw.normal(size=(2, n, length, size)).astype(np.float32) for n in (heads, keys, keys)
    )


def masks(length: int) -> dict[str, np.ndarray | None]:
    distance = np.arange(length)[:, None] - np.arange(length)
    return {
        "all": None,
        "causal": distance >= 0,
        "window": (distance >= 0) & (distance < 20),
        "holes": (distance >= 0) & (distance % 3 == 0),
    }


@pytest.mark.parametrize("which", ["all", "causal", "window", "holes"])
@pytest.mark.parametrize("keys", [1, 2, 6])
def test_it_is_the_attention_of_mlx(which, keys):
    q, k, v = drawn(6, keys)
    seen = masks(150)[which]
    expected = mx.fast.scaled_dot_product_attention(
        *map(mx.array, (q, k, v)), scale=0.3, mask=None if seen is None else mx.array(seen)
    )
    found = numpy_attention.attention_forward(q, k, v, seen, 0.3)
    assert np.abs(found - np.array(expected)).max() < 2e-6
    other = numpy_attention.attention_forward(
        q, k, v, masks(150)["window" if which != "window" else "causal"], 0.3
    )
    assert np.abs(other - np.array(expected)).max() > 1e-2


@pytest.mark.parametrize("which", ["all", "causal", "window", "holes"])
@pytest.mark.parametrize("keys", [1, 2, 6])
def test_gradients_are_those_of_mlx(which, keys):
    arrays, seen = drawn(6, keys), masks(150)[which]
    gradient = np.random.default_rng(1).normal(size=(2, 6, 150, 16)).astype(np.float32)
    mask = None if seen is None else mx.array(seen)
    _, expected = mx.vjp(
        lambda *qkv: [mx.fast.scaled_dot_product_attention(*qkv, scale=0.3, mask=mask)],
        [mx.array(array) for array in arrays],
        [mx.array(gradient)],
    )
    q, k, v = arrays
    found = numpy_attention.attention_backward(q, k, v, gradient, seen, 0.3)
    other = numpy_attention.attention_backward(
        q, k, v, gradient, masks(150)["window" if which != "window" else "causal"], 0.3
    )
    for own, wrong, right in zip(found, other, expected, strict=True):
        assert np.abs(own - np.array(right)).max() < 2e-5
        assert np.abs(wrong - np.array(right)).max() > 1e-2


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "gpt_oss", "llama3"])
def test_a_model_computes_the_same_with_it(name):
    folder = next(folder for folder in sorted(GOLDEN.iterdir()) if folder.name.startswith(name))
    resolved = resolve(open_checkpoint(folder))
    plain, changed = (architecture(open_checkpoint(folder).config).build() for _ in range(2))
    for model in (plain, changed):
        model.update(resolved.model.parameters())
        model.load_weights([(path, tensor.load()) for path, tensor in resolved.parameters.items()])
    tokens = mx.array(np.random.default_rng(1).integers(0, plain.vocab_size, (2, 40)))
    numpy_attention.use_numpy_attention(changed)
    installed = [m for m in changed.modules() if isinstance(m, Attention) and "attend" in vars(m)]
    assert bool(installed) == (name not in ("gemma2", "gpt_oss")), (
        "soft caps and sinks are not computed here"
    )
    one, other = (np.array(model(tokens).astype(mx.float32)) for model in (plain, changed))
    assert np.abs(one - other).max() < 1e-4 * max(1, np.abs(one).max())
    state = mx.random.normal(
        (2, 40, plain.embed(tokens, ForwardContext(40)).shape[-1]), key=mx.random.key(0)
    )
    one, other = (
        np.array(
            mx.vjp(
                lambda x, own=model: [own.layers[0](x, ForwardContext(40), None)], [state], [state]
            )[1][0]
        )
        for model in (plain, changed)
    )
    assert np.abs(one - other).max() < 1e-4 * max(1, np.abs(one).max())
