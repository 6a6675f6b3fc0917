"""Attention: heads, groups, and how far back a token may look."""

from collections.abc import Callable
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.config import DecoderConfig
from mlxarch.blocks.linear import Linear, SharedInput
from mlxarch.blocks.rope import NoRoPE, RoPE
from mlxarch.blocks.scores import Mask, Vectors, attend_by_scores
from mlxarch.blocks.span import Full, Span
from mlxarch.blocks.step import Step
from mlxarch.cache import Cache, Held
from mlxarch.packing import Quantization


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245); multi-head when there are as many KV heads as heads.

    An architecture with a trick of its own overrides ``turn`` (how positions enter) or ``attend`` (what scores are).

    Args:
        rope: turns queries and keys by their position.
        span: how far back a token may look.
        scale: multiplies the scores; 1/sqrt(head size) unless given.
        norm: makes a QK-norm of the given width; None leaves queries and keys as they are.
        qk_norm: "head" normalises each head by itself, "projection" all heads as one vector.
        sinks: one learned logit a head joins the softmax and takes no value (arXiv:2309.17453).
        softcap: scores become softcap * tanh(scores / softcap), before the mask (arXiv:2408.00118).

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
        sinks: bool = False,
        softcap: float | None = None,
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
        if sinks:
            self.sinks = mx.zeros((c.num_attention_heads,))
        self.head_size, self.scale, self.span, self.rope = size, size**-0.5 if scale is None else scale, span, rope
        self.qk_norm, self.softcap = qk_norm if norm else None, softcap

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache | None:
        """An empty cache for this layer."""
        return self.span.make_cache(capacity, kv)

    def turn(self, q: mx.array, k: mx.array, step: Step) -> tuple[mx.array, mx.array]:
        """Let the positions in: q (B, H, L, D), k (B, K, L, D) -> the same."""
        return self.rope(q, step.offset), self.rope(k, step.offset)

    def attend(self, q: mx.array, k: Held, v: Held, mask: Mask, step: Step) -> mx.array:
        """q (B, H, L, D) over k, v (B, K, S, D) -> (B, H, L, D)."""
        cap, sinks = self.softcap, self.get("sinks")
        if cap is None:
            return attend(q, k, v, mask, scale=self.scale, sinks=sinks)
        return attend_by_scores(q, k, v, mask, lambda scores: cap * mx.tanh(scores * (self.scale / cap)), sinks)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        q, k, v = self.qkv(x)  # (B, L, heads * D)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (mx.unflatten(t, -1, (-1, self.head_size)) for t in (q, k, v))  # (B, L, heads, D)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.swapaxes(1, 2) for t in (q, k, v))  # (B, heads, L, D)
        q, k = self.turn(q, k, step)
        mask = step.mask(self.span, cache)  # before the cache takes the new keys
        if cache is not None:
            k, v = cache.append(k, v)
        out = self.attend(q, k, v, mask, step)
        return self.o_proj(out.swapaxes(1, 2).flatten(-2))


def attend(q: mx.array, k: Vectors, v: Vectors, mask: Mask, *, scale: float, sinks: mx.array | None = None) -> mx.array:
    """q (B, H, L, D) over k, v (B, K, S, D) -> (B, H, L, D), by the fused kernel where nothing is packed."""
    if isinstance(k, mx.array) and isinstance(v, mx.array):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
    return attend_by_scores(q, k, v, mask, lambda scores: scores * scale, sinks)
