"""Falcon-H1 (TII, 2025).

    x ─┬─ norm ─┬─ Mamba-2 ─── + ─ + ─┬─ norm ─ SwiGLU ─ + ─
       │        └─ attention ──┘   │  └──────────────────┘
       └───────────────────────────┘

Stands out: Mamba-2 and attention beside each other in every layer; factors from muP on the
embeddings, keys, gates, and on the inputs and outputs of all parts; a RoPE base of 10^11. Files that
MLX-LM has converted have these factors multiplied into their weights, and are refused.
Source: arXiv:2507.22448; tiiuae/Falcon-H1-7B-Instruct/config.json; transformers' FalconH1Model.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import mlx.core as mx
import mlx.nn as nn
from msgspec import Meta

from mlxarch.blocks import (
    Attention,
    Cache,
    CausalLM,
    ForwardContext,
    GatedMLP,
    Mamba2,
    Mamba2Config,
    Mamba2Sizes,
    RMSNorm,
    RoPE,
    swiglu,
)
from mlxarch.blocks.recurrent.parallel_mixer import ParallelMixer
from mlxarch.blocks.weight_mapping import Rename

Five = Annotated[tuple[float, ...], Meta(min_length=5, max_length=5)]
Two = Annotated[tuple[float, ...], Meta(min_length=2, max_length=2)]


@dataclass(frozen=True, kw_only=True)
class Config(Mamba2Config):
    """Config; ``ssm_multipliers`` are of the gate, the inputs, B, C and the time steps."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    projectors_bias: bool = False
    mamba_rms_norm: bool = False
    mamba_norm_before_gate: bool = True
    embedding_multiplier: float = 1.0
    lm_head_multiplier: float = 1.0
    key_multiplier: float = 1.0
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    ssm_multipliers: Five = (1.0, 1.0, 1.0, 1.0, 1.0)
    mlp_multipliers: Two = (1.0, 1.0)

    @property
    def mamba(self) -> Mamba2Sizes:
        norm = "norm first" if self.mamba_norm_before_gate else "gate first"
        return replace(
            super().mamba,
            bias=self.mamba_proj_bias or self.projectors_bias,
            norm=norm if self.mamba_rms_norm else "gate only",
            norm_groups=self.mamba_n_groups,
        )


class ScaledMamba2(Mamba2):
    """Mamba-2 with a factor for each part of the input projection."""

    def __init__(self, c: Config) -> None:
        super().__init__(c.hidden_size, c.mamba, c.rms_norm_eps)
        self.factors = tuple(c.ssm_in_multiplier * factor for factor in c.ssm_multipliers)

    def scale_projection(self, projected: mx.array) -> mx.array:
        s = self.sizes
        vectors = s.groups * s.state_size
        sizes = (s.width, s.width, vectors, vectors, s.heads)
        parts = [mx.full((n,), f) for n, f in zip(sizes, self.factors, strict=True)]
        return projected * mx.concatenate(parts).astype(projected.dtype)


class DecoderLayer(nn.Module):
    """Decoder layer with norms before the token mixers and before the feed-forward."""

    residual_outputs = ()  # they are multiplied

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        attention = Attention(
            c,
            rope=RoPE(c.head_size, c.rope),
            scale=c.head_size**-0.5 * c.key_multiplier,
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        scales = (c.attention_in_multiplier, c.attention_out_multiplier)
        self.mixer = ParallelMixer(
            ScaledMamba2(c), attention, attention_scales=scales, mamba_scale=c.ssm_out_multiplier
        )
        gate, self.factor = c.mlp_multipliers
        self.feed_forward = GatedMLP(
            c.hidden_size, c.intermediate_size, partial(scaled_swiglu, gate), c.mlp_bias
        )
        self.input_layernorm = norm()
        self.pre_ff_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.mixer(self.input_layernorm(x), context, cache)
        return x + self.factor * self.feed_forward(self.pre_ff_layernorm(x))


def scaled_swiglu(factor: float, gate: mx.array, up: mx.array) -> mx.array:
    """silu(factor * gate) * up."""
    return swiglu(gate * factor, up)


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
    scale = c.embedding_multiplier
    return CausalLM(c, layers, norm, embed_scale=scale, logit_scale=c.lm_head_multiplier)


WEIGHTS = (
    Rename(r"^model\.final_layernorm\.", "model.norm."),
    Rename(r"\.(mamba|self_attn)\.", r".mixer.\1."),
)
SAVED = (
    Rename(r"^model\.norm\.", "model.final_layernorm."),
    Rename(r"\.mixer\.", "."),
)
