"""DeepSeek V3.2 (DeepSeek, 2025), also V3.2-Exp.

    x ─┬─ norm ─┬─ latent attention ─ + ─┬─ norm ─┬─ router ─ 8 of 256 experts ─ + ─ + ─
       │        └─ indexer ─┘         │  │        └─ shared expert ──────────────┘   │
       └──────────────────────────────┘  └───────────────────────────────────────────┘

Stands out: DeepSeek V3 with sparse attention: an indexer with one small key per token chooses the
2048 tokens that a query attends to, so that long contexts cost little. Published in float8, with an
extra layer that predicts a second token (MTP).
Source: DeepSeek-V3.2 technical report (arXiv:2512.02556); deepseek-ai/DeepSeek-V3.2-Exp/config.json
and inference/model.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Cache, ForwardContext, GatedMLP, RMSNorm, RoPE, causal_lm, swiglu
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, make_grouped_moe
from mlxarch.blocks.sparse.lightning_indexer import IndexedLatentConfig, IndexedLayers
from mlxarch.blocks.sparse.sparse_latent_attention import SparseLatentAttention
from mlxarch.blocks.weight_mapping import IgnoreExtraLayers, SplitHeads, Stack


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, IndexedLatentConfig):
    """Config; ``indexer_rope_interleave`` pairs the indexer's features, never those of attention."""

    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    rope_interleave: Literal[True] = True
    indexer_rope_interleave: bool = False
    moe_layer_freq: Literal[1] = 1
    layer_types: IndexedLayers = None


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        index_rope = RoPE(c.qk_rope_head_dim, c.rope, interleaved=c.indexer_rope_interleave)
        self.self_attn = SparseLatentAttention(
            c,
            RoPE(c.qk_rope_head_dim, c.rope, interleaved=True),
            index_rope,
            shares_choice=c.shares_choice(index),
        )
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
