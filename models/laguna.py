"""Laguna XS and S (Poolside, 2026).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─┬─ router ─ 8 of 256 experts ─ + ─ + ─
       └──────────────────────┘  │        └─ shared expert ──────────────┘   │
                                 └───────────────────────────────────────────┘

Stands out: sliding layers have more heads than full ones, and a RoPE of their own; each head's
outputs are gated by a softplus; QK-norm on every head; sigmoid scores with a bias that balances the
load; the first layer is dense.
Source: config.json of poolside's Laguna-XS; transformers' LagunaModel, and its config.json keys.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal, Self

import mlx.core as mx
import mlx.nn as nn
from msgspec import Meta

from mlxarch.blocks import (
    Cache,
    Experts,
    ForwardContext,
    GatedMLP,
    GroupLimitedSigmoid,
    HeadGatedAttention,
    LayerTypesConfig,
    MoE,
    Positive,
    RMSNorm,
    RoPE,
    Size,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.weight_mapping import Rename, SplitRows, Stack


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig):
    """Config; the RoPE parameters of both types of layers say which share of a head has RoPE."""

    hidden_act: Literal["silu"] = "silu"
    gating: Literal["per-head", "per-channel", True] = True
    num_attention_heads_per_layer: tuple[Size, ...] | None = None
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    shared_expert_intermediate_size: Size
    moe_routed_scaling_factor: Positive = 1.0
    moe_apply_router_weight_on_input: Literal[False] = False
    moe_router_logit_softcapping: Annotated[float, Meta(ge=0, le=0)] = 0.0
    partial_rotary_factor: float | None = None

    def for_layer(self, index: int) -> Self:
        """The config with the number of heads of a layer."""
        heads = (self.num_attention_heads_per_layer or ())[index : index + 1]
        return replace(self, num_attention_heads=heads[0]) if heads else self

    def rope_of(self, index: int) -> RoPE:
        """RoPE of the layer at ``index``."""
        config = self.rope_for(self.layer_type(index))
        return RoPE(int(self.head_size * config.number("partial_rotary_factor", 1.0)), config)

    def is_sparse(self, index: int) -> bool:
        """Whether the layer at ``index`` has experts."""
        return (
            index > 0 if self.mlp_layer_types is None else self.mlp_layer_types[index] == "sparse"
        )

    def check(self) -> None:
        super().check()
        self.check_length("num_attention_heads_per_layer", self.num_attention_heads_per_layer)
        self.check_length("mlp_layer_types", self.mlp_layer_types)


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.self_attn = HeadGatedAttention(
            c.for_layer(index),
            activation=nn.softplus,
            gate_size=1 if c.gating in (True, "per-head") else c.head_size,
            rope=c.rope_of(index),
            span=c.span(index),
            norm=partial(RMSNorm, eps=c.rms_norm_eps),
        )
        sparse = c.is_sparse(index)
        self.mlp = moe(c) if sparse else GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def moe(c: Config) -> MoE:
    """Create the experts of one layer, their router and the shared expert."""
    gate = GroupLimitedSigmoid(
        c.hidden_size,
        c.num_experts,
        c.num_experts_per_tok,
        scale=c.moe_routed_scaling_factor,
    )
    experts = Experts(c.hidden_size, c.moe_intermediate_size, c.num_experts, swiglu)
    return MoE(gate, experts, GatedMLP(c.hidden_size, c.shared_expert_intermediate_size, swiglu))


build = causal_lm(DecoderLayer)

BIAS = "e_score_correction_bias"
WEIGHTS = (
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
    Rename(r"\.mlp\.experts\.(gate_up_proj|down_proj)$", r".mlp.switch_mlp.\1.weight"),
    SplitRows(r"\.gate_up_proj\.weight$", (".gate_proj.weight", ".up_proj.weight")),
    Rename(rf"\.mlp\.experts\.{BIAS}$", f".mlp.gate.{BIAS}"),
    Rename(r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),
    Rename(r"\.mlp\.gate\.proj\.", ".mlp.gate."),
)
SAVED = (
    Rename(rf"\.mlp\.gate\.{BIAS}$", f".mlp.experts.{BIAS}"),
    Rename(r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),
)
