"""Muse Glimmer (Meta, 2026), text decoder.

    x ─┬─ norm ─ attention ─ norm ─ + ─┬─ norm ─ SwiGLU ─ norm ─ + ─
       └─────────────────────────────┘  └───────────────────────┘

Stands out: normalised embeddings; norms before and after attention and feed-forward, with weights
centred at zero; QK-norm without weights, and queries times a factor; the heads' outputs are gated;
three sliding layers for each full one without positions (NoPE), counted from the last layer.
Source: config.json of meta's Muse-Glimmer-30B; transformers' MuseGlimmerTextModel, and its
config.json keys.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    POST_NORM,
    Attention,
    Cache,
    CausalLM,
    ForwardContext,
    GatedMLP,
    LayerTypesConfig,
    Linear,
    NoRoPE,
    Positive,
    RMSNorm,
    RoPE,
    ZeroCenteredRMSNorm,
    swiglu,
)

PERIOD = 4  # layers; the last of them is full


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig):
    """Config; a layer with a RoPE base of 0 has no positions."""

    hidden_activation: Literal["silu"] = "silu"
    final_logit_softcapping: Positive | None = None
    output_multiplier: Positive = 1.0
    post_norm_eps: Positive = 1e-8
    qk_scale_factor: Positive = 3.87
    layer_rope_theta: tuple[float, ...] | None = None

    def default_layer_type(self, index: int) -> Literal["sliding_attention", "full_attention"]:
        last = (self.num_hidden_layers - 1 - index) % PERIOD == 0
        return "full_attention" if last else "sliding_attention"

    def check(self) -> None:
        super().check()
        self.check_length("layer_rope_theta", self.layer_rope_theta)

    def has_rope(self, index: int) -> bool:
        """Whether the layer at ``index`` has RoPE; all bases but 0 mean that of the file."""
        if self.layer_rope_theta is not None:
            return bool(self.layer_rope_theta[index])
        return self.layer_type(index) == "sliding_attention"


class GatedSigmoidAttention(Attention):
    """Attention with a norm of queries and keys without weights, and a gate for every feature."""

    def __init__(self, c: Config, index: int) -> None:
        rope = RoPE(c.head_size, c.rope) if c.has_rope(index) else NoRoPE()
        super().__init__(c, rope=rope, span=c.span(index))
        self.gate_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_size)
        self.eps = c.rms_norm_eps
        self.factor = c.qk_scale_factor

    def project(self, x: mx.array) -> list[mx.array]:
        return [*self.qkv(x), self.gate_proj(x)]

    def apply_positions(
        self, q: mx.array, k: mx.array, context: ForwardContext
    ) -> tuple[mx.array, mx.array]:
        q, k = (mx.fast.rms_norm(t, None, self.eps) for t in (q, k))
        q, k = super().apply_positions(q, k, context)
        return q * self.factor, k

    def gate_output(self, out: mx.array, *gates: mx.array) -> mx.array:
        return out * mx.sigmoid(gates[0])


class DecoderLayer(nn.Module):
    """Decoder layer with norms before and after attention and feed-forward."""

    residual_outputs = POST_NORM

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(ZeroCenteredRMSNorm, c.hidden_size)
        self.self_attn = GatedSigmoidAttention(c, index)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm(c.rms_norm_eps)
        self.post_attention_layernorm = norm(c.post_norm_eps)
        self.pre_feedforward_layernorm = norm(c.rms_norm_eps)
        self.post_feedforward_layernorm = norm(c.post_norm_eps)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        attention = self.self_attn(self.input_layernorm(x), context, cache)
        x = x + self.post_attention_layernorm(attention)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class MuseGlimmer(CausalLM):
    """Model with normalised embeddings."""

    def __init__(self, c: Config) -> None:
        layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
        norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        cap = c.final_logit_softcapping
        super().__init__(c, layers, norm, softcap=cap, logit_scale=c.output_multiplier)
        self.eps = c.rms_norm_eps

    def embed(self, tokens: mx.array, context: ForwardContext) -> mx.array:
        """Compute the first hidden state: token ids (B, L) -> (B, L, hidden_size)."""
        return mx.fast.rms_norm(super().embed(tokens, context), None, self.eps)


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    return MuseGlimmer(c)


PREFIX = "model.language_model."
