"""Gated delta rule: the form over chunks gives what the recurrence gives, also where keys repeat."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks.recurrent.delta_rule import chunked, delta_rule, invert_unit_lower, step

HEADS, KEY, VALUE = 3, 16, 8


def inputs(length: int, spread: float, by_feature: float = 0.0) -> list[mx.array]:
    """Queries and keys of length 1; ``spread`` 0 makes all keys equal, which conditions worst.

    With ``by_feature``, the largest decay of a token, each feature of the keys has its own.
    """
    mx.random.seed(length)
    shape = (2, HEADS, length)
    q = mx.random.normal((*shape, KEY))
    k = mx.random.normal((2, HEADS, 1, KEY)) + spread * mx.random.normal((*shape, KEY))
    q, k = (t / mx.linalg.norm(t, axis=-1, keepdims=True) for t in (q, k))
    v = mx.random.normal((*shape, VALUE))
    g = -mx.random.uniform(0, 0.1 * spread, shape)
    if by_feature:
        g = -by_feature * mx.random.uniform(0, 1, (*shape, KEY)) ** 8
    beta = mx.random.uniform(0.9 - 0.9 * min(spread, 1), 1, shape)
    return [q, k, v, g, beta, mx.random.normal((2, HEADS, KEY, VALUE))]


def in_float64(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[np.ndarray, np.ndarray]:
    keys, queries, values = (np.array(t, np.float64) for t in (k, q, v))
    decay, write, s = (np.array(t, np.float64) for t in (g, beta, state))
    outputs = []
    for t in range(keys.shape[2]):
        s = s * np.exp(decay[:, :, t]).reshape(*s.shape[:2], -1, 1)
        error = values[:, :, t] - np.einsum("bhnv,bhn->bhv", s, keys[:, :, t])
        s = s + np.einsum("bhn,bhv->bhnv", keys[:, :, t], write[:, :, t, None] * error)
        outputs.append(np.einsum("bhnv,bhn->bhv", s, queries[:, :, t]))
    return np.stack(outputs, 2), s


@pytest.mark.parametrize("by_feature", [0.0, 0.1, 5.0, 200.0])
@pytest.mark.parametrize("spread", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("length", [1, 2, 7, 13, 64, 65, 150])
def test_both_forms_agree_to_1e_5(length: int, spread: float, by_feature: float) -> None:
    arrays = inputs(length, spread, by_feature)
    wanted = in_float64(*arrays)
    for form in (step, chunked, delta_rule):
        for found, exact in zip(form(*arrays), wanted, strict=True):
            assert np.abs(np.array(found) - exact).max() <= 1e-5, form


def test_a_wrong_order_would_show() -> None:
    q, k, v, g, beta, state = inputs(20, 1.0)
    right, _ = chunked(q, k, v, g, beta, state)
    before, _ = chunked(q, k, v, mx.concatenate([g[..., 1:], g[..., :1]], -1), beta, state)
    assert float(mx.abs(right - before).max()) > 1e-3


def test_the_decay_of_another_feature_would_show() -> None:
    q, k, v, g, beta, state = inputs(20, 1.0, 0.5)
    right, _ = chunked(q, k, v, g, beta, state)
    other, _ = chunked(q, k, v, g[..., ::-1], beta, state)
    assert float(mx.abs(right - other).max()) > 1e-3


@pytest.mark.parametrize("by_feature", [0.0, 0.5])
def test_prompts_may_be_cut_anywhere(by_feature: float) -> None:
    q, k, v, g, beta, state = inputs(90, 1.0, by_feature)
    whole, last = delta_rule(q, k, v, g, beta, state)
    parts = []
    for start, end in ((0, 1), (1, 14), (14, 80), (80, 90)):
        q_part, k_part, v_part, g_part, beta_part = (t[:, :, start:end] for t in (q, k, v, g, beta))
        out, state = delta_rule(q_part, k_part, v_part, g_part, beta_part, state)
        parts.append(out)
    assert float(mx.abs(mx.concatenate(parts, 2) - whole).max()) <= 1e-5
    assert float(mx.abs(state - last).max()) <= 1e-5


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_a_triangle_of_ones_is_inverted_without_large_numbers(size: int) -> None:
    lower = mx.tril(mx.ones((2, size, size)), -1)
    product = (lower + mx.eye(size)) @ invert_unit_lower(lower)
    assert np.array_equal(np.array(product), np.stack([np.eye(size)] * 2))
