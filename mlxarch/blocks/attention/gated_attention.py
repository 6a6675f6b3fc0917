"""Attention whose heads' outputs are gated."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxarch.blocks.attention.attention import Attention
from mlxarch.blocks.config import DecoderConfig
from mlxarch.blocks.linear import ExactLinear, FusableProjections, Linear


class GatedAttention(Attention):
    """Grouped-query attention times a sigmoid gate for every feature (arXiv:2505.06708).

    For every head, the query projection computes its query and then its gate.
    """

    def __init__(self, c: DecoderConfig, *, bias: bool = False, **options: Any) -> None:
        super().__init__(c, bias=bias, **options)
        self.q_proj = Linear(c.hidden_size, 2 * c.num_attention_heads * c.head_size, bias)
        self.qkv = FusableProjections(self.q_proj, self.k_proj, self.v_proj)

    def project(self, x: mx.array) -> list[mx.array]:
        both, k, v = self.qkv(x)
        both = mx.unflatten(both, -1, (-1, 2 * self.head_size))  # (B, L, H, 2 D)
        q, gate = mx.split(both, 2, axis=-1)
        return [q.flatten(-2), k, v, gate.flatten(-2)]

    def gate_output(self, out: mx.array, *gates: mx.array) -> mx.array:
        return out * mx.sigmoid(gates[0])


class HeadGatedAttention(Attention):
    """Grouped-query attention times a function of a projection of its own, for each head.

    Args:
        activation: function of the projection.
        gate_size: 1, or the features of a head, for one gate for each feature.
    """

    def __init__(
        self,
        c: DecoderConfig,
        *,
        activation: Callable[[mx.array], mx.array],
        gate_size: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(c, **options)
        self.g_proj = ExactLinear(c.hidden_size, c.num_attention_heads * gate_size)
        self.activation = activation

    def project(self, x: mx.array) -> list[mx.array]:
        gate = self.activation(self.g_proj(x).astype(mx.float32))
        return [*self.qkv(x), gate.astype(x.dtype)]

    def gate_output(self, out: mx.array, *gates: mx.array) -> mx.array:
        heads = mx.unflatten(out, -1, (-1, self.head_size))  # (B, L, H, D)
        gate = mx.unflatten(gates[0], -1, (heads.shape[2], -1))  # (B, L, H, 1 or D)
        return (heads * gate).flatten(-2)
