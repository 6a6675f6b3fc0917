"""Cohere 2 (Cohere, 2024): Command R7B and Command A.

    x ─┬─ norm ─┬─ attention ─ + ─ + ─
       │        └─ SwiGLU ─────┘   │
       └───────────────────────────┘

Stands out: attention and feed-forward in parallel behind one layer norm without bias; three sliding
layers with interleaved RoPE for each full one without positions (NoPE); scaled logits; tied
embeddings.
Source: CohereLabs/c4ai-command-r7b-12-2024/config.json; transformers' Cohere2Model.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    CausalLM,
    ForwardContext,
    GatedMLP,
    LayerNorm,
    NoRoPE,
    Positive,
    RoPE,
    Size,
    SlidingPatternConfig,
    swiglu,
)


@dataclass(frozen=True, kw_only=True)
class Config(SlidingPatternConfig):
    """Config; the epsilon belongs to layer norms."""

    aliases: ClassVar = {"layer_norm_eps": "rms_norm_eps"}

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    logit_scale: Positive
    sliding_window_pattern: Size = 4
    tie_word_embeddings: bool = True


class DecoderLayer(nn.Module):
    """Decoder layer whose attention and feed-forward see the same norm."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        sliding = c.layer_type(index) == "sliding_attention"
        self.self_attn = Attention(
            c,
            rope=RoPE(c.head_size, c.rope, interleaved=True) if sliding else NoRoPE(),
            span=c.span(index),
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = LayerNorm(c.hidden_size, c.rms_norm_eps, bias=False)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        y = self.input_layernorm(x)
        return x + self.self_attn(y, context, cache) + self.mlp(y)


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    norm = LayerNorm(c.hidden_size, c.rms_norm_eps, bias=False)
    return CausalLM(c, layers, norm, logit_scale=c.logit_scale)
