"""Multi-head latent attention: the cache holds one short vector a token, and every head reads it in its own way."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention import attend
from mlxarch.blocks.head_linear import HeadLinear
from mlxarch.blocks.latent_config import LatentConfig
from mlxarch.blocks.linear import Linear, SharedInput
from mlxarch.blocks.norms import RMSNorm
from mlxarch.blocks.pace import two_under_way
from mlxarch.blocks.rope import RoPE
from mlxarch.blocks.scores import LEAST, Mask
from mlxarch.blocks.span import Latent
from mlxarch.blocks.step import Step
from mlxarch.cache import Cache, Held, Made
from mlxarch.packing import Quantization

SCORES = 2**25  # that one step computes, 128 MB in float32; those of one head at least
EPS = 1e-6  # of the inner norms, whatever rms_norm_eps says: the default of transformers' DeepseekV3RMSNorm


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434 section 2.1), in whichever of two equal forms costs less.

    Absorbed: the queries go into the latent space, where all heads share one key, the cache as it is. Expanded: keys
    and values of every head come out of the latents, for many queries to share. Either works on so many heads at a
    time that their scores fit ``SCORES``: nothing ever has the size heads x length x context.

    Shape:
        x: (B, L, hidden_size) -> the same. A head's query has N features without a position and R that RoPE turns.
    """

    def __init__(self, c: LatentConfig, rope: RoPE) -> None:
        super().__init__()
        queries, bias = c.num_attention_heads * c.head_size, c.attention_bias
        if c.q_lora_rank is None:
            self.q_proj = first = Linear(c.hidden_size, queries)
        else:
            self.q_a_proj = first = Linear(c.hidden_size, c.q_lora_rank, bias)
            self.q_a_layernorm, self.q_b_proj = RMSNorm(c.q_lora_rank, EPS), Linear(c.q_lora_rank, queries)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, EPS)
        self.make_head_matrices(c)
        self.o_proj = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, bias)
        self.q_kv = SharedInput(first, self.kv_a_proj_with_mqa)
        self.c, self.rope, self.span, self.scale = c, rope, Latent(), c.score_scale

    def make_head_matrices(self, c: LatentConfig) -> None:
        """The parameters behind the three methods that follow; a subclass may hold them otherwise."""
        self.embed_q = HeadLinear(c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim)
        self.unembed_out = HeadLinear(c.num_attention_heads, c.v_head_dim, c.kv_lora_rank)

    def to_latent(self, q: mx.array, heads: slice) -> mx.array:
        """Queries (B, h, L, N) -> (B, h, L, rank)."""
        return self.embed_q(q, heads)

    def to_keys(self, latents: mx.array, heads: slice) -> mx.array:
        """Latents (B, 1, S, rank) -> (B, h, S, N)."""
        return self.embed_q(latents, heads, transpose=False)

    def to_values(self, latents: mx.array, heads: slice) -> mx.array:
        """Latents (B, 1 or h, S, rank) -> (B, h, S, v_head_dim)."""
        return self.unembed_out(latents, heads)

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        return self.span.make_cache(capacity, kv)

    def absorbed(self, q: mx.array, turned: mx.array, held: Held, latents: Held, mask: Mask, heads: slice) -> mx.array:
        """q (B, h, L, N), turned (B, h, L, R) over held (B, 1, S, rank + R), latents the first of it, -> (B, h, L, V).

        V is v_head_dim here.
        """
        q = mx.concatenate([self.to_latent(q, heads), turned], axis=-1)
        # all heads see the same keys: of one token, they are the rows of one product
        flip = (lambda x: x.swapaxes(1, 2)) if q.shape[2] == 1 else (lambda x: x)
        return self.to_values(flip(attend(flip(q), held, latents, mask, scale=self.scale)), heads)

    def expanded(self, q: mx.array, turned: mx.array, held: Held, latents: Held, mask: Mask, heads: slice) -> mx.array:
        """As ``absorbed``."""
        q, sizes = mx.concatenate([q, turned], axis=-1), (q.shape[-1] + turned.shape[-1], self.c.v_head_dim)

        def keys(held: mx.array) -> mx.array:
            latents, shared = mx.split(held, [self.c.kv_lora_rank], axis=-1)  # (B, 1, S, rank), (B, 1, S, R)
            k = self.to_keys(latents, heads)
            return mx.concatenate([k, mx.broadcast_to(shared, (*k.shape[:-1], shared.shape[-1]))], axis=-1)

        makers = (held, sizes[0], keys), (latents, sizes[1], partial(self.to_values, heads=heads))
        k, v = (make(x) if isinstance(x, mx.array) else Made(x, q.shape[1], size, make) for x, size, make in makers)
        return attend(q, k, v, mask, scale=self.scale)

    def attend(self, q: mx.array, turned: mx.array, held: Held, latents: Held, mask: Mask) -> mx.array:
        """As ``absorbed``, for all heads."""
        batch, heads, length, plain = q.shape
        context, rank, both = held.shape[2], self.c.kv_lora_rank, plain + self.c.v_head_dim
        # multiplications: scores and sums over wider vectors, against the making of the older tokens' keys and values
        wider, making = length * context * (2 * rank - both), (context - length) * rank * both
        form = self.absorbed if wider < making else self.expanded
        at_once = context if isinstance(held, mx.array) else min(context, LEAST)
        some, outs = max(SCORES // (batch * length * at_once), 1), []
        for part in (slice(first, first + some) for first in range(0, heads, some)):
            outs.append(form(q[:, part], turned[:, part], held, latents, mask, part))
            if some < heads:  # two parts are under way at a time, or the scores of all would be there at once
                outs[-1:] = two_under_way(outs[-1:], outs[-2:-1] or [q])
        return mx.concatenate(outs, axis=1)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        q, kv = self.q_kv(x)
        q = self.q_b_proj(self.q_a_layernorm(q)) if "q_b_proj" in self else q
        q = mx.unflatten(q, -1, (-1, self.c.head_size)).swapaxes(1, 2)  # (B, H, L, N + R)
        q, turned = mx.split(q, [self.c.qk_nope_head_dim], axis=-1)
        latents, key = mx.split(kv[:, None], [self.c.kv_lora_rank], axis=-1)  # (B, 1, L, rank), (B, 1, L, R)
        latents, key = self.kv_a_layernorm(latents), self.rope(key, step.offset)
        held, mask = mx.concatenate([latents, key], axis=-1), step.mask(self.span, cache)  # before the cache takes it
        if cache is not None:
            held, latents = cache.append(held, latents)
        out = self.attend(q, self.rope(turned, step.offset), held, latents, mask)
        return self.o_proj(out.swapaxes(1, 2).flatten(-2))
