"""MiMo V2 Flash (Xiaomi, 2025).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ router ─ 8 of 256 experts ─ + ─
       └──────────────────────┘  └───────────────────────────────────┘

Stands out: five layers with a window of 128 earlier tokens, sinks and twice the KV heads for each
layer of full attention; keys of 192 features and values of 128, which are scaled; RoPE on a third
of each head; experts as in DeepSeek V3, none of them shared; the first layer is dense.
Source: XiaomiMiMo/MiMo-V2-Flash/config.json; transformers' MiMoV2FlashModel, which lets a token
attend to itself besides the window.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    Count,
    ForwardContext,
    GatedMLP,
    LayerTypesConfig,
    Positive,
    RMSNorm,
    RoPE,
    RoPEConfig,
    Size,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, make_grouped_moe
from mlxarch.blocks.weight_mapping import Ignore, Rename, Stack

FLAGS = tuple[Literal[0, 1], ...]
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig, GroupedExpertsConfig):
    """Config; ``hybrid_layer_pattern`` has a 1 for each layer with a window."""

    aliases: ClassVar = {"layernorm_epsilon": "rms_norm_eps"}

    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    attention_bias: bool = False
    attention_chunk_size: Size | None = None  # of the maker's kernel; it changes nothing
    attention_value_scale: Positive = 1.0
    v_head_dim: Size
    sliding_window_size: Size | None = None
    hybrid_layer_pattern: FLAGS | None = None
    moe_layer_freq: FLAGS | None = None
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    add_full_attention_sink_bias: bool = False
    add_swa_attention_sink_bias: bool = True
    swa_num_attention_heads: Size | None = None
    swa_num_key_value_heads: Size | None = None
    swa_head_dim: Size | None = None
    swa_v_head_dim: Size | None = None
    swa_rope_theta: Positive = 10_000.0
    partial_rotary_factor: Positive = 0.334
    first_k_dense_replace: Count = 1
    n_shared_experts: Count | None = 0
    routed_scaling_factor: Positive = 1.0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys; a null is a key that is not there."""
        return super().from_dict({key: v for key, v in config.items() if v is not None})

    @property
    def window(self) -> int | None:
        """Tokens that a token attends to, itself included."""
        size = self.sliding_window_size
        return self.sliding_window if size is None else size + 1

    def default_layer_type(self, index: int) -> Literal["sliding_attention", "full_attention"]:
        if self.hybrid_layer_pattern is not None:
            return SLIDING if self.hybrid_layer_pattern[index] else FULL
        return FULL if index == 0 or (index + 1) % 6 == 0 else SLIDING

    def is_dense(self, index: int) -> bool:
        """Whether the layer at ``index`` has no experts."""
        if self.mlp_layer_types is not None:
            return self.mlp_layer_types[index] == "dense"
        if self.moe_layer_freq is not None:
            return not self.moe_layer_freq[index]
        return index < self.first_k_dense_replace

    def for_layer(self, index: int) -> Self:
        """The config with the sizes of a layer's attention."""
        if self.layer_type(index) == FULL:
            return self
        return replace(
            self,
            num_attention_heads=self.swa_num_attention_heads or self.num_attention_heads,
            num_key_value_heads=self.swa_num_key_value_heads or 2 * self.kv_heads,
            head_dim=self.swa_head_dim or self.head_dim,
            v_head_dim=self.swa_v_head_dim or self.v_head_dim,
            add_full_attention_sink_bias=self.add_swa_attention_sink_bias,
        )

    def rope_for(self, layer_type: str) -> RoPEConfig:
        if layer_type == SLIDING and self.rope_parameters is None:
            return self.complete_rope({"rope_theta": self.swa_rope_theta})
        return super().rope_for(layer_type)

    def check(self) -> None:
        for key in ("hybrid_layer_pattern", "moe_layer_freq", "mlp_layer_types"):
            self.check_length(key, getattr(self, key))
        super().check()


class ScaledValueAttention(Attention):
    """Attention with scaled values, whose heads have another size than those of the keys."""

    def __init__(self, c: Config, index: int) -> None:
        own = c.for_layer(index)
        config = c.rope_for(c.layer_type(index))
        factor = config.number("partial_rotary_factor", c.partial_rotary_factor)
        super().__init__(
            own,
            rope=RoPE(int(own.head_size * factor), config),
            span=c.span(index),
            bias=c.attention_bias,
            sinks=own.add_full_attention_sink_bias,
            value_size=own.v_head_dim,
        )
        self.factor = c.attention_value_scale

    def project(self, x: mx.array) -> list[mx.array]:
        q, k, v = self.qkv(x)
        return [q, k, v * self.factor]


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.self_attn = ScaledValueAttention(c, index)
        if c.is_dense(index):
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
    Ignore(r"^model\.mtp\.", "layers that predict further tokens"),
    Rename(r"\.attention_sink_bias$", ".sinks"),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
)
SAVED = (Rename(r"\.sinks$", ".attention_sink_bias"),)
