"""Llama 3 (Meta, 2024), also Llama 3.1 to 3.3, SmolLM2 and Mistral 7B.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: the plain pre-norm decoder that the others are told apart from; grouped-query attention, no biases;
from 3.1 on RoPE whose slow frequencies are stretched (rope type llama3). Mistral's first version
has a sliding window on every layer.
Source: arXiv:2407.21783; meta-llama/Llama-3.1-8B/config.json; mistralai/Mistral-7B-v0.1/config.json;
biases as in transformers' LlamaForCausalLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Attention, Cache, DecoderConfig, GatedMLP, Positive, RMSNorm, RoPE, Step, causal_lm, swiglu
from mlxarch.blocks.span import Full, Sliding


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Biases are the two options that some of its descendants switch on. Llama 1 and 2 were published without a
    ``rope_theta``, for which 10,000 stands in transformers' LlamaConfig.
    """

    rope_theta: Positive | None = 10_000.0
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """transformers' MistralConfig has a window of 4096 where a file does not speak of one."""
        mistral = {"sliding_window": 4096} if config.get("model_type") == "mistral" else {}
        return super().from_dict(mistral | dict(config))


class DecoderLayer(nn.Module):
    """Norm before attention and before the feed-forward."""

    attention: type[Attention] = Attention  # a descendant may have its own

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        self.self_attn = self.attention(
            c,
            rope=RoPE(c.head_size, c.rotation),
            span=Sliding(c.sliding_window) if c.sliding_window else Full(),
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu, c.mlp_bias)
        self.input_layernorm, self.post_attention_layernorm = norm(c.hidden_size), norm(c.hidden_size)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), step, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)
