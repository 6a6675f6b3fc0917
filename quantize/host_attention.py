"""Attention in NumPy, there and back, for models that run on MLX's CPU back end and are only judged.

MLX computes every score there, also those that the mask takes away, at 3 GFLOP/s. This leaves out keys that no query of
a block may see, and is five times as fast.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Attention, CausalLM, Held, Step
from mlxarch.blocks.scores import Mask

BLOCK = 64  # queries at a time


def install(model: CausalLM) -> None:
    """Let the plain attentions of a model run here, if MLX's device is a CPU: those without soft caps, sinks or ways
    of their own.
    """
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for module in attentions if mx.default_device() == mx.cpu else ():
        if type(module).attend is Attention.attend and module.softcap is None and "sinks" not in module:
            module.attend = _here(module.attend, module.scale)


def _here(usual: Callable[..., mx.array], scale: float):
    def run(q: mx.array, k: Held, v: Held, mask: Mask, step: Step) -> mx.array:
        if not isinstance(k, mx.array) or not isinstance(v, mx.array) or (isinstance(mask, mx.array) and mask.ndim > 2):
            return usual(q, k, v, mask, step)
        seen = None if mask is None else _causal(q.shape[2], k.shape[2]) if isinstance(mask, str) else np.asarray(mask)

        def here(*qkv: mx.array) -> mx.array:
            queries, keys, values = map(_in_numpy, qkv)
            return mx.array(attend(queries, keys, values, seen, scale))

        def back(qkv: Sequence[mx.array], pull: mx.array, _: mx.array) -> tuple[mx.array, ...]:
            queries, keys, values = map(_in_numpy, qkv)
            return tuple(map(mx.array, pulls(queries, keys, values, _in_numpy(pull), seen, scale)))

        function: Any = mx.custom_function(here)
        function.vjp(back)
        return function(q, k, v)

    return run


def _in_numpy(array: mx.array) -> np.ndarray:
    return np.asarray(array.astype(mx.float32))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray | None, scale: float) -> np.ndarray:
    """q (B, H, L, D) over k, v (B, K, S, D), of which query i sees key j where ``seen`` (L, S) is true; in float32."""
    out = np.empty((*q.shape[:3], v.shape[-1]), np.float32)
    for own, keys, weights in _weights(q, k, seen, scale):
        out[:, :, own] = _apart(weights @ v[:, :, keys], q.shape[1])
    return out


def pulls(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, pull: np.ndarray, seen: np.ndarray | None, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How q, k and v are pulled at by what pulls (B, H, L, D) at the results of ``attend``."""
    found = np.empty(q.shape, np.float32), np.zeros(k.shape, np.float32), np.zeros(v.shape, np.float32)
    for own, keys, weights in _weights(q, k, seen, scale):
        queries, above = (_together(array[:, :, own], k.shape[1]) for array in (q, pull))
        found[2][:, :, keys] += weights.swapaxes(-1, -2) @ above
        scores = above @ v[:, :, keys].swapaxes(-1, -2)
        scores -= np.einsum("bkij,bkij->bki", scores, weights)[..., None]
        scores *= weights
        scores *= np.float32(scale)
        found[0][:, :, own] = _apart(scores @ k[:, :, keys], q.shape[1])
        found[1][:, :, keys] += scores.swapaxes(-1, -2) @ queries
    return found


def _weights(
    q: np.ndarray, k: np.ndarray, seen: np.ndarray | None, scale: float
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Some queries, the keys that they may see, and the weights (B, K, H / K * queries, keys) that they give these."""
    groups, length = q.shape[1] // k.shape[1], q.shape[2]
    for start in range(0, length, BLOCK):
        own = slice(start, min(start + BLOCK, length))
        some = None if seen is None else seen[own]
        ids = np.arange(k.shape[2]) if some is None else np.flatnonzero(some.any(0))
        keys = slice(ids[0], ids[-1] + 1)
        weights = (_together(q[:, :, own], k.shape[1]) * np.float32(scale)) @ k[:, :, keys].swapaxes(-1, -2)
        if some is not None and not (cut := some[:, keys]).all():
            weights += np.tile(np.where(cut, np.float32(0), -np.float32(np.inf)), (groups, 1))
        weights -= weights.max(-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(-1, keepdims=True)
        yield own, keys, weights


def _together(array: np.ndarray, kv_heads: int) -> np.ndarray:
    """(B, H, L, D) -> (B, K, H / K * L, D): the heads that share keys, one after the other."""
    return array.reshape(array.shape[0], kv_heads, -1, array.shape[-1])


def _apart(array: np.ndarray, heads: int) -> np.ndarray:
    """Back to (B, H, L, D)."""
    return array.reshape(array.shape[0], heads, -1, array.shape[-1])


def _causal(length: int, keys: int) -> np.ndarray:
    return np.arange(keys) <= np.arange(length)[:, None] + (keys - length)
