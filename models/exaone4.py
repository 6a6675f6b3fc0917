"""EXAONE 4 (LG AI Research, 2025).

    x ─┬─ attention ─ norm ─ + ─┬─ SwiGLU ─ norm ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: norms after attention and feed-forward, none before; QK-norm on every head; in the large
model three sliding layers for each full one, which has no positions (NoPE).
Source: arXiv:2507.11407; LGAI-EXAONE/EXAONE-4.0-32B/config.json and
LGAI-EXAONE/EXAONE-4.0-1.2B/config.json; transformers' Exaone4Model.
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
    NoRoPE,
    RMSNorm,
    RoPE,
    causal_lm,
    swiglu,
)


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig):
    """Config; the pattern is a string such as LLLG, or the number of layers that it repeats after."""

    hidden_act: Literal["silu"] = "silu"
    sliding_window_pattern: str | int | None = None

    def default_layer_type(self, index: int) -> Literal["sliding_attention", "full_attention"]:
        pattern = self.sliding_window_pattern
        count = len(pattern) if isinstance(pattern, str) else pattern
        if self.window is None or not count or (index + 1) % count == 0:
            return "full_attention"
        return "sliding_attention"

    def has_rope(self, index: int) -> bool:
        """Whether the layer at ``index`` has RoPE: all without windows, else the sliding ones."""
        return self.window is None or self.layer_type(index) == "sliding_attention"


class DecoderLayer(nn.Module):
    """Decoder layer with norms after attention and after the feed-forward."""

    residual_outputs = POST_NORM

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        rope = RoPE(c.head_size, c.rope) if c.has_rope(index) else NoRoPE()
        self.self_attn = Attention(c, rope=rope, span=c.span(index), norm=norm)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.post_attention_layernorm = norm(c.hidden_size)
        self.post_feedforward_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(x, context, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


build = causal_lm(DecoderLayer)
