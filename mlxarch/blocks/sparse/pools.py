"""Choice of pools of neighbouring tokens: one index key stands for several tokens.

A pool is a number of neighbouring tokens, counted from the first token that is no padding. A query
attends to the pools with the highest scores among those that end at or before its position, and to
the tokens after the last of these, the tail.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.sparse.selection import top_keys


@dataclass(frozen=True)
class Pools:
    """Sizes of a choice of pools.

    Attributes:
        size: tokens of a pool.
        count: pools that a query chooses.
    """

    size: int
    count: int

    def is_dense(self, total: int) -> bool:
        """Whether ``total`` tokens have no more pools than a query chooses."""
        return total // self.size <= self.count


def pool_tokens(vectors: mx.array, size: int, padding: mx.array | None) -> mx.array:
    """Group the vectors of tokens by pools; those of an unfinished pool are left out.

    Shape:
        vectors (B, 1, S, D), padding (B,) -> (B, S // size, size, D)
    """
    vectors = vectors[:, 0]
    if padding is not None:  # the tokens of padding come last, in pools that nothing can see
        slots = mx.arange(vectors.shape[1]) + padding[:, None]
        vectors = mx.take_along_axis(vectors, (slots % vectors.shape[1])[..., None], axis=1)
    count = vectors.shape[1] // size
    return mx.unflatten(vectors[:, : count * size], 1, (count, size))


def complete_pools(context: ForwardContext, size: int) -> mx.array:
    """Number of pools that end at or before each query: (L,), or (B, L) in a padded batch."""
    return (context.positions + 1) // size


def choose_pools(scores: mx.array, complete: mx.array, pools: Pools) -> mx.array:
    """Whether a query chooses a pool, by its scores: (B, L, P) -> the same.

    Args:
        complete: result of ``complete_pools``.
    """
    visible = mx.arange(scores.shape[-1]) < complete[..., None]
    chosen = top_keys(scores, visible, pools.count)
    none = mx.zeros(scores.shape, mx.bool_)
    return mx.put_along_axis(none, chosen, mx.array(True), axis=-1) & visible


def chosen_tokens(
    chosen: mx.array,
    complete: mx.array,
    visible: mx.array | None,
    size: int,
    context: ForwardContext,
    total: int,
) -> mx.array:
    """Mask of the tokens in the chosen pools and in the tail.

    Args:
        chosen: result of ``choose_pools`` (B, L, P).
        complete: result of ``complete_pools``.
        visible: tokens that a query sees at all, (L, S) or (B, L, S); None for all.
        size: tokens of a pool.
        total: S.

    Shape:
        (B, 1, L, S)
    """
    slots = mx.arange(total)
    pool = slots // size if context.padding is None else (slots - context.padding[:, None]) // size
    pool = pool.reshape(-1, 1, total)  # (B or 1, 1, S)
    index = mx.clip(pool, 0, chosen.shape[-1] - 1)
    shape = (*chosen.shape[:-1], total)
    mask = mx.take_along_axis(chosen, mx.broadcast_to(index, shape), axis=-1)
    mask = mx.where((pool >= 0) & (pool < complete[..., None]), mask, True)
    return (mask if visible is None else mask & visible)[:, None]


def gather_pools(
    vectors: tuple[mx.array, ...], scores: mx.array, pools: Pools
) -> tuple[mx.array, ...]:
    """Vectors of the tokens that a single query, the newest token, chooses, and of the tail.

    Shape:
        vectors (B, K, S, D), scores of all pools (B, 1, P) -> (B, K, tokens, D)
    """
    total = vectors[0].shape[2]
    best = top_keys(scores, None, pools.count)[:, 0]  # (B, count)
    tokens = (best[..., None] * pools.size + mx.arange(pools.size)).flatten(1)
    tail = mx.arange(total // pools.size * pools.size, total)
    tail = mx.broadcast_to(tail, (tokens.shape[0], tail.size)).astype(tokens.dtype)
    tokens = mx.concatenate([tokens, tail], axis=1)[:, None, :, None]  # (B, 1, tokens, 1)
    return tuple(mx.take_along_axis(array, tokens, axis=2) for array in vectors)
