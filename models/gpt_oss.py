"""GPT-OSS (OpenAI, 2025), 20B and 120B.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ router ─ 4 of 32 experts ─ + ─
       └──────────────────────┘  └──────────────────────────────────┘

Stands out: attention sinks; a window of 128 tokens on every other layer; biases everywhere, in router and experts too;
a clamped SwiGLU whose up side is shifted by one; experts published in four bits (MXFP4).
Source: arXiv:2508.10925; openai/gpt-oss-20b/config.json; openai/gpt-oss's gpt_oss/torch/model.py;
transformers' GptOssConfig for what its first files do not name.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import AlternatingConfig, Attention, Cache, Positive, RMSNorm, RoPE, Size, Step, causal_lm
from mlxarch.blocks.feedforward import Gate, one_kernel
from mlxarch.blocks.moe import Experts, TopK
from mlxarch.blocks.renames import stacked_experts


@dataclass(frozen=True, kw_only=True)
class Config(AlternatingConfig):
    """YaRN's ramp is not rounded here: ``truncate`` is false in the published rope_scaling."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = True
    sliding_window_pattern: Literal[2] = 2
    num_local_experts: Size
    num_experts_per_tok: Size
    swiglu_alpha: Positive = 1.702
    swiglu_limit: Positive = 7.0


@cache
def clamped_swiglu(alpha: float, limit: float) -> Gate:
    """gate * sigmoid(alpha * gate) * (up + 1), of a gate held below the limit and an up side within it."""

    @one_kernel
    def clamped(gate: mx.array, up: mx.array) -> mx.array:
        gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
        return gate * mx.sigmoid(alpha * gate) * (up + 1)

    return clamped


class MoE(nn.Module):
    """Sum of the chosen experts' outputs, each times its weight."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        gate = clamped_swiglu(c.swiglu_alpha, c.swiglu_limit)
        softmax = partial(mx.softmax, axis=-1)
        self.router = TopK(c.hidden_size, c.num_local_experts, c.num_experts_per_tok, weigh=softmax, bias=True)
        self.experts = Experts(c.hidden_size, c.intermediate_size, c.num_local_experts, gate, bias=True)

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = self.router(x)
        return (self.experts(x, chosen) * weights[..., None].astype(x.dtype)).sum(-2)


class DecoderLayer(nn.Module):
    """Norm before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm, bias = partial(RMSNorm, eps=c.rms_norm_eps), c.attention_bias
        rope = RoPE(c.head_size, c.rotation)
        self.self_attn = Attention(c, rope=rope, span=c.span(index), bias=bias, output_bias=bias, sinks=True)
        self.mlp = MoE(c)
        self.input_layernorm, self.post_attention_layernorm = norm(c.hidden_size), norm(c.hidden_size)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), step, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)


WEIGHTS = stacked_experts(interleaved=True)
