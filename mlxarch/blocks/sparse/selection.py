"""Choice of keys by the scores of an indexer, and attention to the chosen ones alone."""

import mlx.core as mx

from mlxarch.blocks.attention.blockwise import MAX_BLOCK_ELEMENTS, MIN_BLOCK_KEYS, Mask
from mlxarch.blocks.attention.bounded_eval import eval_two_in_flight
from mlxarch.kv_cache import KVArray, QuantizedVectors


def index_scores(q: mx.array, weights: mx.array, keys: KVArray) -> mx.array:
    """Weighted sum over heads of relu(q k), in float32, a block of keys at a time.

    Shape:
        q (B, H, L, D), weights (B, L, H), keys (B, 1, S, D) -> (B, L, S)
    """
    batch, heads, length, size = q.shape
    rows = q.astype(mx.float32).reshape(batch, 1, heads * length, size)
    factors = weights.astype(mx.float32).swapaxes(1, 2)[..., None]  # (B, H, L, 1)
    total = keys.shape[2]
    block = max(MAX_BLOCK_ELEMENTS // 4 // (batch * heads * length), MIN_BLOCK_KEYS)
    parts: list[mx.array] = []
    for start in range(0, total, block):
        some = slice_tokens(keys, start, start + block).astype(mx.float32)
        products = mx.unflatten(rows @ some.swapaxes(-1, -2), 2, (heads, length))[:, 0]
        parts.append((mx.maximum(products, 0) * factors).sum(1))
        if block < total:  # otherwise the products of all blocks might exist at once
            parts[-1:] = eval_two_in_flight(parts[-1:], parts[-2:-1] or [q])
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def slice_tokens(vectors: KVArray, start: int, stop: int) -> mx.array:
    """Vectors of the tokens from ``start`` to ``stop``, dequantized: (B, K, S, D)."""
    if isinstance(vectors, QuantizedVectors):
        return vectors.slice_tokens(start, stop).dequantize()
    return vectors[:, :, start:stop]


def visible_keys(mask: Mask, length: int, total: int) -> mx.array | None:
    """Mask of ``total`` keys for ``length`` queries as an array; None if all are visible.

    Shape:
        (L, S), or (B, L, S) in a padded batch
    """
    if isinstance(mask, str):
        return mx.arange(total - length, total)[:, None] >= mx.arange(total)
    if mask is None or mask.ndim == 2:
        return mask
    return mask[:, 0]


def top_keys(scores: mx.array, visible: mx.array | None, count: int) -> mx.array:
    """Indices of the ``count`` visible keys with the highest scores, in no particular order.

    A query that sees fewer keys gets invisible ones as well.

    Shape:
        scores (B, L, S) -> (B, L, count)
    """
    if visible is not None:
        scores = mx.where(visible, scores, -mx.inf)
    return mx.stop_gradient(mx.argpartition(-scores, kth=count - 1, axis=-1)[..., :count])


def chosen_mask(chosen: mx.array, visible: mx.array | None, total: int) -> mx.array:
    """Mask of the chosen keys that are visible.

    Shape:
        chosen (B, L, count) -> (B, 1, L, S)
    """
    none = mx.zeros((*chosen.shape[:-1], total), mx.bool_)
    mask = mx.put_along_axis(none, chosen, mx.array(True), axis=-1)
    return (mask if visible is None else mask & visible)[:, None]


def gather_chosen(
    vectors: mx.array, chosen: mx.array, visible: mx.array | None
) -> tuple[mx.array, mx.array | None]:
    """Vectors of the keys that a single query chose, and their mask.

    Shape:
        vectors (B, 1, S, D), chosen (B, 1, count) -> (B, 1, count, D), (B, 1, 1, count)
    """
    found = mx.take_along_axis(vectors, chosen[..., None], axis=2)
    if visible is None:
        return found, None
    shape = (*chosen.shape[:-1], visible.shape[-1])
    return found, mx.take_along_axis(mx.broadcast_to(visible, shape), chosen, axis=-1)[:, None]
