"""GPT-OSS (OpenAI, 2025), 20B and 120B.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ router ─ 4 of 32 experts ─ + ─
       └──────────────────────┘  └──────────────────────────────────┘

Stands out: attention sinks; a window of 128 tokens in every other layer; biases everywhere, in
router and experts too; a clamped SwiGLU whose up projection is shifted by one; experts published in
four bits (MXFP4).
Source: arXiv:2508.10925; openai/gpt-oss-20b/config.json; openai/gpt-oss's gpt_oss/torch/model.py;
transformers' GptOssConfig for keys that the first files lack.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    ForwardContext,
    Positive,
    RMSNorm,
    RoPE,
    Size,
    SlidingPatternConfig,
    causal_lm,
)
from mlxarch.blocks.feed_forward import GatedActivation, compile_elementwise
from mlxarch.blocks.moe.moe import Experts, TopK
from mlxarch.blocks.weight_mapping import stacked_experts


@dataclass(frozen=True, kw_only=True)
class Config(SlidingPatternConfig):
    """Config; YaRN's ramp is not rounded: ``truncate`` is false in the published rope_scaling."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = True
    sliding_window_pattern: Literal[2] = 2
    num_local_experts: Size
    num_experts_per_tok: Size
    swiglu_alpha: Positive = 1.702
    swiglu_limit: Positive = 7.0


@cache
def clamped_swiglu(alpha: float, limit: float) -> GatedActivation:
    """gate * sigmoid(alpha * gate) * (up + 1), with gate <= limit and -limit <= up <= limit."""

    @compile_elementwise
    def clamped(gate: mx.array, up: mx.array) -> mx.array:
        gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
        return gate * mx.sigmoid(alpha * gate) * (up + 1)

    return clamped


class MoE(nn.Module):
    """Weighted sum of the chosen experts' outputs."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        activation = clamped_swiglu(c.swiglu_alpha, c.swiglu_limit)
        experts = c.num_local_experts
        self.router = TopK(
            c.hidden_size,
            experts,
            c.num_experts_per_tok,
            weight_function=partial(mx.softmax, axis=-1),
            bias=True,
        )
        self.experts = Experts(c.hidden_size, c.intermediate_size, experts, activation, bias=True)

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = self.router(x)
        return (self.experts(x, chosen) * weights[..., None].astype(x.dtype)).sum(-2)


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        bias = c.attention_bias
        rope = RoPE(c.head_size, c.rope)
        self.self_attn = Attention(
            c, rope=rope, span=c.span(index), bias=bias, output_bias=bias, sinks=True
        )
        self.mlp = MoE(c)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)


WEIGHTS = stacked_experts(interleaved=True)
