"""GLM-4.5 (Z.ai, 2025), also GLM-4.5 Air, 4.6 and 4.7.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─┬─ router ─ 8 of 160 experts ─ + ─ + ─
       └─────────────────────┘  │        └─ shared expert ──────────────┘   │
                                └───────────────────────────────────────────┘

Stands out: DeepSeek V3's experts under plain grouped-query attention with very many heads (96), biases on queries, keys
and values, and RoPE on half of each head; QK-norm in the large one only; the first 3 layers are dense, in Air the
first. Published with a layer more, which predicts a second token.
Source: arXiv:2508.06471; config.json of zai-org/GLM-4.5 and zai-org/GLM-4.5-Air; transformers' Glm4MoeConfig for what
is not said.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import mlx.core as mx
import mlx.nn as nn
from msgspec import Meta

from mlxarch.blocks import Attention, Cache, GatedMLP, RMSNorm, RoPE, Step, causal_lm, swiglu
from mlxarch.blocks.grouped_experts import GroupedExpertsConfig, grouped_experts
from mlxarch.blocks.renames import IgnoreExtraLayers, Stack


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig):
    """transformers 5 keeps the rotary factor among ``rope_parameters``."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    use_qk_norm: bool = False
    norm_topk_prob: bool = True
    partial_rotary_factor: Annotated[float, Meta(gt=0, le=1)] = 0.5

    @property
    def rotated(self) -> int:
        """Features of a head that RoPE turns."""
        return int(self.head_size * self.rotation.number("partial_rotary_factor", self.partial_rotary_factor))


class DecoderLayer(nn.Module):
    """Norm before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        self.self_attn = Attention(
            c, rope=RoPE(c.rotated, c.rotation), norm=norm if c.use_qk_norm else None, bias=c.attention_bias
        )
        dense = GatedMLP(c.hidden_size, c.intermediate_size, swiglu) if index < c.first_k_dense_replace else None
        self.mlp = dense or grouped_experts(c)
        self.input_layernorm, self.post_attention_layernorm = norm(c.hidden_size), norm(c.hidden_size)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), step, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)


WEIGHTS = (IgnoreExtraLayers(), Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."))
