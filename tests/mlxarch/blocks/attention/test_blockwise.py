"""Attention by blocks of keys: the same as the fused kernel's, for every mask, sinks, groups, and packed or not."""

import math
from typing import Any

import mlx.core as mx
import pytest

from mlxarch.blocks.attention import blockwise as scores
from mlxarch.blocks.attention.attention import attend
from mlxarch.blocks.attention.blockwise import attend_blockwise
from mlxarch.kv_cache.quantized import quantize_vectors
from mlxarch.quantization.scheme import Quantization

HEADS, KV_HEADS, SIZE, HELD = 6, 2, 32, 50
MASKS = {
    "none": (1, lambda: None),
    "causal": (9, lambda: "causal"),
    "causal, nothing before": (HELD, lambda: "causal"),
    "window": (9, lambda: window(9, 12)),
    "narrow window": (30, lambda: window(30, 2)),  # most blocks have no key that most queries see
    "each row its own": (9, lambda: mx.stack([window(9, 12), window(9, 40)])[:, None]),
}


def window(length: int, size: int) -> mx.array:
    queries, keys = mx.arange(HELD - length, HELD)[:, None], mx.arange(HELD)
    return (keys <= queries) & (keys > queries - size)


def draw(length: int, heads: int, seed: int) -> mx.array:
    return mx.random.normal((2, heads, length, SIZE), key=mx.random.key(seed))


def error(some: mx.array, other: mx.array) -> float:
    return mx.abs(some - other).max().item()  # pyright: ignore[reportReturnType]


@pytest.fixture(params=[1, 7, 50], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "MAX_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(scores, "MIN_BLOCK_KEYS", request.param)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("name", MASKS)
def test_blocks_give_what_the_fused_kernel_gives_at_once(name: str, sinks: bool) -> None:
    length, make = MASKS[name]
    q, k, v, mask, scale = (
        draw(length, HEADS, 1),
        draw(HELD, KV_HEADS, 2),
        draw(HELD, KV_HEADS, 3),
        make(),
        0.3,
    )
    sink = mx.random.normal((HEADS,), key=mx.random.key(4)) if sinks else None
    arguments: dict[str, Any] = dict(scale=scale, mask=mask, sinks=sink)
    fused = mx.fast.scaled_dot_product_attention(q, k, v, **arguments)
    assert error(attend_blockwise(q, k, v, mask, lambda s: s * scale, sink), fused) <= 1e-5
    packed_k, packed_v = (quantize_vectors(x, Quantization(8, 32)) for x in (k, v))
    found = attend(q, packed_k, packed_v, mask, scale=scale, sinks=sink)
    wanted = mx.fast.scaled_dot_product_attention(
        q, packed_k.dequantize(), packed_v.dequantize(), **arguments
    )
    assert error(found, wanted) <= 1e-5
    # negative controls: other keys, no mask, no sinks
    assert error(found, fused) > 1e-4
    if mask is not None:
        assert error(found, attend(q, packed_k, packed_v, None, scale=scale, sinks=sink)) > 1e-2
    if sinks:
        assert error(found, attend(q, packed_k, packed_v, mask, scale=scale)) > 1e-3


def test_any_form_of_score_is_applied_before_the_mask() -> None:
    q, k, v = draw(9, HEADS, 1), draw(HELD, KV_HEADS, 2), draw(HELD, KV_HEADS, 3)
    mask, cap = window(9, 12), 2.0
    found = attend_blockwise(q, k, v, mask, lambda s: cap * mx.tanh(s / cap))
    all_k, all_v = (mx.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    capped = mx.where(mask, cap * mx.tanh(q @ all_k.swapaxes(-1, -2) / cap), -math.inf)
    assert error(found, mx.softmax(capped, axis=-1) @ all_v) <= 1e-5
    assert error(found, attend(q, k, v, mask, scale=1.0)) > 1e-2


def test_half_precision_keeps_its_type_and_sums_in_float32() -> None:
    q, k, v = (
        draw(n, h, s).astype(mx.bfloat16)
        for n, h, s in ((9, HEADS, 1), (HELD, KV_HEADS, 2), (HELD, KV_HEADS, 3))
    )
    found = attend_blockwise(q, k, v, "causal", lambda s: s * 0.1)
    assert found.dtype == mx.bfloat16
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    exact = attend(q, k, v, "causal", scale=0.1)
    assert error(found, exact) <= 0.02
