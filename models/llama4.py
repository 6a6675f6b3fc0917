"""Llama 4 (Meta, 2025), text decoder of Scout and Maverick.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─┬─ router ─ 1 of 16 experts ─ + ─ + ─
       │                      │ │        └─ shared expert ─────────────┘   │
       └──────────────────────┘ └──────────────────────────────────────────┘

Stands out: three layers of chunked attention, then one of full attention without positions (NoPE),
whose queries grow with the position; the router's weight multiplies the expert's input. Scout
normalises queries and keys after RoPE. Maverick has a dense layer before each sparse one.
Source: meta-llama/Llama-4-Scout-17B-16E/config.json; arXiv:2501.19399; transformers'
Llama4TextConfig.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    Chunked,
    DecoderConfig,
    ForwardContext,
    ResidualOutput,
    RMSNorm,
    Size,
    causal_lm,
)
from mlxarch.blocks.feed_forward import GatedMLP, swiglu
from mlxarch.blocks.moe.moe import Experts, TopK
from mlxarch.blocks.rope import NoRoPE, RoPE
from mlxarch.blocks.weight_mapping import Stack, stacked_experts
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; ``intermediate_size`` is the width of an expert.

    A 1 in ``no_rope_layers`` means RoPE; an empty list counts as no list.
    """

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    attention_chunk_size: Size = 8192
    attn_temperature_tuning: bool | int = True
    attn_scale: float = 0.1
    floor_scale: Size = 8192
    intermediate_size_mlp: Size
    num_local_experts: Size
    num_experts_per_tok: Size = 1
    interleave_moe_layer_step: Size = 1
    moe_layers: tuple[int, ...] | None = None
    use_qk_norm: bool = True
    no_rope_layers: tuple[Literal[0, 1], ...] | None = None
    no_rope_layer_interval: Size = 4
    layer_types: tuple[Literal["chunked_attention", "full_attention"], ...] | None = None

    def sparse(self, index: int) -> bool:
        """Whether this layer has experts."""
        if self.moe_layers is not None:
            return index in self.moe_layers
        return (index + 1) % self.interleave_moe_layer_step == 0

    @property
    def uses_rope(self) -> tuple[bool, ...]:
        """For each layer, whether it has RoPE, and chunked attention with it."""
        count = self.num_hidden_layers
        interval = self.no_rope_layer_interval
        listed = self.no_rope_layers or [(index + 1) % interval for index in range(count)]
        return tuple(map(bool, listed))[:count]

    def check(self) -> None:
        super().check()
        types = tuple("chunked_attention" if r else "full_attention" for r in self.uses_rope)
        if len(types) < self.num_hidden_layers or self.layer_types not in (None, types):
            raise ConfigError(
                f"config.json: no_rope_layers must have a 0 or 1 for each of "
                f"{self.num_hidden_layers} layers, and layer_types, where there are any, "
                "'chunked_attention' for every 1 and 'full_attention' for every 0"
            )


class ChunkedAttention(Attention):
    """Chunked attention: interleaved RoPE, then RMS norm without weights on every head."""

    def __init__(self, c: Config) -> None:
        rope = RoPE(c.head_size, c.rope, interleaved=True)
        bias = c.attention_bias
        super().__init__(
            c, rope=rope, span=Chunked(c.attention_chunk_size), bias=bias, output_bias=bias
        )
        self.eps = c.rms_norm_eps if c.use_qk_norm else None

    def apply_positions(
        self, q: mx.array, k: mx.array, context: ForwardContext
    ) -> tuple[mx.array, mx.array]:
        q, k = super().apply_positions(q, k, context)
        if self.eps is not None:
            q, k = mx.fast.rms_norm(q, None, self.eps), mx.fast.rms_norm(k, None, self.eps)
        return q, k


class GlobalAttention(Attention):
    """Full attention without positions, whose queries grow with every ``floor_scale`` tokens.

    Otherwise the softmax would flatten over long contexts.
    """

    def __init__(self, c: Config) -> None:
        super().__init__(c, rope=NoRoPE(), bias=c.attention_bias, output_bias=c.attention_bias)
        self.growth = c.attn_scale if c.attn_temperature_tuning else 0.0
        self.interval = c.floor_scale

    def apply_positions(
        self, q: mx.array, k: mx.array, context: ForwardContext
    ) -> tuple[mx.array, mx.array]:
        # (L,), or (B, L) in a padded batch
        intervals = (mx.maximum(context.positions, 0) + 1) // self.interval
        factor = 1 + self.growth * mx.log1p(intervals).reshape(-1, 1, context.length, 1)
        return (q * factor).astype(q.dtype), k


class MoE(nn.Module):
    """One or more experts, whose input is scaled by the router's weight, and a shared expert."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.router = TopK(
            c.hidden_size, c.num_local_experts, c.num_experts_per_tok, weight_function=mx.sigmoid
        )
        self.experts = Experts(c.hidden_size, c.intermediate_size, c.num_local_experts, swiglu)
        self.shared_expert = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = self.router(x)  # (B, L, k)
        inputs = x[..., None, :] * weights[..., None].astype(x.dtype)  # (B, L, k, hidden_size)
        return self.experts(inputs, chosen[..., None]).squeeze(-2).sum(-2) + self.shared_expert(x)


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    residual_outputs = (ResidualOutput("self_attn"), ResidualOutput("feed_forward"))

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        self.self_attn = (ChunkedAttention if c.uses_rope[index] else GlobalAttention)(c)
        self.feed_forward = (
            MoE(c) if c.sparse(index) else GatedMLP(c.hidden_size, c.intermediate_size_mlp, swiglu)
        )
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.feed_forward(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)
# The float8 files contain each expert separately
WEIGHTS = (Stack(r"\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".experts.\2."), *stacked_experts())
