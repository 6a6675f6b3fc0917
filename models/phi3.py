"""Phi-3 (Microsoft, 2024), also Phi-4.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: Llama's decoder, published with queries, keys and values in one matrix, and gate and up
in another; some have a sliding window. Phi-4 mini has RoPE on three quarters of each head, LongRoPE:
other frequencies for texts that exceed the original context.
Source: arXiv:2402.13753 (LongRoPE); config.json of microsoft/phi-4, microsoft/Phi-4-mini-instruct and
microsoft/Phi-3-mini-4k-instruct; transformers' Phi3Model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    CausalLM,
    ForwardContext,
    Full,
    GatedMLP,
    RMSNorm,
    RoPE,
    RoPEConfig,
    Size,
    Sliding,
    swiglu,
)
from mlxarch.blocks.config import ORIGINAL_CONTEXT, PartialRoPEConfig
from mlxarch.blocks.long_rope import LongRoPE, LongRoPEAttention, LongRoPEModel
from mlxarch.blocks.weight_mapping import SplitRows, SplitSizes
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(PartialRoPEConfig):
    """Config; a window applies to all layers."""

    hidden_act: Literal["silu"] = "silu"
    sliding_window: Size | None = None
    original_max_position_embeddings: Size | None = None

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values in their common matrix."""
        kv = self.kv_heads * self.head_size
        return self.num_attention_heads * self.head_size, kv, kv

    def complete_rope(self, section: Mapping[str, Any]) -> RoPEConfig:
        """RoPE parameters; early files call LongRoPE "su" or "yarn"."""
        section = dict(section)
        if section.get("short_factor") is not None:
            section["rope_type"] = "longrope"
        section.setdefault(ORIGINAL_CONTEXT, self.original_max_position_embeddings)
        return super().complete_rope(section)

    @property
    def is_long(self) -> bool:
        """Whether positions have LongRoPE."""
        return self.rope.type == "longrope"

    def check(self) -> None:
        super().check()
        if self.is_long and self.rope.number(ORIGINAL_CONTEXT) > (self.sliding_window or math.inf):
            raise ConfigError(
                f"config.json: sliding_window = {self.sliding_window} is less than the original "
                "context of LongRoPE, within which all tokens must stay; take the original model's"
            )


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        span = Sliding(c.sliding_window) if c.sliding_window else Full()
        if c.is_long:
            rope = LongRoPE(c.rope_dims, c.rope, c.max_position_embeddings)
            self.self_attn = LongRoPEAttention(c, rope=rope, span=span)
        else:
            self.self_attn = Attention(c, rope=RoPE(c.rope_dims, c.rope), span=span)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    model = LongRoPEModel if c.is_long else CausalLM
    return model(c, layers, RMSNorm(c.hidden_size, c.rms_norm_eps))


WEIGHTS = (
    SplitSizes(
        r"\.qkv_proj\.weight$",
        (".q_proj.weight", ".k_proj.weight", ".v_proj.weight"),
        "qkv_sizes",
    ),
    SplitRows(r"\.gate_up_proj\.weight$", (".gate_proj.weight", ".up_proj.weight")),
)
