"""Gemma 3 (Google, 2025), text decoder.

    x ─┬─ norm ─ attention ─ norm ─ + ─┬─ norm ─ GeGLU ─ norm ─ + ─
       └─────────────────────────────┘  └───────────────────────┘

Stands out: norms before and after attention and feed-forward, with weights centred at zero; five
sliding layers for each full one, both with their own RoPE base; QK-norm on every head; embeddings
times sqrt(hidden_size).
Source: arXiv:2503.19786; config.json of google/gemma-3-1b-it and google/gemma-3-27b-it;
transformers' Gemma3TextConfig.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    POST_NORM,
    Attention,
    Cache,
    CausalLM,
    ForwardContext,
    GatedMLP,
    Layers,
    LocalRoPEConfig,
    Positive,
    RoPE,
    Size,
    ZeroCenteredRMSNorm,
    geglu,
)


@dataclass(frozen=True, kw_only=True)
class Config(LocalRoPEConfig):
    """Config with the defaults of transformers' Gemma3TextConfig.

    The published files of 4B to 27B contain only the keys that differ from them.
    """

    vocab_size: Size = 262_208
    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Layers = 26
    num_attention_heads: Size = 8
    num_key_value_heads: Size | None = 4
    head_dim: Size | None = 256
    attention_bias: bool = False
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    max_position_embeddings: Size = 131_072
    query_pre_attn_scalar: Positive = 256
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive | None = 1_000_000.0
    rope_local_base_freq: Positive = 10_000.0
    sliding_window: Size | None = 4096
    sliding_window_pattern: Size = 6
    tie_word_embeddings: bool = True


class DecoderLayer(nn.Module):
    """Decoder layer with norms before and after attention and feed-forward."""

    residual_outputs = POST_NORM

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(ZeroCenteredRMSNorm, eps=c.rms_norm_eps)
        self.self_attn = Attention(
            c,
            rope=RoPE(c.head_size, c.rope_for(c.layer_type(index))),
            span=c.span(index),
            scale=c.query_pre_attn_scalar**-0.5,
            norm=norm,
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, geglu)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)
        self.pre_feedforward_layernorm = norm(c.hidden_size)
        self.post_feedforward_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        attention = self.self_attn(self.input_layernorm(x), context, cache)
        x = x + self.post_attention_layernorm(attention)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    return CausalLM(
        c,
        layers,
        ZeroCenteredRMSNorm(c.hidden_size, c.rms_norm_eps),
        embed_scale=c.hidden_size**0.5,
    )
