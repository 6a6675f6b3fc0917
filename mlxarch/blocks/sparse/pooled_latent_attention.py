"""Latent attention to pools of tokens that an indexer with learned averages of keys chooses."""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlxarch.blocks.attention.blockwise import Mask
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.attention.latent_attention import LatentAttention
from mlxarch.blocks.config import Size
from mlxarch.blocks.rope import NoRoPE
from mlxarch.blocks.sparse.lightning_indexer import IndexedLatentConfig, LightningIndexer
from mlxarch.blocks.sparse.pools import (
    Pools,
    choose_pools,
    chosen_tokens,
    complete_pools,
    gather_pools,
    pool_tokens,
)
from mlxarch.blocks.sparse.selection import index_scores, slice_tokens, visible_keys
from mlxarch.errors import ConfigError
from mlxarch.kv_cache import KVArray

SCORES = "scores of pools"  # of the last layer that computed some, in ``ForwardContext.shared``


@dataclass(frozen=True, kw_only=True)
class PooledLatentConfig(IndexedLatentConfig):
    """Config of a decoder whose latent attention reads the pools that an indexer chooses.

    Attributes:
        index_kpool: tokens of a pool.
        index_topk: tokens of the pools that a query chooses.
    """

    index_kpool: Size
    index_kpool_always_select_tail: Literal[True] = True

    def check(self) -> None:
        super().check()
        if self.index_topk % self.index_kpool:
            raise ConfigError(
                f"config.json: index_topk = {self.index_topk} must be a multiple of index_kpool = "
                f"{self.index_kpool}"
            )


class PoolIndexer(LightningIndexer):
    """Indexer without positions, whose keys are weighted averages over pools of tokens.

    The weights of the tokens of a pool are a softmax, for every feature, of a projection of the
    token plus a bias for its place in the pool.
    Source: transformers' Glm5NextTextIndexer.
    """

    def __init__(self, c: PooledLatentConfig) -> None:
        super().__init__(c, NoRoPE())
        self.index_kpool_compress_gate = mx.zeros((c.index_head_dim, c.hidden_size))
        self.index_kpool_compress_ape = mx.zeros((c.index_kpool, c.index_head_dim))

    def project_gates(self, x: mx.array) -> mx.array:
        """Logits of the weights of tokens: (B, L, hidden_size) -> (B, 1, L, D)."""
        return (x @ self["index_kpool_compress_gate"].T)[:, None]

    def score(
        self,
        q: mx.array,
        weights: mx.array,
        keys: KVArray,
        gates: KVArray,
        padding: mx.array | None,
    ) -> mx.array:
        """Scores of all pools (B, L, P), from keys and gates of tokens (B, 1, S, D)."""
        bias = self["index_kpool_compress_ape"].astype(mx.float32)
        pooled, logits = (
            pool_tokens(slice_tokens(t, 0, t.shape[2]), bias.shape[0], padding).astype(mx.float32)
            for t in (keys, gates)
        )  # (B, P, tokens, D)
        averages = (mx.softmax(logits + bias, axis=2) * pooled).sum(2)
        return index_scores(q, weights, averages[:, None])


class PooledLatentAttention(LatentAttention):
    """Latent attention without positions to the pools with the highest scores, and to the tail.

    Latents, index keys and gates of all tokens stay in the cache. Up to ``index_topk`` tokens
    attention is dense.

    Args:
        shares_choice: whether the layer has no indexer and takes the scores of the last layer
            with one.
    """

    def __init__(self, c: PooledLatentConfig, shares_choice: bool = False) -> None:
        super().__init__(c, NoRoPE())
        # unlike in other models with latents, the inner norms take the config's eps
        self.q_a_layernorm.eps = self.kv_a_layernorm.eps = c.rms_norm_eps
        self.index_topk = c.index_topk
        self.pools = Pools(c.index_kpool, c.index_topk // c.index_kpool)
        if not shares_choice:
            self.indexer = PoolIndexer(c)

    def index_tokens(
        self, x: mx.array, q_latents: mx.array, context: ForwardContext
    ) -> tuple[list[mx.array], list[Any]]:
        if "indexer" not in self:
            return [], [context.by_row]
        keys, queries, weights = self.indexer(x, q_latents, context.offset)
        return [keys, self.indexer.project_gates(x)], [queries, weights, context.by_row]

    def attend(
        self,
        q_nope: mx.array,
        q_rope: mx.array,
        latent_keys: KVArray,
        latents: KVArray,
        mask: Mask,
        *index: Any,
    ) -> mx.array:
        total = latent_keys.shape[2]
        if self.pools.is_dense(total):
            return super().attend(q_nope, q_rope, latent_keys, latents, mask)
        *own, context = index
        if own:
            keys, gates, queries, weights = own
            scores = self.indexer.score(queries, weights, keys, gates, context.padding)
            context.shared[SCORES] = scores
        scores = context.shared[SCORES]
        if mask is None and isinstance(latent_keys, mx.array):
            [latent_keys] = gather_pools((latent_keys,), scores, self.pools)
            latents = latent_keys[..., : self.c.kv_lora_rank]
        else:
            size = self.pools.size
            complete = complete_pools(context, size)
            chosen = choose_pools(scores, complete, self.pools)
            visible = visible_keys(mask, q_nope.shape[2], total)
            mask = chosen_tokens(chosen, complete, visible, size, context, total)
        return super().attend(q_nope, q_rope, latent_keys, latents, mask)
