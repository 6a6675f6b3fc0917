"""OLMo 2 (Ai2, 2024), also OLMo 3.

    x ─┬─ attention ─ norm ─ + ─┬─ SwiGLU ─ norm ─ + ─
       └──────────────────────┘  └─────────────────┘

Stands out: norms after attention and feed-forward, before the residual addition; QK-norm over the
whole projection. OLMo 3 has a sliding window in three of four layers, and YaRN in the others only.
Source: arXiv:2501.00656; config.json of allenai/OLMo-2-1124-7B and allenai/Olmo-3-1025-7B;
transformers' Olmo3Config.
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
    ForwardContext,
    GatedMLP,
    LayerTypesConfig,
    RMSNorm,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.rope import RoPE, RoPEConfig
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig):
    """Config; sliding window and layer types are OLMo 3's."""

    attention_bias: bool = False
    hidden_act: Literal["silu"] = "silu"

    def default_layer_type(self, index: int) -> Literal["sliding_attention", "full_attention"]:
        sliding = self.model_type == "olmo3" and (index + 1) % 4
        return "sliding_attention" if sliding else "full_attention"

    def rope_for(self, layer_type: str) -> RoPEConfig:
        found = super().rope_for(layer_type)
        if layer_type == "full_attention":
            return found
        own = (self.rope_parameters or {}).get(layer_type) or {}
        return self.complete_rope({"rope_theta": found.theta} | own)

    def check(self) -> None:
        super().check()
        if self.model_type == "olmo2" and self.sliding_window:
            raise ConfigError(
                f"config.json: OLMo 2 has no window, found sliding_window = {self.sliding_window}"
            )


class DecoderLayer(nn.Module):
    """Decoder layer with norms after attention and after the feed-forward."""

    residual_outputs = POST_NORM

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        rope = RoPE(c.head_size, c.rope_for(c.layer_type(index)))
        self.self_attn = Attention(
            c,
            rope=rope,
            span=c.span(index),
            norm=norm,
            qk_norm="projection",
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.post_attention_layernorm = norm(c.hidden_size)
        self.post_feedforward_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(x, context, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


build = causal_lm(DecoderLayer)
