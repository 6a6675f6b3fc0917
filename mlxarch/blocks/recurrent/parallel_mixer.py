"""Token mixer in which Mamba-2 and attention read the same inputs."""

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention.attention import Attention
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.recurrent.mamba2 import Mamba2
from mlxarch.kv_cache import Cache, ParallelCache, StateCache
from mlxarch.quantization.scheme import Quantization


class ParallelMixer(nn.Module):
    """Weighted sum of Mamba-2 and attention.

    Args:
        attention_scales: factors of the inputs and the outputs of attention.
        mamba_scale: factor of the outputs of Mamba-2.

    Shape:
        x: (B, L, dim) -> the same
    """

    def __init__(
        self,
        mamba: Mamba2,
        self_attn: Attention,
        *,
        attention_scales: tuple[float, float],
        mamba_scale: float,
    ) -> None:
        super().__init__()
        self.mamba = mamba
        self.self_attn = self_attn
        self.span = self_attn.span
        self.rope = self_attn.rope
        self.head_size = self_attn.head_size
        self.kind = f"{mamba.kind} + attention"
        self.float32_states = mamba.float32_states
        self.attention_scales = attention_scales
        self.mamba_scale = mamba_scale

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        """Create an empty state, and an empty KV cache."""
        state = self.mamba.make_cache(capacity, kv)
        keys_values = self.self_attn.make_cache(capacity, kv)
        return ParallelCache(cast(StateCache, state), cast(Cache, keys_values))

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        state, keys_values = (None, None) if cache is None else cache.parts
        before, after = self.attention_scales
        mixed = self.mamba(x, context, state) * self.mamba_scale
        return mixed + self.self_attn(x * before, context, keys_values) * after
