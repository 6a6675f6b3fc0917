"""Hunyuan dense (Tencent, 2025), also Hunyuan-MT.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: QK-norm on every head after RoPE instead of before it; a RoPE base that is stretched by a
fixed factor.
Source: tencent/Hunyuan-7B-Instruct/config.json; transformers' HunYuanDenseV1Model.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    DecoderConfig,
    ForwardContext,
    GatedMLP,
    RMSNorm,
    RoPE,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.weight_mapping import Rename


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; with another scaling than a fixed ``alpha`` it is refused."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    use_qk_norm: Literal[True] = True


class NormedAfterRoPE(Attention):
    """Attention with a norm of queries and keys after RoPE."""

    def __init__(self, c: Config, **options: Any) -> None:
        super().__init__(c, norm=partial(RMSNorm, eps=c.rms_norm_eps), **options)
        self.qk_norm = None  # not before RoPE

    def apply_positions(
        self, q: mx.array, k: mx.array, context: ForwardContext
    ) -> tuple[mx.array, mx.array]:
        q, k = super().apply_positions(q, k, context)
        return self.q_norm(q), self.k_norm(k)


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        bias = c.attention_bias
        rope = RoPE(c.head_size, c.rope)
        self.self_attn = NormedAfterRoPE(c, rope=rope, bias=bias, output_bias=bias)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)

WEIGHTS = (
    Rename(r"\.query_layernorm\.", ".q_norm."),
    Rename(r"\.key_layernorm\.", ".k_norm."),
)
SAVED = (
    Rename(r"\.q_norm\.", ".query_layernorm."),
    Rename(r"\.k_norm\.", ".key_layernorm."),
)
