"""OLMoE (Ai2, 2024).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ router ─ 8 of 64 experts ─ + ─
       └──────────────────────┘  └──────────────────────────────────┘

Stands out: QK-norm over the whole projection; 64 small experts, none shared, whose weights are not
divided by their sum.
Source: arXiv:2409.02060; allenai/OLMoE-1B-7B-0924/config.json; transformers' OlmoeModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    DecoderConfig,
    Experts,
    ForwardContext,
    MoE,
    Positive,
    RMSNorm,
    RoPE,
    Size,
    SoftmaxTopK,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.weight_mapping import Stack


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; ``intermediate_size`` is the width of an expert."""

    hidden_act: Literal["silu"] = "silu"
    clip_qkv: Positive | None = None
    num_experts: Size
    num_experts_per_tok: Size
    norm_topk_prob: bool = False


class ClippedAttention(Attention):
    """Attention whose queries, keys and values are clipped, after the QK-norm."""

    def __init__(self, c: Config, **options: Any) -> None:
        super().__init__(c, norm=partial(RMSNorm, eps=c.rms_norm_eps), **options)
        self.qk_norm = None  # here already
        self.limit = c.clip_qkv

    def project(self, x: mx.array) -> list[mx.array]:
        q, k, v = self.qkv(x)
        projected = [self.q_norm(q), self.k_norm(k), v]
        if self.limit is None:
            return projected
        return [mx.clip(t, -self.limit, self.limit) for t in projected]


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        rope = RoPE(c.head_size, c.rope)
        self.self_attn = ClippedAttention(c, rope=rope, qk_norm="projection")
        gate = SoftmaxTopK(
            c.hidden_size, c.num_experts, c.num_experts_per_tok, renormalise=c.norm_topk_prob
        )
        self.mlp = MoE(gate, Experts(c.hidden_size, c.intermediate_size, c.num_experts, swiglu))
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)

WEIGHTS = (Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),)
