"""GLM-4.5 (Z.ai, 2025), also GLM-4.5 Air, 4.6 and 4.7.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─┬─ router ─ 8 of 160 experts ─ + ─ + ─
       └─────────────────────┘  │        └─ shared expert ──────────────┘   │
                                └───────────────────────────────────────────┘

Stands out: DeepSeek V3's experts with plain grouped-query attention of very many heads (96), biases
on queries, keys and values, and RoPE on half of each head; QK-norm in the large model only; the
first 3 layers are dense, in Air the first. Published with an extra layer that predicts a second
token (MTP).
Source: arXiv:2508.06471; config.json of zai-org/GLM-4.5 and zai-org/GLM-4.5-Air; transformers'
Glm4MoeConfig for defaults.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import mlx.core as mx
import mlx.nn as nn
from msgspec import Meta

from mlxarch.blocks import (
    Attention,
    Cache,
    ForwardContext,
    GatedMLP,
    RMSNorm,
    RoPE,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.config import PartialRoPEConfig
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, make_grouped_moe
from mlxarch.blocks.weight_mapping import IgnoreExtraLayers, Stack


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, PartialRoPEConfig):
    """Config; half of each head has RoPE unless the file says otherwise."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    use_qk_norm: bool = False
    norm_topk_prob: bool = True
    partial_rotary_factor: Annotated[float, Meta(gt=0, le=1)] = 0.5


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        self.self_attn = Attention(
            c,
            rope=RoPE(c.rope_dims, c.rope),
            norm=norm if c.use_qk_norm else None,
            bias=c.attention_bias,
        )
        if index < c.first_k_dense_replace:
            self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        else:
            self.mlp = make_grouped_moe(c)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)


WEIGHTS = (
    IgnoreExtraLayers(),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
)
