"""SmolLM3 (Hugging Face, 2025).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: no positions in every fourth layer (NoPE), full attention in all of them; tied
embeddings.
Source: HuggingFaceTB/SmolLM3-3B/config.json; transformers' SmolLM3Config; arXiv:2501.18795 (NoPE
among RoPE layers).
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
    NoRoPE,
    Positive,
    RMSNorm,
    RoPE,
    Size,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.attention.layer_types import LayerTypesConfig


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig):
    """Config; a 1 in ``no_rope_layers`` means that the layer has RoPE.

    The published file switches the sliding window off.
    """

    hidden_act: Literal["silu"] = "silu"
    rope_theta: Positive | None = 2_000_000.0
    no_rope_layers: tuple[Literal[0, 1], ...] | None = None
    no_rope_layer_interval: Size = 4
    use_sliding_window: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = True

    @property
    def window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    def has_rope(self, index: int) -> bool:
        """Whether the layer at ``index``, counted from 0, has RoPE."""
        listed = self.no_rope_layers
        return bool((index + 1) % self.no_rope_layer_interval if listed is None else listed[index])

    def default_layer_type(self, index: int) -> Literal["sliding_attention", "full_attention"]:
        return "sliding_attention" if self.window and not self.has_rope(index) else "full_attention"

    def check(self) -> None:
        self.check_length("no_rope_layers", self.no_rope_layers)
        super().check()


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        bias = c.attention_bias
        rope = RoPE(c.head_size, c.rope) if c.has_rope(index) else NoRoPE()
        self.self_attn = Attention(c, rope=rope, span=c.span(index), bias=bias, output_bias=bias)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu, c.mlp_bias)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)
