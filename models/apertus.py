"""Apertus (Swiss AI, 2025).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ xIELU ─ + ─
       └──────────────────────┘  └───────────────┘

Stands out: a feed-forward without gate, whose activation (xIELU) has learned curvatures; QK-norm on
every head.
Source: arXiv:2411.13010 (xIELU); swiss-ai/Apertus-8B-2509/config.json; transformers' ApertusModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    DecoderConfig,
    ForwardContext,
    Linear,
    RMSNorm,
    RoPE,
    causal_lm,
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; norms come before attention and feed-forward."""

    hidden_act: Literal["xielu"] = "xielu"
    attention_bias: bool = False
    mlp_bias: bool = False
    post_norm: Literal[False] = False
    qk_norm: Literal[True] = True


class XIELU(nn.Module):
    """Quadratic for positive and exponential for negative inputs, of learned curvatures.

    Attributes:
        float32: parameters that stay in float32 whatever the type of the model.
    """

    float32 = ("alpha_p", "alpha_n", "beta", "eps")

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = mx.zeros((1,))
        self.alpha_n = mx.zeros((1,))
        self.beta = mx.array(0.5)
        self.eps = mx.array(-1e-6)

    def __call__(self, x: mx.array) -> mx.array:
        beta = self["beta"]
        positive = mx.logaddexp(self["alpha_p"], 0.0)  # softplus, not compiled: see peak_memory
        negative = beta + mx.logaddexp(self["alpha_n"], 0.0)
        y = x.astype(mx.float32)
        above = positive * y * y + beta * y
        below = (mx.expm1(mx.minimum(y, self["eps"])) - y) * negative + beta * y
        return mx.where(y > 0, above, below).astype(x.dtype)


class XIELUMLP(nn.Module):
    """Feed-forward without gate: down(xIELU(up(x)))."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.act_fn = XIELU()

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        bias = c.attention_bias
        rope = RoPE(c.head_size, c.rope)
        self.self_attn = Attention(c, rope=rope, norm=norm, bias=bias, output_bias=bias)
        self.mlp = XIELUMLP(c)
        self.attention_layernorm = norm(c.hidden_size)
        self.feedforward_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.attention_layernorm(x), context, cache)
        return x + self.mlp(self.feedforward_layernorm(x))


build = causal_lm(DecoderLayer)
