"""Ling 3 tiny and flash (inclusionAI, 2026).

    x ─┬─ norm ─ KDA or latent attention ─ + ─┬─ norm ─┬─ router ─ 8 of 512 experts ─ + ─ + ─
       │                                   │  │        └─ shared expert ──────────────┘   │
       └───────────────────────────────────┘  └───────────────────────────────────────────┘

Stands out: linear attention (Kimi Delta Attention) whose decays are bounded, with latent attention
in the last layer of each group, whose heads' outputs are gated by a sigmoid; experts as in DeepSeek
V3; the first layers are dense.
Source: arXiv:2510.26692 (KDA); inclusionAI/Ling-3.0-tiny/config.json; transformers'
BailingHybridModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Cache,
    ForwardContext,
    GatedMLP,
    LatentAttention,
    LatentConfig,
    RMSNorm,
    RoPE,
    Size,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.linear import ExactLinear
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, make_grouped_moe
from mlxarch.blocks.recurrent.kimi_delta_attention import KDASizes, KimiDeltaAttention
from mlxarch.blocks.weight_mapping import (
    Flatten,
    IgnoreExtraLayers,
    Rename,
    SplitHeads,
    Stack,
    TransposeTo,
)
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, LatentConfig):
    """Config; the features with RoPE are ``qk_rope_head_dim``, all of them."""

    aliases: ClassVar = {
        "model_max_length": "max_position_embeddings",
        "moe_renormalize": "norm_topk_prob",
        "num_expert_group": "n_group",
        "num_experts": "n_routed_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "num_shared_experts": "n_shared_experts",
        "short_conv_kernel_size": "linear_conv_kernel_dim",
    }

    hidden_act: Literal["silu"] = "silu"
    score_function: Literal["sigmoid"] = "sigmoid"
    moe_router_enable_expert_bias: Literal[True] = True
    moe_shared_expert_intermediate_size: Size | None = None
    gated_attention_proj_granularity_type: Literal["head_wise"] = "head_wise"
    no_kda_lora: Literal[True] = True
    kda_safe_gate: bool = True
    kda_lower_bound: float = -5.0
    rope_interleave: Literal[True] = True
    partial_rotary_factor: float = 1.0
    linear_conv_kernel_dim: Size = 4
    linear_head_dim: Size | None = None
    layer_group_size: Size = 4
    layer_types: tuple[Literal["linear_attention", "full_attention"], ...] | None = None

    def is_linear(self, index: int) -> bool:
        """Whether the layer at ``index`` is a KDA; the others have latent attention."""
        if self.layer_types is not None:
            return self.layer_types[index] == "linear_attention"
        return (index + 1) % self.layer_group_size != 0

    @property
    def kda(self) -> KDASizes:
        """Sizes of the KDA layers."""
        return KDASizes(
            heads=self.num_attention_heads,
            head_size=self.linear_head_dim or self.head_dim or 0,
            kernel=self.linear_conv_kernel_dim,
            lower_bound=self.kda_lower_bound if self.kda_safe_gate else None,
            low_rank=False,
        )

    def check(self) -> None:
        super().check()
        if not self.kda.head_size:
            raise ConfigError("config.json of a 'bailing_hybrid' model lacks head_dim")
        if len(self.layer_types or range(self.num_hidden_layers)) != self.num_hidden_layers:
            raise ConfigError("config.json: layer_types must have one value for each layer")
        if self.moe_shared_expert_intermediate_size not in (None, self.moe_intermediate_size):
            raise ConfigError(
                "config.json: moe_shared_expert_intermediate_size must be moe_intermediate_size"
            )


class GatedLatentAttention(LatentAttention):
    """Latent attention whose heads' outputs are multiplied by a sigmoid of the inputs."""

    def __init__(self, c: Config) -> None:
        super().__init__(c, RoPE(c.qk_rope_head_dim, c.rope, interleaved=True))
        self.g_proj = ExactLinear(c.hidden_size, c.num_attention_heads)

    def gate_heads(self, out: mx.array, x: mx.array) -> mx.array:
        gate = mx.sigmoid(self.g_proj(x).astype(mx.float32)).astype(x.dtype)
        return out * gate[..., None]


class DecoderLayer(nn.Module):
    """Decoder layer with norms before the token mixer and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        if c.is_linear(index):
            self.self_attn = KimiDeltaAttention(c.hidden_size, c.kda, c.rms_norm_eps)
        else:
            self.self_attn = GatedLatentAttention(c)
        if index < c.first_k_dense_replace:
            self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        else:
            self.mlp = make_grouped_moe(c)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)

WEIGHTS = (
    IgnoreExtraLayers(),
    Rename(r"^model\.word_embeddings\.", "model.embed_tokens."),
    Rename(r"\.attention\.dense\.", ".self_attn.o_proj."),
    Rename(r"\.attention\.", ".self_attn."),
    Rename(r"\.mlp\.gate\.expert_bias$", ".mlp.gate.e_score_correction_bias"),
    TransposeTo(r"_conv1d\.weight$", "linear_conv_kernel_dim"),
    Flatten(r"\.A_log$"),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
    SplitHeads(
        r"\.kv_b_proj\.weight$",
        (".embed_q.weight", ".unembed_out.weight"),
        ("qk_nope_head_dim", "v_head_dim"),
    ),
)
SAVED = (
    Rename(r"^model\.embed_tokens\.", "model.word_embeddings."),
    Rename(r"\.self_attn\.", ".attention."),
    Rename(r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.gate.expert_bias"),
)
