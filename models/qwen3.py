"""Qwen3 dense (Alibaba, 2025), also Qwen2, Qwen2.5, and the text decoders of their VL models.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: QK-norm on every head before RoPE; heads wider than hidden_size / heads; no biases.
Qwen2 has biases on queries, keys and values instead of the QK-norm. For text the three-axis RoPE of
the VL models is plain RoPE.
Source: arXiv:2505.09388; arXiv:2407.10671; config.json of Qwen/Qwen3-0.6B and
Qwen/Qwen2.5-7B-Instruct.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    ForwardContext,
    GatedMLP,
    LayerTypesConfig,
    RMSNorm,
    RoPE,
    causal_lm,
    swiglu,
)
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig):
    """Config; layers from ``max_window_layers`` on have the sliding window.

    Published files give a window, and most of them switch it off.
    """

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    use_sliding_window: bool = False
    max_window_layers: int = 28

    @property
    def has_qkv_bias(self) -> bool:
        """Whether it is a Qwen2, with biases on queries, keys and values in place of QK-norm."""
        return self.model_type.startswith("qwen2")

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    def default_layer_type(self, index: int) -> Literal["sliding_attention", "full_attention"]:
        return (
            "sliding_attention"
            if self.window and index >= self.max_window_layers
            else "full_attention"
        )

    def check(self) -> None:
        super().check()
        if self.has_qkv_bias and self.attention_bias:
            raise ConfigError(
                "config.json: attention_bias = true is not Qwen2's, which has biases on q, k and v "
                "only"
            )


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        attention = partial(Attention, c, rope=RoPE(c.head_size, c.rope), span=c.span(index))
        if c.has_qkv_bias:
            self.self_attn = attention(bias=True)
        else:
            self.self_attn = attention(
                norm=norm, bias=c.attention_bias, output_bias=c.attention_bias
            )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)
