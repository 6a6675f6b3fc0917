"""Step 3.5 and 3.7 Flash (StepFun, 2026).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─┬─ router ─ 8 of 288 experts ─ + ─ + ─
       └──────────────────────┘  │        └─ shared expert ──────────────┘   │
                                 └───────────────────────────────────────────┘

Stands out: sliding layers have more heads than full ones, and a RoPE of their own; each head's
outputs are gated by a sigmoid; QK-norm on every head; norms with weights centred at zero; in some
layers the gate is limited after its activation; sigmoid scores with a bias that balances the load;
the first layers are dense.
Source: stepfun-ai/Step-3.7-Flash/config.json; transformers' Step3p7TextModel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Cache,
    CausalLM,
    Experts,
    ForwardContext,
    GatedMLP,
    GroupLimitedSigmoid,
    HeadGatedAttention,
    LayerTypesConfig,
    MoE,
    Positive,
    RoPE,
    Size,
    ZeroCenteredRMSNorm,
    swiglu,
)
from mlxarch.blocks.attention.layer_types import rope_of_layers
from mlxarch.blocks.weight_mapping import Ignore, IgnoreExtraLayers, Rename
from mlxarch.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
PADDED = ("layer_types", "mlp_layer_types", "swiglu_limits", "swiglu_limits_shared")
Limits = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig):
    """Config; a limit of 0 is none. Published lists go on with the layers that are left out."""

    aliases: ClassVar = {
        "moe_num_experts": "n_routed_experts",
        "moe_top_k": "num_experts_per_tok",
        "num_attention_groups": "num_key_value_heads",
        "share_expert_dims": "share_expert_dim",
    }

    hidden_act: Literal["silu"] = "silu"
    zero_centered: Literal[True] = True
    sink: Literal[False] = False
    use_qk_norm: Literal[True] = True
    use_head_wise_attn_gate: Literal[True] = True
    use_moe_router_bias: Literal[True] = True
    norm_expert_weight: Literal[True] = True
    moe_router_activation: Literal["sigmoid"] = "sigmoid"
    moe_router_scaling_factor: Positive = 1.0
    moe_intermediate_size: Size
    n_routed_experts: Size
    num_experts_per_tok: Size
    share_expert_dim: Size
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...]
    num_sliding_attention_heads: Size | None = None
    query_pre_attn_scalar: Positive | None = None
    partial_rotary_factor: float | None = None
    swiglu_limits: Limits | None = None
    swiglu_limits_shared: Limits | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys, after the published ones are written as transformers 5 does."""
        found = dict(config)
        count = found.get("num_hidden_layers", 0)
        sparse = found.pop("moe_layers_enum", None)
        if isinstance(sparse, str) and "mlp_layer_types" not in found:
            chosen = set(sparse.split(","))
            found["mlp_layer_types"] = [
                "sparse" if str(index) in chosen else "dense" for index in range(count)
            ]
        other = found.get("attention_other_setting")
        if isinstance(other, dict):
            found.setdefault("num_sliding_attention_heads", other.get("num_attention_heads"))
        types = found.get("layer_types")
        if isinstance(found.get("rope_theta"), list) and isinstance(types, list):
            found["rope_parameters"] = {name: rope_of_layers(found, name) for name in set(types)}
            for key in ("rope_theta", "rope_scaling"):
                found.pop(key, None)
        for key in PADDED:
            if isinstance(found.get(key), list):
                found[key] = found[key][:count]
        return super().from_dict(found)

    def for_layer(self, index: int) -> Self:
        """The config with the number of heads of a layer."""
        heads = self.num_sliding_attention_heads
        if heads is None or self.layer_type(index) == FULL:
            return self
        return replace(self, num_attention_heads=heads)

    def limit(self, index: int, shared: bool) -> float | None:
        """Limit of the gates of the layer at ``index``, of its experts or of what all tokens pass."""
        limits = self.swiglu_limits_shared if shared else self.swiglu_limits
        return (limits[index] or None) if limits else None

    def check(self) -> None:
        super().check()
        for key in PADDED:
            self.check_length(key, getattr(self, key))
        if self.query_pre_attn_scalar not in (None, self.head_size):
            raise ConfigError("config.json: query_pre_attn_scalar must be head_dim")


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(ZeroCenteredRMSNorm, eps=c.rms_norm_eps)
        rope = c.rope_for(c.layer_type(index))
        self.self_attn = HeadGatedAttention(
            c.for_layer(index),
            activation=mx.sigmoid,
            rope=RoPE(int(c.head_size * rope.number("partial_rotary_factor", 1.0)), rope),
            span=c.span(index),
            norm=norm,
        )
        shared = partial(limited_swiglu, c.limit(index, shared=True))
        if c.mlp_layer_types[index] == "dense":
            self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, shared)
        else:
            self.mlp = MoE(
                GroupLimitedSigmoid(
                    c.hidden_size,
                    c.n_routed_experts,
                    c.num_experts_per_tok,
                    scale=c.moe_router_scaling_factor,
                ),
                Experts(
                    c.hidden_size,
                    c.moe_intermediate_size,
                    c.n_routed_experts,
                    partial(limited_swiglu, c.limit(index, shared=False)),
                ),
                GatedMLP(c.hidden_size, c.share_expert_dim, shared),
            )
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def limited_swiglu(limit: float | None, gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) up to the limit, times up within it."""
    if limit is None:
        return swiglu(gate, up)
    return mx.minimum(nn.silu(gate), limit) * mx.clip(up, -limit, limit)


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    return CausalLM(c, layers, ZeroCenteredRMSNorm(c.hidden_size, c.rms_norm_eps))


WEIGHTS = (
    IgnoreExtraLayers(),
    Ignore(r"^(model\.)?(vit_large_projector|vit_downsampler\d)\.", "tower"),
    Rename(r"\.moe\.router_bias$", ".mlp.gate.e_score_correction_bias"),
    Rename(r"\.moe\.gate\.", ".mlp.gate."),
    Rename(r"\.moe\.", ".mlp.switch_mlp."),
    Rename(r"\.share_expert\.", ".mlp.shared_experts."),
)
SAVED = (
    Rename(r"\.mlp\.gate\.e_score_correction_bias$", ".moe.router_bias"),
    Rename(r"\.mlp\.(?:switch_mlp\.|(?=gate\.))", ".moe."),
    Rename(r"\.mlp\.shared_experts\.", ".share_expert."),
)
PREFIX = ""
