"""Llama 3 (Meta, 2024), also Llama 3.1 to 3.3, SmolLM2 and Mistral 7B.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: the plain pre-norm decoder with which the others are compared; grouped-query attention,
no biases; from 3.1 on low RoPE frequencies are scaled (rope type llama3). Mistral's first version
has a sliding window in every layer.
Source: arXiv:2407.21783; config.json of meta-llama/Llama-3.1-8B and mistralai/Mistral-7B-v0.1;
biases as in transformers' LlamaForCausalLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    DecoderConfig,
    ForwardContext,
    GatedMLP,
    Positive,
    RMSNorm,
    RoPE,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.attention.span import Full, Sliding


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; some descendants have biases.

    Llama 1 and 2 were published without ``rope_theta``; transformers' LlamaConfig has 10,000.
    """

    rope_theta: Positive | None = 10_000.0
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Add the default window of transformers' MistralConfig, 4096, if a file has none."""
        mistral = {"sliding_window": 4096} if config.get("model_type") == "mistral" else {}
        return super().from_dict(mistral | dict(config))


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    attention: type[Attention] = Attention  # a subclass may have its own

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        self.self_attn = self.attention(
            c,
            rope=RoPE(c.head_size, c.rope),
            span=Sliding(c.sliding_window) if c.sliding_window else Full(),
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu, c.mlp_bias)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)
