"""DeepSeek V3 (DeepSeek, 2024), also R1, V3.1, and GLM-4.7 Flash.

    x ─┬─ norm ─ latent attention ─ + ─┬─ norm ─┬─ router ─ 8 of 256 experts ─ + ─ + ─
       │                            │  │        └─ shared expert ──────────────┘   │
       └────────────────────────────┘  └───────────────────────────────────────────┘

Stands out: multi-head latent attention, which caches 576 numbers per token for all of 128 heads;
many small experts beside a shared one, chosen within 4 of 8 groups by sigmoid scores, with a bias
that balances their load; the first 3 layers are dense. Published in float8, with an extra layer
that predicts a second token (MTP).
Source: arXiv:2412.19437; deepseek-ai/DeepSeek-V3/config.json and inference/model.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Cache, ForwardContext, GatedMLP, RMSNorm, RoPE, causal_lm, swiglu
from mlxarch.blocks.attention.latent_attention import LatentAttention
from mlxarch.blocks.attention.latent_config import LatentConfig
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, make_grouped_moe
from mlxarch.blocks.weight_mapping import IgnoreExtraLayers, SplitHeads, Stack


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, LatentConfig):
    """Config; transformers' DeepseekV3Config lacks the keys for how experts are chosen."""

    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    rope_interleave: Literal[True] = True
    moe_layer_freq: Literal[1] = 1


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        self.self_attn = LatentAttention(c, RoPE(c.qk_rope_head_dim, c.rope, interleaved=True))
        dense = index < c.first_k_dense_replace
        self.mlp = (
            GatedMLP(c.hidden_size, c.intermediate_size, swiglu) if dense else make_grouped_moe(c)
        )
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)


WEIGHTS = (
    IgnoreExtraLayers(),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
    SplitHeads(
        r"\.kv_b_proj\.weight$",
        (".embed_q.weight", ".unembed_out.weight"),
        ("qk_nope_head_dim", "v_head_dim"),
    ),
)
