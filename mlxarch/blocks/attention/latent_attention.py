"""Multi-head latent attention: all heads get keys and values from one cached latent per token."""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention.attention import attend
from mlxarch.blocks.attention.blockwise import MIN_BLOCK_KEYS, KVOperand, Mask
from mlxarch.blocks.attention.bounded_eval import eval_two_in_flight
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.attention.latent_config import LatentConfig
from mlxarch.blocks.attention.span import Latent
from mlxarch.blocks.linear import FusableProjections, Linear
from mlxarch.blocks.norms import RMSNorm
from mlxarch.blocks.per_head_linear import PerHeadLinear
from mlxarch.blocks.rope import NoRoPE, RoPE
from mlxarch.kv_cache import Cache, KVArray, UpProjectedLatents, by_row
from mlxarch.quantization.scheme import Quantization

MAX_SCORES = 2**25  # computed at once, 128 MB in float32; at least those of one head
EPS = 1e-6  # of the inner norms, not rms_norm_eps: default of transformers' DeepseekV3RMSNorm


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434 section 2.1), in two equivalent forms.

    Each pass uses the cheaper form. Absorbed: queries are projected into the latent space, where
    all heads share one key, which is the cache as it is. Expanded: the latents are projected up to
    the keys and values of every head, which pays off for many queries. Both process as many heads
    at a time as keep the scores below ``MAX_SCORES``; no array ever has the size heads x length x
    context.

    Shape:
        x: (B, L, hidden_size) -> the same. The query of a head has N features without a position
        (nope) and R features with RoPE; V below is v_head_dim.
    """

    def __init__(self, c: LatentConfig, rope: RoPE | NoRoPE) -> None:
        super().__init__()
        q_width = c.num_attention_heads * c.head_size
        bias = c.attention_bias
        if c.q_lora_rank is None:
            self.q_proj = first = Linear(c.hidden_size, q_width)
        else:
            self.q_a_proj = first = Linear(c.hidden_size, c.q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, EPS)
            self.q_b_proj = Linear(c.q_lora_rank, q_width)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, EPS)
        self.make_up_projections(c)
        self.o_proj = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, bias)
        self.q_kv = FusableProjections(first, self.kv_a_proj_with_mqa)
        self.c = c
        self.rope = rope
        self.span = Latent()
        self.scale = c.score_scale

    def make_up_projections(self, c: LatentConfig) -> None:
        """Create the parameters of the next three methods; a subclass may store others."""
        self.embed_q = PerHeadLinear(c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim)
        self.unembed_out = PerHeadLinear(c.num_attention_heads, c.v_head_dim, c.kv_lora_rank)

    def queries_to_latent(self, q_nope: mx.array, heads: slice) -> mx.array:
        """Project queries of h ``heads`` into the latent space: (B, h, L, N) -> (B, h, L, rank)."""
        return self.embed_q(q_nope, heads)

    def latents_to_keys(self, latents: mx.array, heads: slice) -> mx.array:
        """Project latents up to keys: (B, 1, S, rank) -> (B, h, S, N)."""
        return self.embed_q(latents, heads, transpose=False)

    def latents_to_values(self, latents: mx.array, heads: slice) -> mx.array:
        """Project latents up to values: (B, 1 or h, S, rank) -> (B, h, S, V)."""
        return self.unembed_out(latents, heads)

    def index_tokens(
        self, x: mx.array, q_latents: mx.array, context: ForwardContext
    ) -> tuple[list[mx.array], list[Any]]:
        """Compute what a subclass needs to choose keys.

        Args:
            x: inputs of the layer (B, L, hidden_size).
            q_latents: normalised latents of the queries (B, L, q_lora_rank).

        Returns:
            Vectors (B, 1, L, …) to be cached, such as index keys, and further arguments of
            ``attend``; nothing here.
        """
        return [], []

    def scale_queries(self, q: mx.array, context: ForwardContext) -> mx.array:
        """Scale queries (B, H, L, N + R) by their positions; a subclass may."""
        return q

    def gate_heads(self, out: mx.array, x: mx.array) -> mx.array:
        """Gate the outputs (B, L, H, V) by the inputs (B, L, hidden_size); a subclass may."""
        return out

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        """Create an empty cache of latents."""
        return self.span.make_cache(capacity, kv)

    def absorbed(
        self,
        q_nope: mx.array,
        q_rope: mx.array,
        latent_keys: KVArray,
        latents: KVArray,
        mask: Mask,
        heads: slice,
    ) -> mx.array:
        """Attend in the latent space.

        Args:
            heads: the h heads to which the queries belong.

        Shape:
            q_nope (B, h, L, N), q_rope (B, h, L, R), latent_keys (B, 1, S, rank + R) and their first
            features, latents (B, 1, S, rank) -> (B, h, L, V)
        """
        q = mx.concatenate([self.queries_to_latent(q_nope, heads), q_rope], axis=-1)
        one_token = q.shape[2] == 1
        if one_token:  # all heads attend to the same keys: their queries become rows of one product
            q = q.swapaxes(1, 2)
        out = attend(q, latent_keys, latents, mask, scale=self.scale)
        if one_token:
            out = out.swapaxes(1, 2)
        return self.latents_to_values(out, heads)

    def expanded(
        self,
        q_nope: mx.array,
        q_rope: mx.array,
        latent_keys: KVArray,
        latents: KVArray,
        mask: Mask,
        heads: slice,
    ) -> mx.array:
        """Attend over keys and values of every head; arguments and shapes as in ``absorbed``."""
        q = mx.concatenate([q_nope, q_rope], axis=-1)

        def to_keys(latent_keys: mx.array) -> mx.array:
            # (B, 1, S, rank), (B, 1, S, R)
            latents, rope_key = mx.split(latent_keys, [self.c.kv_lora_rank], axis=-1)
            k = self.latents_to_keys(latents, heads)
            shape = (*k.shape[:-1], rope_key.shape[-1])
            return mx.concatenate([k, mx.broadcast_to(rope_key, shape)], axis=-1)

        k: KVOperand
        v: KVOperand
        to_values = partial(self.latents_to_values, heads=heads)
        if isinstance(latent_keys, mx.array):
            k = to_keys(latent_keys)
        else:
            k = UpProjectedLatents(latent_keys, q.shape[1], q.shape[-1], to_keys)
        if isinstance(latents, mx.array):
            v = to_values(latents)
        else:
            v = UpProjectedLatents(latents, q.shape[1], self.c.v_head_dim, to_values)
        return attend(q, k, v, mask, scale=self.scale)

    def attend(
        self,
        q_nope: mx.array,
        q_rope: mx.array,
        latent_keys: KVArray,
        latents: KVArray,
        mask: Mask,
        *index: Any,
    ) -> mx.array:
        """Attend with all heads, in the cheaper form; shapes as in ``absorbed``.

        Args:
            index: cached vectors of all tokens and further arguments from ``index_tokens``.
        """
        batch, heads, length, nope = q_nope.shape
        keys_total = latent_keys.shape[2]
        rank = self.c.kv_lora_rank
        head_features = nope + self.c.v_head_dim
        # multiplications: scores and sums over longer vectors, or up-projection of older tokens
        absorbed_cost = length * keys_total * (2 * rank - head_features)
        expanded_cost = (keys_total - length) * rank * head_features
        form = self.absorbed if absorbed_cost < expanded_cost else self.expanded
        block = keys_total if isinstance(latent_keys, mx.array) else min(keys_total, MIN_BLOCK_KEYS)
        heads_at_once = max(MAX_SCORES // (batch * length * block), 1)
        outs: list[mx.array] = []
        for first in range(0, heads, heads_at_once):
            part = slice(first, first + heads_at_once)
            outs.append(form(q_nope[:, part], q_rope[:, part], latent_keys, latents, mask, part))
            if heads_at_once < heads:  # otherwise the scores of all heads might exist at once
                outs[-1:] = eval_two_in_flight(outs[-1:], outs[-2:-1] or [q_nope])
        return mx.concatenate(outs, axis=1)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        q, kv = self.q_kv(x)
        cached: list[Any] = []
        index: list[Any] = []
        if "q_b_proj" in self:
            q_latents = self.q_a_layernorm(q)
            q = self.q_b_proj(q_latents)
            cached, index = self.index_tokens(x, q_latents, context)
        q = mx.unflatten(q, -1, (-1, self.c.head_size)).swapaxes(1, 2)  # (B, H, L, N + R)
        q = self.scale_queries(q, context)
        q_nope, q_rope = mx.split(q, [self.c.qk_nope_head_dim], axis=-1)
        # (B, 1, L, rank), (B, 1, L, R)
        latents, rope_key = mx.split(kv[:, None], [self.c.kv_lora_rank], axis=-1)
        latents = self.kv_a_layernorm(latents)
        rope_key = self.rope(rope_key, context.offset)
        latent_keys: KVArray = mx.concatenate([latents, rope_key], axis=-1)
        mask = context.mask(self.span, cache)  # before the new keys are appended to the cache
        if cache is not None:
            latent_keys, latents, *cached = cache.append(latent_keys, latents, *cached)
        q_rope = self.rope(q_rope, context.offset)
        out = by_row(self.attend, q_nope, q_rope, latent_keys, latents, mask, *cached, *index)
        return self.o_proj(self.gate_heads(out.swapaxes(1, 2), x).flatten(-2))
