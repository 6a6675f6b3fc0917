"""Gated attention to blocks of tokens that an indexer with averaged keys chooses (Qwen4-Exp)."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention.blockwise import Mask
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.attention.gated_attention import GatedAttention
from mlxarch.blocks.config import DecoderConfig, Size
from mlxarch.blocks.linear import ExactLinear
from mlxarch.blocks.rope import RoPE
from mlxarch.blocks.sparse.pools import (
    Pools,
    choose_pools,
    chosen_tokens,
    complete_pools,
    gather_pools,
    pool_tokens,
)
from mlxarch.blocks.sparse.selection import index_scores, slice_tokens, visible_keys
from mlxarch.kv_cache import KVArray


class BlockIndexer(nn.Module):
    """Score of a block: sum over heads of relu(query · key), the key an average over its tokens.

    A query is normalised and has RoPE at its position; the average of the raw keys of a block is
    normalised then, and has RoPE at the position of the block's first token.

    Args:
        dim: hidden size of the model.
        heads: heads of the indexer.
        size: features of an index key.
        block: tokens of a block.
        rope: position embedding of the first features.
        norm: constructor of the norms, called with their width.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        size: int,
        *,
        block: int,
        rope: RoPE,
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.index_qk_proj = ExactLinear(dim, (heads + 1) * size)
        self.q_layernorm = norm(size)
        self.k_layernorm = norm(size)
        self.size = size
        self.block = block
        self.rope = rope

    def project(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array]:
        """Raw keys (B, 1, L, D) and queries (B, H, L, D) of inputs (B, L, hidden_size)."""
        both = mx.unflatten(self.index_qk_proj(x), -1, (-1, self.size)).swapaxes(1, 2)
        q, k = mx.split(both, [both.shape[1] - 1], axis=1)
        return k, self.rope(self.q_layernorm(q), offset)

    def score(self, q: mx.array, keys: KVArray, padding: mx.array | None) -> mx.array:
        """Scores of all blocks (B, L, blocks), from raw keys (B, 1, S, D)."""
        raw = slice_tokens(keys, 0, keys.shape[2])
        blocks = pool_tokens(raw, self.block, padding)  # (B, blocks, block, D)
        averages = self.k_layernorm(blocks.mean(axis=2))[:, None]  # (B, 1, blocks, D)
        weights = mx.full((q.shape[0], q.shape[2], q.shape[1]), self.size**-0.5)
        return index_scores(q, weights, self.rope.rotate_every(averages, 0, self.block))


class BlockSparseAttention(GatedAttention):
    """Gated attention of each query to the ``budget`` tokens of the blocks with the best scores.

    Keys and values of all tokens stay in the cache, and a raw index key for each. The tokens after
    the last complete block are always attended to.

    Args:
        indexer: scores of blocks.
        budget: tokens of the blocks that a query chooses.
    """

    def __init__(
        self, c: DecoderConfig, indexer: BlockIndexer, budget: Size, **options: Any
    ) -> None:
        super().__init__(c, **options)
        self.indexer = indexer
        self.index_topk = budget
        self.pools = Pools(indexer.block, budget // indexer.block)

    def index_tokens(
        self, x: mx.array, context: ForwardContext
    ) -> tuple[list[mx.array], list[mx.array]]:
        keys, queries = self.indexer.project(x, context.offset)
        return [keys], [queries]

    def attend(
        self,
        q: mx.array,
        k: KVArray,
        v: KVArray,
        mask: Mask,
        context: ForwardContext,
        *index: Any,
    ) -> mx.array:
        keys, queries = index
        total = k.shape[2]
        if self.pools.is_dense(total):
            return super().attend(q, k, v, mask, context)
        scores = self.indexer.score(queries, keys, context.padding)
        if mask is None and isinstance(k, mx.array) and isinstance(v, mx.array):
            k, v = gather_pools((k, v), scores, self.pools)
        else:
            complete = complete_pools(context, self.pools.size)
            chosen = choose_pools(scores, complete, self.pools)
            visible = visible_keys(mask, q.shape[2], total)
            mask = chosen_tokens(chosen, complete, visible, self.pools.size, context, total)
        return super().attend(q, k, v, mask, context)
