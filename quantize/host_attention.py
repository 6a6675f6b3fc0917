"""Attention in NumPy, for models that run on MLX's CPU back end and are only judged.

MLX computes every score there, also those that the mask takes away, at 3 GFLOP/s. This leaves out keys that no query of
a block may see, and is five times as fast.
"""

from collections.abc import Callable

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
        queries, keys, values = (np.asarray(array.astype(mx.float32)) for array in (q, k, v))
        return mx.array(attend(queries, keys, values, seen, scale))

    return run


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray | None, scale: float) -> np.ndarray:
    """q (B, H, L, D) over k, v (B, K, S, D), of which query i sees key j where ``seen`` (L, S) is true; in float32."""
    batch, heads, length, size = q.shape
    groups = heads // k.shape[1]
    out = np.empty((*q.shape[:3], v.shape[-1]), np.float32)
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        some = None if seen is None else seen[start:stop]
        keys = np.arange(k.shape[2]) if some is None else np.flatnonzero(some.any(0))
        low, high = keys[0], keys[-1] + 1
        queries = q[:, :, start:stop].reshape(batch, -1, groups * (stop - start), size)
        scores = (queries * np.float32(scale)) @ k[:, :, low:high].swapaxes(-1, -2)  # (B, K, groups * block, keys)
        if some is not None and not (cut := some[:, low:high]).all():
            scores += np.tile(np.where(cut, np.float32(0), -np.float32(np.inf)), (groups, 1))
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        values = scores @ v[:, :, low:high]
        values /= scores.sum(-1, keepdims=True)
        out[:, :, start:stop] = values.reshape(batch, heads, stop - start, -1)
    return out


def _causal(length: int, keys: int) -> np.ndarray:
    return np.arange(keys) <= np.arange(length)[:, None] + (keys - length)
