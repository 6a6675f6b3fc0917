"""Grouped-query attention, the base of most architectures' attention."""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention.blockwise import KVOperand, Mask, attend_blockwise
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.attention.span import Full, Span
from mlxarch.blocks.config import DecoderConfig
from mlxarch.blocks.linear import FusableProjections, Linear
from mlxarch.blocks.norms import FusableHeadNorms, RMSNorm
from mlxarch.blocks.rope import NoRoPE, RoPE
from mlxarch.cpu_kernels import native
from mlxarch.kv_cache import Cache, FullCache, KVArray, by_row
from mlxarch.quantization.scheme import Quantization


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245); multi-head with as many KV heads as query heads.

    An architecture that deviates overrides ``apply_positions`` (how positions enter), ``attend``
    (how scores are computed), or ``project`` and ``gate_output`` (gates of the heads' outputs).

    Args:
        rope: position embedding of queries and keys.
        span: which earlier tokens a token attends to.
        scale: factor of the scores; 1/sqrt(head size) by default.
        norm: constructor of the QK-norm, called with its width; None for no QK-norm.
        qk_norm: "head" normalises each head separately, "projection" all heads as one vector.
        bias: whether the projections to queries, keys and values have biases.
        output_bias: whether the output projection has one.
        sinks: one learned logit per head joins the softmax without a value (arXiv:2309.17453).
        softcap: scores become softcap * tanh(scores / softcap), before the mask (arXiv:2408.00118).
        value_size: features of a head's values; head size by default.

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
        value_size: int | None = None,
    ) -> None:
        super().__init__()
        self.head_size = c.head_size
        self.value_size = value_size or c.head_size
        q_width = c.num_attention_heads * c.head_size
        kv_width = c.kv_heads * c.head_size
        out_width = c.num_attention_heads * self.value_size
        self.q_proj = Linear(c.hidden_size, q_width, bias)
        self.k_proj = Linear(c.hidden_size, kv_width, bias)
        self.v_proj = Linear(c.hidden_size, c.kv_heads * self.value_size, bias)
        self.o_proj = Linear(out_width, c.hidden_size, output_bias)
        self.qkv = FusableProjections(self.q_proj, self.k_proj, self.v_proj)
        if norm is not None:
            self.q_norm = norm(c.head_size if qk_norm == "head" else q_width)
            self.k_norm = norm(c.head_size if qk_norm == "head" else kv_width)
            if qk_norm == "head":
                self.head_norms = FusableHeadNorms(
                    (self.q_norm, c.num_attention_heads), (self.k_norm, c.kv_heads)
                )
        if sinks:
            self.sinks = mx.zeros((c.num_attention_heads,))
        self.scale = c.head_size**-0.5 if scale is None else scale
        self.span = span
        self.rope = rope
        self.qk_norm = qk_norm if norm else None
        self.softcap = softcap

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache | None:
        """Create an empty KV cache for this layer."""
        return self.span.make_cache(capacity, kv)

    def project(self, x: mx.array) -> list[mx.array]:
        """Compute queries, keys and values (B, L, heads * D), and the ``gates`` of the outputs."""
        return self.qkv(x)

    def gate_output(self, out: mx.array, *gates: mx.array) -> mx.array:
        """Gate the outputs of all heads: (B, L, H * D) -> the same."""
        return out

    def apply_positions(
        self, q: mx.array, k: mx.array, context: ForwardContext
    ) -> tuple[mx.array, mx.array]:
        """Encode positions in q (B, H, L, D) and k (B, K, L, D) -> the same."""
        return self.rope(q, context.offset), self.rope(k, context.offset)

    def index_tokens(
        self, x: mx.array, context: ForwardContext
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Compute what a subclass needs to choose keys.

        Args:
            x: inputs of the layer (B, L, hidden_size).

        Returns:
            Vectors (B, 1, L, …) to be cached, such as index keys, and further arguments of
            ``attend``; nothing here.
        """
        return [], []

    def attend(
        self,
        q: mx.array,
        k: KVArray,
        v: KVArray,
        mask: Mask,
        context: ForwardContext,
        *index: Any,
    ) -> mx.array:
        """Attend with q (B, H, L, D) to k, v (B, K, S, D) -> (B, H, L, D).

        Args:
            index: cached vectors of all tokens and further arguments from ``index_tokens``.
        """
        cap = self.softcap
        sinks = self.get("sinks")
        if cap is None:
            return attend(q, k, v, mask, scale=self.scale, sinks=sinks)
        return attend_blockwise(
            q, k, v, mask, lambda scores: cap * mx.tanh(scores * (self.scale / cap)), sinks
        )

    def heads(self, x: mx.array, context: ForwardContext) -> list[mx.array]:
        """Compute queries (B, H, L, D), keys (B, K, L, D), values (B, K, L, D), and ``gates``."""
        if x.shape[1] == 1 and self._can_join_heads:
            return self._joined_heads(x, context)
        q, k, v, *gates = self.project(x)  # (B, L, heads * D)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (mx.unflatten(t, -1, (-1, self.head_size)) for t in (q, k))  # (B, L, heads, D)
        v = mx.unflatten(v, -1, (-1, self.value_size))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.swapaxes(1, 2) for t in (q, k, v))  # (B, heads, L, D)
        return [*self.apply_positions(q, k, context), v, *gates]

    @property
    def _can_join_heads(self) -> bool:
        """Whether queries and keys can be one array up to the rotation: nothing is overridden."""
        kind = type(self)
        return (
            kind.project is Attention.project
            and kind.apply_positions is Attention.apply_positions
            and self.value_size == self.head_size
            and (self.qk_norm is None or (self.qk_norm == "head" and self.head_norms.is_fused))
            and self.qkv.is_fused
        )

    def _joined_heads(self, x: mx.array, context: ForwardContext) -> list[mx.array]:
        """``heads`` for one token a row, with a norm and a rotation for queries and keys together.

        For a few numbers the time of an operation is that of starting it.
        """
        y = mx.unflatten(self.qkv.joined(x), -1, (-1, self.head_size))  # (B, 1, H + 2 K, D)
        kv_heads = self.v_proj["weight"].shape[0] // self.head_size
        qk = self.head_norms(y) if self.qk_norm else y[:, :, :-kv_heads]
        qk = self.rope(qk.swapaxes(1, 2), context.offset)
        return [qk[:, :-kv_heads], qk[:, -kv_heads:], y[:, :, -kv_heads:].swapaxes(1, 2)]

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        out = self._attend_in_place(x, context, cache)
        if out is not None:
            return self.o_proj(out)
        q, k, v, *gates = self.heads(x, context)
        cached: list[Any]
        cached, index = self.index_tokens(x, context)
        mask = context.mask(self.span, cache)  # before the new keys are appended to the cache
        if cache is not None:
            k, v, *cached = cache.append(k, v, *cached)
        out = by_row(self.attend, q, k, v, mask, context.by_row, *cached, *index)
        return self.o_proj(self.gate_output(out.swapaxes(1, 2).flatten(-2), *gates))

    def _attend_in_place(
        self, x: mx.array, context: ForwardContext, cache: Cache | None
    ) -> mx.array | None:
        """Compute the outputs of the heads (B, L, H * D) with few operations, on a CPU with kernels.

        Norm and rotation are part of the operations that write keys and values into the cache and
        that attend. None where the kernels do not apply: a subclass computes something else, or the
        cache is not a plain one.
        """
        offset = context.offset
        if type(cache) is not FullCache or cache.kv or not isinstance(offset, int):
            return None
        if not native.is_used() or not self._is_plain or not self.qkv.is_fused:
            return None
        mask = context.mask(self.span, cache)
        if x.dtype != mx.float32 or isinstance(mask, mx.array):
            return None
        joined = self.qkv.joined(x)
        size = self.head_size
        kv_heads = self.k_proj["weight"].shape[0] // size
        heads = self.q_proj["weight"].shape[0] // size
        of_q, of_k = self._head_transforms(offset)

        def write(index: int, buffer: mx.array, slot: int) -> mx.array:
            start = (heads + index * kv_heads) * size
            return native.store(buffer, joined, start, slot, native.NO_TRANSFORM if index else of_k)

        batch, length, _ = x.shape
        k, v = cache.append_by((batch, kv_heads, length, size), write)
        return native.cached_attention(joined, k, v, heads, cache.length, self.scale, of_q)

    @property
    def _is_plain(self) -> bool:
        """Whether attention is that of this class, with positions and norms that kernels have."""
        return (
            _computes_as_attention(type(self))
            and self.softcap is None
            and "sinks" not in self
            and self.value_size == self.head_size
            and self.qk_norm != "projection"
            and ("k_norm" not in self or isinstance(self.k_norm, RMSNorm))
            and (type(self.rope) is NoRoPE or (type(self.rope) is RoPE and self.rope.factor == 1))
        )

    def _head_transforms(self, offset: int) -> tuple[native.HeadTransform, native.HeadTransform]:
        """Norm and rotation of the queries and of the keys, as arguments of the kernels."""
        transform = (
            self.rope.head_transform(offset) if isinstance(self.rope, RoPE) else native.NO_TRANSFORM
        )
        if "k_norm" not in self:
            return transform, transform
        norms = (self.q_norm, self.k_norm)
        of_q, of_k = (transform._replace(weight=norm.factor, eps=norm.eps) for norm in norms)
        return of_q, of_k


@cache
def _computes_as_attention(kind: type[Attention]) -> bool:
    """Whether a class overrides nothing that the kernels compute."""
    names = ("project", "gate_output", "apply_positions", "heads", "index_tokens", "attend")
    return all(getattr(kind, name) is getattr(Attention, name) for name in names)


def attend(
    q: mx.array,
    k: KVOperand,
    v: KVOperand,
    mask: Mask,
    *,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Scaled dot-product attention; uses MLX's fused kernel unless keys or values are quantized.

    Shape:
        q (B, H, L, D), k and v (B, K, S, D) -> (B, H, L, D)
    """
    if isinstance(k, mx.array) and isinstance(v, mx.array):
        out = native.attention(q, k, v, scale, mask, sinks)
        if out is not None:
            return out
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
    return attend_blockwise(q, k, v, mask, lambda scores: scores * scale, sinks)
