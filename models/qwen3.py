"""Qwen3 dense (Alibaba, 2025).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: QK-norm on every head before RoPE; heads wider than hidden_size / heads; no biases.
Source: arXiv:2505.09388; Qwen/Qwen3-0.6B/config.json.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Attention, Cache, CausalLM, DecoderConfig, GatedMLP, RMSNorm, RoPE, Step, swiglu


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """``sliding_window`` stands in the published files and is off: use_sliding_window is false."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    use_sliding_window: Literal[False] = False
    sliding_window: int | None = None


class DecoderLayer(nn.Module):
    """Norm before attention and before the feed-forward."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        self.self_attn = Attention(
            c,
            rope=RoPE(c.head_size, c.rotation),
            norm=norm,
            qk_norm="head",
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), step, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def build(c: Config) -> CausalLM:
    """A model with the right shapes and no weights."""
    layers = [DecoderLayer(c) for _ in range(c.num_hidden_layers)]
    return CausalLM(c, layers, norm=RMSNorm(c.hidden_size, c.rms_norm_eps))
