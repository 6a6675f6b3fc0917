"""Seed-OSS (ByteDance, 2025).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: Llama's decoder with biases on queries, keys and values; heads whose width is not
hidden_size / heads; a context of 512k tokens by the RoPE base alone.
Source: ByteDance-Seed/Seed-OSS-36B-Instruct/config.json; transformers' SeedOssModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

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


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; the keys of dropout matter in training only."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = True
    attention_out_bias: bool = False
    mlp_bias: bool = False


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(
            c,
            rope=RoPE(c.head_size, c.rope),
            bias=c.attention_bias,
            output_bias=c.attention_out_bias,
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu, c.mlp_bias)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)
