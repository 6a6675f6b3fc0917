"""Attention with the scores at hand, for so many keys at a time that they stay small."""

from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from mlxarch.blocks.pace import two_under_way
from mlxarch.cache import Held, Made, Packed
from mlxarch.cache.packed import unpacks

Mask = mx.array | Literal["causal"] | None
ELEMENTS = 2**24  # of the largest array that a block of keys takes, 64 MB in float32
LEAST = 256  # keys in a block, whatever else
UNSEEN = -1e30  # a score that weighs nothing; with -inf a block without any key to see would be NaN
Vectors = Held | Made  # keys or values (B, K, S, D)


def attend_by_scores(
    q: mx.array,
    k: Vectors,
    v: Vectors,
    mask: Mask,
    score: Callable[[mx.array], mx.array],
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention for what the fused kernel does not do: scores of another form, and keys that are packed.

    Args:
        score: q k^T -> what goes into the softmax, shaped (B, K, H/K, L, some of S).
        sinks: logits (H,) that join the softmax and take no value.

    Shape:
        q (B, H, L, D), k (B, K, S, D), v (B, K, S, E) -> (B, H, L, E)
    """
    batch, heads, length, size = q.shape
    kv_heads, held = k.shape[1:3]
    rows, at_once, unpacked = q.reshape(batch, kv_heads, -1, size), keys_at_once(q, k), _unpacked(q, k)
    rows = k.turned(rows) if isinstance(k, Packed) else rows  # (B, K, H/K * L, D)
    # two blocks are under way at a time, or all of this layer, and of the next ones, might be there at once
    paced = unpacked or (length > 1 and at_once < held)
    state: Partial | None = None
    if sinks is not None:
        state = sinks.astype(mx.float32).reshape(kv_heads, -1, 1, 1), mx.array(0.0)
    for first in range(0, held, at_once):
        last = min(first + at_once, held)
        keys, values = _blocks(k, v, first, last, unpacked)
        scores = mx.unflatten(_product(rows, keys, True).astype(mx.float32), 2, (-1, length))
        scores, seen = score(scores), _part(mask, first, last, length, held)
        scores = scores if seen is None else mx.where(seen, scores, UNSEEN)  # (B, K, H/K, L, S)
        weights = mx.softmax(scores, axis=-1).astype(values.dtype).flatten(2, 3)
        out = mx.unflatten(_product(weights, values, False), 2, (-1, length))
        before, state = state, merge(state, (mx.logsumexp(scores, axis=-1, keepdims=True), out))
        if paced:
            total, out = two_under_way(state, before if first and before else (q,))
            state = total, out
    assert state is not None
    out = v.turned_back(state[1]) if isinstance(v, Packed) else state[1]
    return out.astype(q.dtype).reshape(batch, heads, length, -1)


Partial = tuple[mx.array, mx.array]  # of some keys: log of the sum of exp(score) (…, 1), weighted sum of values (…, D)


def merge(some: Partial | None, more: Partial) -> Partial:
    """The softmax-weighted sum over the keys of both (arXiv:1805.02867)."""
    if some is None:
        return more
    total = mx.logaddexp(some[0], more[0])
    return total, some[1] * mx.exp(some[0] - total) + more[1] * mx.exp(more[0] - total)


def keys_at_once(q: mx.array, k: Vectors) -> int:
    """How many keys make a block: decoding takes few blocks, a prompt's step little memory."""
    batch, heads, length, _ = q.shape
    made = batch * k.shape[1] * k.shape[3] if _unpacked(q, k) else 0
    at_once = (ELEMENTS if length == 1 else ELEMENTS // 4) // max(batch * heads * length, made)
    # unpacked, two halves of a layer's take less than what packing saves in four layers
    return max(min(at_once, -(-k.shape[2] // 2)) if made else at_once, LEAST)


def _unpacked(q: mx.array, k: Vectors) -> bool:
    """Whether keys and values are unpacked for these queries."""
    return isinstance(k, Made) or isinstance(k, Packed) and unpacks(q.shape[1] // k.shape[1] * q.shape[2])


def _blocks(k: Vectors, v: Vectors, first: int, last: int, unpacked: bool) -> tuple[Held, Held]:
    """Keys and values of some tokens. What both are made of is unpacked once; packed ones stay turned."""
    if isinstance(k, Made) or isinstance(v, Made):
        assert isinstance(k, Made) and isinstance(v, Made)  # of the same latents
        latents = k.held.block(first, last).unpacked()
        return k.make(latents), v.make(latents[..., : v.held.size])
    keys, values = _block(k, first, last), _block(v, first, last)
    if not (unpacked and isinstance(keys, Packed) and isinstance(values, Packed)):
        return keys, values
    held = keys.unpacked(turned=True)
    shared = isinstance(k, Packed) and isinstance(v, Packed) and k.parts is v.parts
    return held, held if shared else values.unpacked(turned=True)


def _block(vectors: Held, first: int, last: int) -> Held:
    return vectors[:, :, first:last] if isinstance(vectors, mx.array) else vectors.block(first, last)


def _product(x: mx.array, vectors: Held, transpose: bool) -> mx.array:
    if isinstance(vectors, mx.array):
        return x @ (vectors.swapaxes(-1, -2) if transpose else vectors)
    return vectors.product(x, transpose)


def _part(mask: Mask, first: int, last: int, length: int, held: int) -> mx.array | None:
    """Which keys of a block the queries see: (L, S) or (B, 1, 1, L, S); None: all of them."""
    if isinstance(mask, str):
        if last <= held - length + 1:
            return None
        return mx.arange(held - length, held)[:, None] >= mx.arange(first, last)
    if mask is None:
        return None
    part = mask[..., first:last]
    return part if part.ndim == 2 else part[:, :, None]
