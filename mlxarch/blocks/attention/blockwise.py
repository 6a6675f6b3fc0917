"""Blockwise attention: scores of a block of keys at a time, merged by an online softmax.

Used where MLX's fused kernel does not apply: scores with a soft cap or a temperature, and quantized
keys and values. The block size bounds memory; partial results are merged as in arXiv:1805.02867.
"""

from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from mlxarch.blocks.attention.bounded_eval import eval_two_in_flight
from mlxarch.kv_cache import KVArray, QuantizedVectors, UpProjectedLatents
from mlxarch.kv_cache.quantized import should_dequantize

Mask = mx.array | Literal["causal"] | None
KVOperand = KVArray | UpProjectedLatents  # keys or values (B, K, S, D)
PartialAttention = tuple[mx.array, mx.array]
"""Attention over some keys: log of the sum of exp(score) (…, 1), weighted sum of values (…, D)."""

MAX_BLOCK_ELEMENTS = 2**24  # of the largest array that belongs to a block; 64 MB in float32
MIN_BLOCK_KEYS = 256
MASKED_SCORE = -1e30  # -inf would give NaN for a block in which a query sees no key


def attend_blockwise(
    q: mx.array,
    k: KVOperand,
    v: KVOperand,
    mask: Mask,
    score_mod: Callable[[mx.array], mx.array],
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention with modified scores, or over quantized keys and values.

    Args:
        score_mod: q k^T -> logits of the softmax, both (B, K, H/K, L, keys of the block).
        sinks: logits (H,) that join the softmax without a value.

    Shape:
        q (B, H, L, D), k (B, K, S, D), v (B, K, S, E) -> (B, H, L, E)
    """
    batch, heads, length, size = q.shape
    kv_heads, keys_total = k.shape[1:3]
    rows = q.reshape(batch, kv_heads, -1, size)
    if isinstance(k, QuantizedVectors):
        rows = k.rotate(rows)  # (B, K, H/K * L, D)
    block = block_length(q, k)
    dequantizes = _should_dequantize(q, k)
    # otherwise MLX might hold all blocks of this layer, and of the next ones, at the same time
    bounded = dequantizes or (length > 1 and block < keys_total)
    state: PartialAttention | None = None
    if sinks is not None:
        state = sinks.astype(mx.float32).reshape(kv_heads, -1, 1, 1), mx.array(0.0)
    for start in range(0, keys_total, block):
        stop = min(start + block, keys_total)
        keys, values = _load_block(k, v, start, stop, dequantizes)
        scores = mx.unflatten(_matmul(rows, keys, True).astype(mx.float32), 2, (-1, length))
        scores = score_mod(scores)  # (B, K, H/K, L, keys)
        visible = _mask_block(mask, start, stop, length, keys_total)
        if visible is not None:
            scores = mx.where(visible, scores, MASKED_SCORE)
        weights = mx.softmax(scores, axis=-1).astype(values.dtype).flatten(2, 3)
        out = mx.unflatten(_matmul(weights, values, False), 2, (-1, length))
        previous = state
        state = merge_partials(previous, (mx.logsumexp(scores, axis=-1, keepdims=True), out))
        if bounded:
            total, out = eval_two_in_flight(state, previous if start and previous else (q,))
            state = total, out
    assert state is not None
    _, out = state
    if isinstance(v, QuantizedVectors):
        out = v.rotate_back(out)
    return out.astype(q.dtype).reshape(batch, heads, length, -1)


def merge_partials(first: PartialAttention | None, second: PartialAttention) -> PartialAttention:
    """Merge attention over two disjoint sets of keys (online softmax, arXiv:1805.02867)."""
    if first is None:
        return second
    first_log, first_out = first
    second_log, second_out = second
    log_total = mx.logaddexp(first_log, second_log)
    merged = first_out * mx.exp(first_log - log_total) + second_out * mx.exp(second_log - log_total)
    return log_total, merged


def block_length(q: mx.array, k: KVOperand) -> int:
    """Keys per block: large while decoding, so that blocks are few; small in prefill."""
    batch, heads, length, _ = q.shape
    key_elements = batch * k.shape[1] * k.shape[3] if _should_dequantize(q, k) else 0
    budget = MAX_BLOCK_ELEMENTS if length == 1 else MAX_BLOCK_ELEMENTS // 4
    block = budget // max(batch * heads * length, key_elements)
    if key_elements:
        # two dequantized halves of a layer take less than quantization saves in four layers
        block = min(block, -(-k.shape[2] // 2))
    return max(block, MIN_BLOCK_KEYS)


def _should_dequantize(q: mx.array, k: KVOperand) -> bool:
    """Whether keys and values are dequantized for these queries."""
    if isinstance(k, UpProjectedLatents):
        return True
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    return isinstance(k, QuantizedVectors) and should_dequantize(rows)


def _load_block(
    k: KVOperand, v: KVOperand, start: int, stop: int, dequantizes: bool
) -> tuple[KVArray, KVArray]:
    """Keys and values of some tokens.

    Latents of both are dequantized once. Quantized vectors stay rotated.
    """
    if isinstance(k, UpProjectedLatents) or isinstance(v, UpProjectedLatents):
        assert isinstance(k, UpProjectedLatents) and isinstance(v, UpProjectedLatents)
        latents = k.latents.slice_tokens(start, stop).dequantize()  # the same for k and v
        return k.up_project(latents), v.up_project(latents[..., : v.latents.size])
    keys = _slice_tokens(k, start, stop)
    values = _slice_tokens(v, start, stop)
    if not (
        dequantizes and isinstance(keys, QuantizedVectors) and isinstance(values, QuantizedVectors)
    ):
        return keys, values
    rotated = keys.dequantize(rotated=True)
    shared = (
        isinstance(k, QuantizedVectors) and isinstance(v, QuantizedVectors) and k.arrays is v.arrays
    )
    return rotated, rotated if shared else values.dequantize(rotated=True)


def _slice_tokens(vectors: KVArray, start: int, stop: int) -> KVArray:
    if isinstance(vectors, mx.array):
        return vectors[:, :, start:stop]
    return vectors.slice_tokens(start, stop)


def _matmul(x: mx.array, vectors: KVArray, transpose: bool) -> mx.array:
    if isinstance(vectors, mx.array):
        return x @ (vectors.swapaxes(-1, -2) if transpose else vectors)
    return vectors.matmul(x, transpose)


def _mask_block(mask: Mask, start: int, stop: int, length: int, keys_total: int) -> mx.array | None:
    """Visible keys of a block, (L, S) or (B, 1, 1, L, S); None if all are."""
    if isinstance(mask, str):
        if stop <= keys_total - length + 1:
            return None
        return mx.arange(keys_total - length, keys_total)[:, None] >= mx.arange(start, stop)
    if mask is None:
        return None
    part = mask[..., start:stop]
    return part if part.ndim == 2 else part[:, :, None]
