"""Mistral Small 4 (Mistral, 2026), text decoder.

    x ─┬─ norm ─ latent attention ─ + ─┬─ norm ─┬─ router ─ 4 of 128 experts ─ + ─ + ─
       │                            │  │        └─ shared expert ──────────────┘   │
       └────────────────────────────┘  └───────────────────────────────────────────┘

Stands out: multi-head latent attention with YaRN, whose queries grow with every multiple of the
original context; many small experts with softmax scores beside a shared one.
Source: arXiv:2501.19399 (growing queries); mistralai/Mistral-Small-4-119B-2603/config.json;
transformers' Mistral4Model.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Cache,
    ForwardContext,
    GatedMLP,
    GroupLimitedSoftmax,
    LatentAttention,
    LatentConfig,
    RMSNorm,
    RoPE,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, make_grouped_moe
from mlxarch.blocks.weight_mapping import Rename, SplitHeads, SplitRows, Stack


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, LatentConfig):
    """Config; experts are not limited to groups. All features with positions have RoPE."""

    hidden_act: Literal["silu"] = "silu"
    n_group: Literal[1] = 1
    topk_group: Literal[1] = 1
    rope_interleave: Literal[True] = True
    partial_rotary_factor: float | None = None  # already in qk_rope_head_dim


class GrowingLatentAttention(LatentAttention):
    """Latent attention with queries times 1 + beta * ln(1 + floor(position / original context))."""

    def __init__(self, c: Config) -> None:
        super().__init__(c, RoPE(c.qk_rope_head_dim, c.rope, interleaved=True))
        self.beta = c.rope.number("llama_4_scaling_beta")
        self.original = c.rope.number("original_max_position_embeddings")

    def scale_queries(self, q: mx.array, context: ForwardContext) -> mx.array:
        # (L,), or (B, L) in a padded batch
        multiples = mx.floor(mx.maximum(context.positions, 0) / self.original)
        growth = 1 + self.beta * mx.log1p(multiples)
        return q * growth.reshape(-1, 1, context.length, 1).astype(q.dtype)


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.self_attn = GrowingLatentAttention(c)
        if index < c.first_k_dense_replace:
            self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        else:
            self.mlp = make_grouped_moe(c, GroupLimitedSoftmax)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)

HALVES = (".gate_proj.weight", ".up_proj.weight")
WEIGHTS = (
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
    Rename(r"\.mlp\.experts\.(gate_up_proj|down_proj)$", r".mlp.switch_mlp.\1.weight"),
    SplitRows(r"\.gate_up_proj\.weight$", HALVES),
    SplitHeads(
        r"\.kv_b_proj\.weight$",
        (".embed_q.weight", ".unembed_out.weight"),
        ("qk_nope_head_dim", "v_head_dim"),
    ),
)
