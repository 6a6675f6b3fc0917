"""Phi-3 (Microsoft, 2024), also Phi-4.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: Llama's decoder, published with queries, keys and values in one matrix, and gate and up
in another; some have a sliding window. LongRoPE, which Phi-4 mini has, is refused.
Source: microsoft/phi-4/config.json and microsoft/Phi-3-mini-4k-instruct/config.json; transformers'
Phi3Model.
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
    Full,
    GatedMLP,
    RMSNorm,
    RoPE,
    Size,
    Sliding,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.config import PartialRoPEConfig
from mlxarch.blocks.weight_mapping import SplitRows, SplitSizes


@dataclass(frozen=True, kw_only=True)
class Config(PartialRoPEConfig):
    """Config; a window applies to all layers."""

    hidden_act: Literal["silu"] = "silu"
    sliding_window: Size | None = None

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values in their common matrix."""
        kv = self.kv_heads * self.head_size
        return self.num_attention_heads * self.head_size, kv, kv


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        span = Sliding(c.sliding_window) if c.sliding_window else Full()
        self.self_attn = Attention(c, rope=RoPE(c.rope_dims, c.rope), span=span)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)

WEIGHTS = (
    SplitSizes(
        r"\.qkv_proj\.weight$",
        (".q_proj.weight", ".k_proj.weight", ".v_proj.weight"),
        "qkv_sizes",
    ),
    SplitRows(r"\.gate_up_proj\.weight$", (".gate_proj.weight", ".up_proj.weight")),
)
