"""Nemotron-H (NVIDIA, 2025), dense and MoE, also Nemotron Nano 2 and Nemotron 3.

    x ─── norm ─ Mamba-2, attention, ReLU² or experts ─ + ─
      └─────────────────────────────────────────────────┘

Stands out: one norm and one module a layer: most are Mamba-2, whose state has a fixed size, or
feed-forward, and a few attention without positions (NoPE); feed-forwards without gate, by the square
of ReLU. The MoE chooses by sigmoid scores with a bias that balances the load, beside a shared expert;
in Nemotron 3 Super the experts work on a narrower latent.
Source: arXiv:2504.03624; nvidia/Nemotron-H-8B-Base-8K/config.json and
nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16/config.json; transformers' NemotronHModel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    MLP,
    Attention,
    Cache,
    Count,
    Experts,
    ForwardContext,
    Mamba2,
    Mamba2Config,
    Mamba2Sizes,
    NoRoPE,
    Positive,
    ResidualOutput,
    RMSNorm,
    Size,
    causal_lm,
    relu2,
)
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, LatentMoE, make_grouped_router
from mlxarch.blocks.weight_mapping import Ignore, Rename, Stack, TransposeTo
from mlxarch.errors import ConfigError

KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
LayerKind = Literal["mamba", "linear_attention", "attention", "full_attention", "mlp", "moe"]
RENAMED = {"linear_attention": "mamba", "full_attention": "attention"}  # by transformers 5


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, Mamba2Config):
    """Config; the kinds of layers are a pattern of letters, or listed."""

    aliases: ClassVar = {
        "conv_kernel": "mamba_d_conv",
        "layer_norm_epsilon": "rms_norm_eps",
        "mamba_head_dim": "mamba_d_head",
        "mamba_num_heads": "mamba_n_heads",
        "n_groups": "mamba_n_groups",
        "norm_eps": "rms_norm_eps",
        "ssm_state_size": "mamba_d_state",
        "use_conv_bias": "mamba_conv_bias",
    }

    hybrid_override_pattern: str | None = None
    layers_block_type: tuple[LayerKind, ...] | None = None
    mlp_hidden_act: Literal["relu2"] = "relu2"
    mamba_hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    use_bias: bool = False
    moe_intermediate_size: Count = 0
    moe_shared_expert_intermediate_size: Count = 0
    moe_latent_size: Size | None = None
    n_routed_experts: Count = 0
    n_shared_experts: Count | None = 0
    num_experts_per_tok: Count = 0
    first_k_dense_replace: Count = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys; transformers 5 writes the kinds of the layers without their number."""
        kinds = config.get("layers_block_type") or config.get("hybrid_override_pattern")
        return super().from_dict({"num_hidden_layers": len(kinds or ()), **config})

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of every layer: mamba, attention, mlp or moe."""
        if self.layers_block_type is not None:
            return tuple(RENAMED.get(kind, kind) for kind in self.layers_block_type)
        return tuple(KINDS.get(letter, letter) for letter in self.hybrid_override_pattern or "")

    @property
    def mamba(self) -> Mamba2Sizes:
        bias = self.mamba_proj_bias or self.use_bias
        return replace(super().mamba, bias=bias, norm_groups=self.mamba_n_groups)

    def check(self) -> None:
        if "moe" in self.kinds:
            super().check()
        else:
            Mamba2Config.check(self)
        if set(self.kinds) - set(KINDS.values()) or len(self.kinds) != self.num_hidden_layers:
            raise ConfigError(
                "config.json: hybrid_override_pattern must have one of M, *, - and E for each of "
                f"{self.num_hidden_layers} layers, found {self.hybrid_override_pattern!r}"
            )


class DecoderLayer(nn.Module):
    """Decoder layer of one module with a norm before it."""

    residual_outputs = (ResidualOutput("mixer"),)

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        kind = c.kinds[index]
        self.mixer: Any
        self.mixes_tokens = kind in ("mamba", "attention")
        if kind == "mamba":
            self.mixer = Mamba2(c.hidden_size, c.mamba, c.rms_norm_eps)
        elif kind == "attention":
            bias = c.attention_bias
            self.mixer = Attention(c, rope=NoRoPE(), bias=bias, output_bias=bias)
        elif kind == "moe":
            self.mixer = moe(c)
        else:
            self.mixer = MLP(c.hidden_size, c.intermediate_size, relu2, c.mlp_bias)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        y = self.norm(x)
        return x + (self.mixer(y, context, cache) if self.mixes_tokens else self.mixer(y))


def moe(c: Config) -> LatentMoE:
    """Create the experts of one layer, their router and the shared expert."""
    width = c.moe_shared_expert_intermediate_size * (c.n_shared_experts or 0)
    shared = MLP(c.hidden_size, width, relu2, c.mlp_bias) if width else None
    latent = c.moe_latent_size
    experts = Experts(
        latent or c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, relu2, gated=False
    )
    return LatentMoE(make_grouped_router(c), experts, shared, c.hidden_size, latent)


build = causal_lm(DecoderLayer)

WEIGHTS = (
    Ignore(r"^mtp\.", "multi-token prediction head"),
    Rename(r"^backbone\.", "model."),
    Rename(r"^model\.embeddings\.", "model.embed_tokens."),
    Rename(r"^model\.norm_f\.", "model.norm."),
    TransposeTo(r"\.conv1d\.weight$", "mamba_d_conv"),
    Stack(r"\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".switch_mlp.\2."),
    Rename(r"\.switch_mlp\.fc1\.", ".switch_mlp.up_proj."),
    Rename(r"\.switch_mlp\.fc2\.", ".switch_mlp.down_proj."),
)
SAVED = (
    Rename(r"^model\.embed_tokens\.", "backbone.embeddings."),
    Rename(r"^model\.norm\.", "backbone.norm_f."),
    Rename(r"^model\.", "backbone."),
    Rename(r"\.switch_mlp\.up_proj\.", ".switch_mlp.fc1."),
    Rename(r"\.switch_mlp\.down_proj\.", ".switch_mlp.fc2."),
)
