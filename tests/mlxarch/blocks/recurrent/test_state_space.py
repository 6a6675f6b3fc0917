"""Selective state space: the form over chunks gives what the recurrence gives."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks.recurrent import state_space as module
from mlxarch.blocks.recurrent.state_space import chunked, state_space, step

GROUPS, HEADS, VECTOR, SIZE = 2, 3, 16, 8


def inputs(length: int) -> list[mx.array]:
    mx.random.seed(length)
    q, k = (mx.random.normal((2, GROUPS, length, VECTOR)) for _ in range(2))
    v = mx.random.normal((2, GROUPS, HEADS, length, SIZE))
    g = -mx.random.uniform(0, 0.1, (2, GROUPS, HEADS, length))
    return [q / 4, k / 4, v, g, mx.random.normal((2, GROUPS, HEADS, VECTOR, SIZE))]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)


@pytest.mark.parametrize("length", [1, 2, 13, 16, 17, 60])
def test_both_forms_agree(length: int) -> None:
    arrays = inputs(length)
    wanted = step(*arrays)
    for form in (chunked, state_space):
        for found, right in zip(form(*arrays), wanted, strict=True):
            assert np.abs(np.array(found) - np.array(right)).max() <= 1e-5


def test_a_decay_of_the_wrong_token_would_show() -> None:
    q, k, v, g, state = inputs(20)
    right, _ = chunked(q, k, v, g, state)
    wrong, _ = chunked(q, k, v, mx.concatenate([g[..., 1:], g[..., :1]], -1), state)
    assert float(mx.abs(right - wrong).max()) > 1e-3
