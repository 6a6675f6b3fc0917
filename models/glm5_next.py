"""GLM-5.3 Flash (Z.ai, 2026).

    x ─┬─ mix ─ norm ─ KDA or latent attention ─ + ─┬─ mix ─ norm ─┬─ router ─ 8 of 288 experts ─ + ─ + ─
       │                                         │  │              └─ shared expert ──────────────┘   │
       └─────────── mix of 4 streams ────────────┘  └──────────────── mix of 4 streams ───────────────┘

Stands out: four residual streams, mixed around each block by nearly doubly stochastic matrices; most
layers are linear attention with a decay for each feature (KDA), the others latent attention without
positions to pools of 16 tokens that an indexer chooses; a clamped SwiGLU.
Source: zai-org/GLM-5.3-Flash/config.json; transformers' Glm5NextTextModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Cache, CausalLM, Count, ForwardContext, GatedMLP, Positive, RMSNorm
from mlxarch.blocks.feed_forward import clamped_swiglu
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, make_grouped_moe
from mlxarch.blocks.recurrent.kimi_delta_attention import KDASizes, KimiDeltaAttention
from mlxarch.blocks.residual_streams.sinkhorn import StreamConnection, StreamsConfig
from mlxarch.blocks.sparse.pooled_latent_attention import PooledLatentAttention, PooledLatentConfig
from mlxarch.blocks.weight_mapping import (
    Ignore,
    IgnoreExtraLayers,
    Rename,
    SplitHeads,
    Stack,
    TransposeTo,
)
from mlxarch.errors import ConfigError

LayerType = Literal["linear_attention", "indexed_attention", "deepseek_sparse_attention"]
LINEAR_KEYS = ("num_heads", "head_dim", "short_conv_kernel_size")


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, StreamsConfig, PooledLatentConfig):
    """Config; without ``mlp_layer_types`` the first layers are dense, as their number says."""

    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    qk_rope_head_dim: Literal[0] = 0  # pyright: ignore[reportIncompatibleVariableOverride]
    head_dim: Count | None = None  # of RoPE, of which there is none
    layer_types: tuple[LayerType, ...]
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    first_k_dense_replace: Count = 0
    swiglu_limit: Positive
    linear_attn_config: dict[str, Any]

    @property
    def score_scale(self) -> float:
        return self.head_size**-0.5

    @property
    def kda(self) -> KDASizes:
        """Sizes of the KDA layers."""
        heads, size, kernel = (self.linear_attn_config[key] for key in LINEAR_KEYS)
        bound = self.linear_attn_config["gate_lower_bound"]
        return KDASizes(heads=heads, head_size=size, kernel=kernel, lower_bound=bound)

    @property
    def kernel(self) -> int:
        """Inputs that a convolution sees."""
        return self.kda.kernel

    def is_dense(self, index: int) -> bool:
        """Whether the layer at ``index`` has no experts."""
        if self.mlp_layer_types is None:
            return index < self.first_k_dense_replace
        return self.mlp_layer_types[index] == "dense"

    def check(self) -> None:
        super().check()
        found = self.linear_attn_config
        bound = found.get("gate_lower_bound")
        sizes = [found.get(key) for key in LINEAR_KEYS]
        numbers = all(type(n) is int and n > 0 for n in sizes) and isinstance(bound, int | float)
        if not numbers or found.get("safe_gate") is not True:
            raise ConfigError(
                f"config.json: linear_attn_config must hold {', '.join(LINEAR_KEYS)}, positive "
                f"integers, gate_lower_bound, and safe_gate true; found {found!r}"
            )
        for key in ("layer_types", "mlp_layer_types"):
            values = getattr(self, key)
            if values is not None and len(values) != self.num_hidden_layers:
                raise ConfigError(
                    f"config.json: {key} has {len(values)} values, and num_hidden_layers is "
                    f"{self.num_hidden_layers}; there must be one for each layer"
                )


class DecoderLayer(nn.Module):
    """Decoder layer between streams, with norms before the token mixer and the feed-forward."""

    residual_outputs = ()

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        if c.layer_types[index] == "linear_attention":
            self.self_attn = KimiDeltaAttention(c.hidden_size, c.kda, c.rms_norm_eps)
        else:
            self.self_attn = PooledLatentAttention(c, c.shares_choice(index))
        activation = clamped_swiglu(c.swiglu_limit)
        if c.is_dense(index):
            self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, activation)
        else:
            self.mlp = make_grouped_moe(c, activation=activation)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.hc_attn = StreamConnection(c)
        self.hc_ffn = StreamConnection(c)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        connection = self.hc_attn(x)
        out = self.self_attn(self.input_layernorm(connection.inputs), context, cache)
        x = self.hc_attn.write(x, connection, out)
        connection = self.hc_ffn(x)
        out = self.mlp(self.post_attention_layernorm(connection.inputs))
        return self.hc_ffn.write(x, connection, out)


class StreamsLM(CausalLM):
    """Language model with several residual streams, whose mean is the last hidden state."""

    def __init__(self, c: Config) -> None:
        layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
        super().__init__(c, layers, RMSNorm(c.hidden_size, c.rms_norm_eps))
        self.streams = c.hc_mult

    def embed(self, tokens: mx.array, context: ForwardContext) -> mx.array:
        return mx.tile(super().embed(tokens, context), (1, 1, self.streams))

    def head(self, state: mx.array) -> mx.array:
        return super().head(mx.unflatten(state, -1, (self.streams, -1)).mean(-2))


build = StreamsLM

PREFIX = "model.language_model."
WEIGHTS = (
    IgnoreExtraLayers(),
    Ignore(r"^(model\.)?mtp\.", "multi-token prediction head"),
    TransposeTo(r"_conv1d\.weight$", "kernel"),
    Rename(r"\.hc_(attn|ffn)_(fn|base|scale)$", r".hc_\1.\2"),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
    SplitHeads(
        r"\.kv_b_proj\.weight$",
        (".embed_q.weight", ".unembed_out.weight"),
        ("qk_nope_head_dim", "v_head_dim"),
    ),
)
SAVED = (Rename(r"\.hc_(attn|ffn)\.(fn|base|scale)$", r".hc_\1_\2"),)
