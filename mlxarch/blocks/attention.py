"""Attention: heads, groups, and how far back a token may look."""

from collections.abc import Callable
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.config import DecoderConfig
from mlxarch.blocks.linear import Linear, SharedInput
from mlxarch.blocks.rope import NoRoPE, RoPE
from mlxarch.blocks.span import Full, Span
from mlxarch.blocks.step import Step
from mlxarch.cache import Cache


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245); multi-head when there are as many KV heads as heads.

    Args:
        rope: turns queries and keys by their position.
        span: how far back a token may look.
        scale: multiplies the scores; 1/sqrt(head size) unless given.
        norm: makes a QK-norm of the given width; None leaves queries and keys as they are.
        qk_norm: "head" normalises each head by itself, "projection" all heads as one vector.

    Shape:
        x: (B, L, hidden_size) -> the same
    """

    def __init__(
        self,
        c: DecoderConfig,
        *,
        rope: RoPE | NoRoPE,
        span: Span = Full(),
        scale: float | None = None,
        norm: Callable[[int], nn.Module] | None = None,
        qk_norm: Literal["head", "projection"] = "head",
        bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        super().__init__()
        size, queries, keys = c.head_size, c.num_attention_heads * c.head_size, c.kv_heads * c.head_size
        self.q_proj = Linear(c.hidden_size, queries, bias)
        self.k_proj, self.v_proj = Linear(c.hidden_size, keys, bias), Linear(c.hidden_size, keys, bias)
        self.o_proj = Linear(queries, c.hidden_size, output_bias)
        self.qkv = SharedInput(self.q_proj, self.k_proj, self.v_proj)
        if norm is not None:
            self.q_norm = norm(size if qk_norm == "head" else queries)
            self.k_norm = norm(size if qk_norm == "head" else keys)
        self.head_size, self.scale, self.span, self.rope = size, scale or size**-0.5, span, rope
        self.qk_norm = qk_norm if norm else None

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        q, k, v = self.qkv(x)  # (B, L, heads * D)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (mx.unflatten(t, -1, (-1, self.head_size)) for t in (q, k, v))  # (B, L, heads, D)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.swapaxes(1, 2) for t in (q, k, v))  # (B, heads, L, D)
        q, k = self.rope(q, step.offset), self.rope(k, step.offset)

        mask = step.mask(self.span, cache)  # before the cache takes the new keys
        if cache is not None:
            k, v = cache.append(k, v)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
        return self.o_proj(out.swapaxes(1, 2).flatten(-2))
