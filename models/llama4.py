"""Llama 4 (Meta, 2025), text part of Scout and Maverick.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─┬─ router ─ 1 of 16 experts ─ + ─ + ─
       │                      │ │        └─ shared expert ─────────────┘   │
       └──────────────────────┘ └──────────────────────────────────────────┘

Stands out: three layers of attention within chunks, then one over everything without positions (NoPE), its queries
growing with distance; the router's weight multiplies the expert's input. Scout normalises queries and keys after RoPE.
Maverick has a dense layer before each sparse one.
Source: meta-llama/Llama-4-Scout-17B-16E/config.json; arXiv:2501.19399; transformers' Llama4TextConfig.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Attention, Cache, Chunked, DecoderConfig, RMSNorm, Size, Step, causal_lm
from mlxarch.blocks.feedforward import GatedMLP, swiglu
from mlxarch.blocks.moe import Experts, TopK
from mlxarch.blocks.renames import Stack, stacked_experts
from mlxarch.blocks.rope import NoRoPE, RoPE
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """``intermediate_size`` is an expert's. A 1 in ``no_rope_layers`` means RoPE; an empty list counts as none."""

    hidden_act: Literal["silu"] = "silu"
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
        step = self.interleave_moe_layer_step
        return index % step == step - 1 if self.moe_layers is None else index in self.moe_layers

    @property
    def rotated(self) -> tuple[bool, ...]:
        """Whether a layer has RoPE, and chunks with it: one value for each."""
        count, every = self.num_hidden_layers, self.no_rope_layer_interval
        return tuple(map(bool, self.no_rope_layers or ((i + 1) % every for i in range(count))))[:count]

    def check(self) -> None:
        super().check()
        kinds = tuple("chunked_attention" if r else "full_attention" for r in self.rotated)
        if len(kinds) < self.num_hidden_layers or self.layer_types not in (None, kinds):
            raise ConfigError(
                f"config.json: no_rope_layers must have a 0 or 1 for each of {self.num_hidden_layers} layers, and "
                "layer_types, where there are any, 'chunked_attention' for every 1 and 'full_attention' for every 0"
            )


class ChunkedAttention(Attention):
    """RoPE of neighbouring pairs, then RMS norm without weights on every head."""

    def __init__(self, c: Config) -> None:
        rope = RoPE(c.head_size, c.rotation, interleaved=True)
        super().__init__(c, rope=rope, span=Chunked(c.attention_chunk_size))
        self.eps = c.rms_norm_eps if c.use_qk_norm else None

    def turn(self, q: mx.array, k: mx.array, step: Step) -> tuple[mx.array, mx.array]:
        q, k = super().turn(q, k, step)
        if self.eps is not None:
            q, k = mx.fast.rms_norm(q, None, self.eps), mx.fast.rms_norm(k, None, self.eps)
        return q, k


class GlobalAttention(Attention):
    """No positions, but queries that grow with every ``floor_scale`` tokens, or attention would blur."""

    def __init__(self, c: Config) -> None:
        super().__init__(c, rope=NoRoPE())
        self.growth, self.every = c.attn_scale if c.attn_temperature_tuning else 0.0, c.floor_scale

    def turn(self, q: mx.array, k: mx.array, step: Step) -> tuple[mx.array, mx.array]:
        passed = (mx.maximum(step.positions, 0) + 1) // self.every  # (L,), or (B, L) in a padded batch
        factor = 1 + self.growth * mx.log1p(passed).reshape(-1, 1, step.length, 1)
        return (q * factor).astype(q.dtype), k


class MoE(nn.Module):
    """One expert (or more), whose input the router weighs, and a shared one."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.router = TopK(c.hidden_size, c.num_local_experts, c.num_experts_per_tok, weigh=mx.sigmoid)
        self.experts = Experts(c.hidden_size, c.intermediate_size, c.num_local_experts, swiglu)
        self.shared_expert = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = self.router(x)  # (B, L, k)
        inputs = x[..., None, :] * weights[..., None].astype(x.dtype)  # (B, L, k, hidden_size)
        return self.experts(inputs, chosen[..., None]).squeeze(-2).sum(-2) + self.shared_expert(x)


class DecoderLayer(nn.Module):
    """Norm before attention and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        self.self_attn = (ChunkedAttention if c.rotated[index] else GlobalAttention)(c)
        self.feed_forward = MoE(c) if c.sparse(index) else GatedMLP(c.hidden_size, c.intermediate_size_mlp, swiglu)
        self.input_layernorm, self.post_attention_layernorm = norm(c.hidden_size), norm(c.hidden_size)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), step, cache)
        return x + self.feed_forward(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)
# The float8 files hold each expert for itself
WEIGHTS = (Stack(r"\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".experts.\2."), *stacked_experts())
