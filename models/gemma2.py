"""Gemma 2 (Google, 2024).

    x ─┬─ norm ─ attention, capped ─ norm ─ + ─┬─ norm ─ GeGLU ─ norm ─ + ─
       └──────────────────────────────────────┘  └───────────────────────┘

Stands out: soft caps (tanh) on attention scores and logits; norms before and after attention and
feed-forward, with weights centred at zero; sliding and full layers alternate; embeddings times
sqrt(hidden_size).
Source: arXiv:2408.00118; google/gemma-2-2b/config.json; transformers' Gemma2Config.
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
    Positive,
    RoPE,
    Size,
    ZeroCenteredRMSNorm,
    geglu,
)
from mlxarch.blocks.attention.layer_types import SlidingPatternConfig


@dataclass(frozen=True, kw_only=True)
class Config(SlidingPatternConfig):
    """Config; the head is tied by default, as in transformers' Gemma2Config."""

    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: bool = False
    query_pre_attn_scalar: Positive
    attn_logit_softcapping: Positive | None
    final_logit_softcapping: Positive | None
    sliding_window_pattern: Size = 2
    tie_word_embeddings: bool = True


class DecoderLayer(nn.Module):
    """Decoder layer with norms before and after attention and feed-forward."""

    residual_outputs = POST_NORM

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(
            c,
            rope=RoPE(c.head_size, c.rope),
            span=c.span(index),
            scale=c.query_pre_attn_scalar**-0.5,
            softcap=c.attn_logit_softcapping,
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, geglu)
        norm = partial(ZeroCenteredRMSNorm, c.hidden_size, c.rms_norm_eps)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        attention = self.self_attn(self.input_layernorm(x), context, cache)
        x = x + self.post_attention_layernorm(attention)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    norm = ZeroCenteredRMSNorm(c.hidden_size, c.rms_norm_eps)
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    return CausalLM(
        c, layers, norm, embed_scale=c.hidden_size**0.5, softcap=c.final_logit_softcapping
    )
