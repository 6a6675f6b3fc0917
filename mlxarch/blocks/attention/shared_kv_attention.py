"""Attention whose last layers use the keys and values of earlier ones, as in the small Gemma models."""

from functools import partial
from typing import Any

import mlx.core as mx

from mlxarch.blocks.attention.attention import Attention
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.config import DecoderConfig
from mlxarch.blocks.linear import FusableProjections
from mlxarch.blocks.norms import RMSNorm
from mlxarch.kv_cache import Cache, by_row
from mlxarch.quantization.scheme import Quantization


class SharedKVAttention(Attention):
    """Attention with normalised values and unscaled scores; some layers have queries only.

    They use the keys, values and mask of the last layer with the same span that has its own;
    ``context.shared`` contains these by span.

    Args:
        shares_kv: whether the layer has queries only.
        values_are_keys: whether the values are the keys before their norm and RoPE.
    """

    def __init__(
        self,
        c: DecoderConfig,
        *,
        shares_kv: bool = False,
        values_are_keys: bool = False,
        **options: Any,
    ) -> None:
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        super().__init__(c, scale=1.0, norm=norm, **options)
        self.eps = c.rms_norm_eps
        self.shares_kv = shares_kv
        self.values_are_keys = values_are_keys
        if shares_kv:
            del self.k_proj, self.v_proj, self.k_norm, self.qkv
        elif values_are_keys:
            del self.v_proj
            self.qkv = FusableProjections(self.q_proj, self.k_proj)

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache | None:
        return None if self.shares_kv else super().make_cache(capacity, kv)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        projected = [self.q_proj(x)] if self.shares_kv else self.qkv(x)
        q, *own = (mx.unflatten(t, -1, (-1, self.head_size)) for t in projected)  # (B, L, heads, D)
        q = self.rope(self.q_norm(q).swapaxes(1, 2), context.offset)  # (B, H, L, D)
        if own:
            k = self.rope(self.k_norm(own[0]).swapaxes(1, 2), context.offset)  # (B, K, L, D)
            v = mx.fast.rms_norm(own[-1], None, self.eps).swapaxes(1, 2)
            mask = context.mask(self.span, cache)
            if cache is not None:
                k, v = cache.append(k, v)
            context.shared[self.span] = (k, v, mask)
        k, v, mask = context.shared[self.span]
        out = by_row(self.attend, q, k, v, mask, context.by_row)
        return self.o_proj(out.swapaxes(1, 2).flatten(-2))
