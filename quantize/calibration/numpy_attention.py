"""Attention in NumPy, forward and backward, for calibration and evaluation on MLX's CPU backend.

That backend computes every attention score, masked ones included, at 3 GFLOP/s. This implementation
skips the keys that no query of a block may attend to, and is five times as fast.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Attention, CausalLM, ForwardContext, KVArray
from mlxarch.blocks.attention.blockwise import Mask

QUERY_BLOCK = 64  # queries per block


def use_numpy_attention(model: CausalLM) -> None:
    """Make standard attention modules compute in NumPy if MLX's default device is a CPU.

    Modules with soft-capped scores, attention sinks or their own ``attend`` keep computing in MLX.
    """
    if mx.default_device() != mx.cpu:
        return
    for module in model.modules():
        if (
            isinstance(module, Attention)
            and type(module).attend is Attention.attend
            and module.softcap is None
            and "sinks" not in module
        ):
            module.attend = _numpy_attend(module.attend, module.scale)


def _numpy_attend(mlx_attend: Callable[..., mx.array], scale: float) -> Callable[..., mx.array]:
    """Return a differentiable ``Attention.attend`` in NumPy, with ``mlx_attend`` as fallback."""

    def attend(
        q: mx.array, k: KVArray, v: KVArray, mask: Mask, context: ForwardContext
    ) -> mx.array:
        if (
            not isinstance(k, mx.array)
            or not isinstance(v, mx.array)
            or (isinstance(mask, mx.array) and mask.ndim > 2)
        ):
            return mlx_attend(q, k, v, mask, context)
        if mask is None:
            visible = None
        elif isinstance(mask, str):
            visible = _causal_mask(q.shape[2], k.shape[2])
        else:
            visible = np.asarray(mask)

        def forward(*qkv: mx.array) -> mx.array:
            queries, keys, values = map(_to_numpy, qkv)
            return mx.array(attention_forward(queries, keys, values, visible, scale))

        def backward(
            qkv: Sequence[mx.array], gradient: mx.array, _: mx.array
        ) -> tuple[mx.array, ...]:
            queries, keys, values = map(_to_numpy, qkv)
            gradients = attention_backward(
                queries, keys, values, _to_numpy(gradient), visible, scale
            )
            return tuple(map(mx.array, gradients))

        function: Any = mx.custom_function(forward)
        function.vjp(backward)
        return function(q, k, v)

    return attend


def _to_numpy(array: mx.array) -> np.ndarray:
    return np.asarray(array.astype(mx.float32))


def attention_forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray | None, scale: float
) -> np.ndarray:
    """Scaled dot-product attention with H query heads and K key/value heads, in float32.

    Args:
        q: queries (B, H, L, D).
        k: keys (B, K, S, D).
        v: values (B, K, S, D).
        visible: (L, S), true where query i may attend to key j; None for all pairs.
        scale: factor of the scores.

    Returns:
        Attention outputs (B, H, L, D).
    """
    out = np.empty((*q.shape[:3], v.shape[-1]), np.float32)
    for queries, keys, weights in _attention_weights(q, k, visible, scale):
        out[:, :, queries] = _split_heads(weights @ v[:, :, keys], q.shape[1])
    return out


def attention_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    gradient: np.ndarray,
    visible: np.ndarray | None,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of q, k and v, given the gradient (B, H, L, D) of the outputs.

    The other arguments are those of ``attention_forward``; the attention weights are computed
    again.
    """
    dq = np.empty(q.shape, np.float32)
    dk = np.zeros(k.shape, np.float32)
    dv = np.zeros(v.shape, np.float32)
    for block, keys, weights in _attention_weights(q, k, visible, scale):
        queries = _merge_heads(q[:, :, block], k.shape[1])
        outputs = _merge_heads(gradient[:, :, block], k.shape[1])
        dv[:, :, keys] += weights.swapaxes(-1, -2) @ outputs
        scores = outputs @ v[:, :, keys].swapaxes(-1, -2)
        scores -= np.einsum("bkij,bkij->bki", scores, weights)[..., None]
        scores *= weights
        scores *= np.float32(scale)
        dq[:, :, block] = _split_heads(scores @ k[:, :, keys], q.shape[1])
        dk[:, :, keys] += scores.swapaxes(-1, -2) @ queries
    return dq, dk, dv


def _attention_weights(
    q: np.ndarray, k: np.ndarray, visible: np.ndarray | None, scale: float
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield blocks of queries, the range of keys visible to them, and their softmax weights.

    The weights are (B, K, H / K * queries, keys).
    """
    heads_per_key = q.shape[1] // k.shape[1]
    length = q.shape[2]
    for start in range(0, length, QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, length))
        rows = None if visible is None else visible[block]
        ids = np.arange(k.shape[2]) if rows is None else np.flatnonzero(rows.any(0))
        keys = slice(ids[0], ids[-1] + 1)
        queries = _merge_heads(q[:, :, block], k.shape[1]) * np.float32(scale)
        weights = queries @ k[:, :, keys].swapaxes(-1, -2)
        if rows is not None and not rows[:, keys].all():
            bias = np.where(rows[:, keys], np.float32(0), -np.float32(np.inf))
            weights += np.tile(bias, (heads_per_key, 1))
        weights -= weights.max(-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(-1, keepdims=True)
        yield block, keys, weights


def _merge_heads(array: np.ndarray, kv_heads: int) -> np.ndarray:
    """Stack the query heads that share a key head: (B, H, L, D) -> (B, K, H / K * L, D)."""
    return array.reshape(array.shape[0], kv_heads, -1, array.shape[-1])


def _split_heads(array: np.ndarray, heads: int) -> np.ndarray:
    """Undo ``_merge_heads``: (B, K, H / K * L, D) -> (B, H, L, D)."""
    return array.reshape(array.shape[0], heads, -1, array.shape[-1])


def _causal_mask(length: int, keys: int) -> np.ndarray:
    return np.arange(keys) <= np.arange(length)[:, None] + (keys - length)
