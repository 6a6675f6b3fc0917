"""Multi-head latent attention to the tokens that an indexer chooses (DeepSeek Sparse Attention)."""

from typing import Any

import mlx.core as mx

from mlxarch.blocks.attention.blockwise import Mask
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.attention.latent_attention import LatentAttention
from mlxarch.blocks.rope import RoPE
from mlxarch.blocks.sparse.lightning_indexer import IndexedLatentConfig, LightningIndexer
from mlxarch.blocks.sparse.selection import (
    chosen_mask,
    gather_chosen,
    index_scores,
    top_keys,
    visible_keys,
)
from mlxarch.kv_cache import KVArray

CHOSEN = "chosen keys"  # of the last layer that chose some, in ``ForwardContext.shared``


class SparseLatentAttention(LatentAttention):
    """Latent attention of each query to the ``index_topk`` tokens with the highest index scores.

    The latents of all tokens stay in the cache, and an index key for each. Up to ``index_topk``
    tokens attention is dense. A single query reads the chosen latents only; several have a mask.

    Args:
        rope: position embedding of queries and keys.
        index_rope: that of the indexer.
        shares_choice: whether the layer has no indexer and attends to the tokens that the last
            layer with one chose.
    """

    def __init__(
        self, c: IndexedLatentConfig, rope: RoPE, index_rope: RoPE, shares_choice: bool = False
    ) -> None:
        super().__init__(c, rope)
        self.index_topk = c.index_topk
        if not shares_choice:
            self.indexer = LightningIndexer(c, index_rope)

    def index_tokens(
        self, x: mx.array, q_latents: mx.array, context: ForwardContext
    ) -> tuple[list[mx.array], list[Any]]:
        if "indexer" not in self:
            return [], [context.by_row]
        keys, queries, weights = self.indexer(x, q_latents, context.offset)
        return [keys], [queries, weights, context.by_row]

    def attend(
        self,
        q_nope: mx.array,
        q_rope: mx.array,
        latent_keys: KVArray,
        latents: KVArray,
        mask: Mask,
        *index: Any,
    ) -> mx.array:
        length = q_nope.shape[2]
        total = latent_keys.shape[2]
        if total <= self.index_topk:
            return super().attend(q_nope, q_rope, latent_keys, latents, mask)
        *own, context = index
        visible = visible_keys(mask, length, total)
        if own:
            keys, queries, weights = own
            scores = index_scores(queries, weights, keys)
            context.shared[CHOSEN] = top_keys(scores, visible, self.index_topk)
        chosen = context.shared[CHOSEN]
        if length == 1 and isinstance(latent_keys, mx.array):
            latent_keys, mask = gather_chosen(latent_keys, chosen, visible)
            latents = latent_keys[..., : self.c.kv_lora_rank]
        else:
            mask = chosen_mask(chosen, visible, total)
        return super().attend(q_nope, q_rope, latent_keys, latents, mask)
