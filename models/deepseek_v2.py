"""DeepSeek V2 (DeepSeek, 2024), also V2 Lite and V2.5.

    x ─┬─ norm ─ latent attention ─ + ─┬─ norm ─┬─ router ─ 6 of 160 experts ─ + ─ + ─
       │                            │  │        └─ 2 shared experts ───────────┘   │
       └────────────────────────────┘  └───────────────────────────────────────────┘

Stands out: the first multi-head latent attention; experts chosen by softmax, in the large model
within the best 3 of 8 groups, with weights that do not sum to one; the first layer is dense. In
Lite, queries have no latent.
Source: arXiv:2405.04434; config.json of deepseek-ai/DeepSeek-V2 and deepseek-ai/DeepSeek-V2-Lite.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

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
    causal_lm,
    swiglu,
)
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.moe.routers import GroupLimitedSoftmax
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, make_grouped_moe
from mlxarch.blocks.weight_mapping import Stack


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, LatentConfig):
    """Config; without ``topk_method`` experts are chosen greedily (transformers' DeepseekV2Config).

    Renormalised weights are refused: DeepSeek's own code and transformers' disagree on them, and no
    published model has them.
    """

    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["softmax"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    norm_topk_prob: Literal[False] = False
    moe_layer_freq: Literal[1] = 1

    @property
    def groups(self) -> tuple[int, int]:
        """Number of groups, and groups per token; greedy choice has a single group."""
        return (1, 1) if self.topk_method == "greedy" else super().groups


class HeadPairs(Matrix):
    """Up-projections of all heads in one matrix, (H · (N + V), rank): to keys (N) and values (V)."""

    def __init__(self, c: LatentConfig) -> None:
        self.heads = c.num_attention_heads
        super().__init__(self.heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)

    def __call__(self, x: mx.array, heads: slice, rows: slice, transpose: bool = True) -> mx.array:
        arrays = {
            name: mx.unflatten(array, 0, (self.heads, -1))[heads, rows]
            for name, array in self.items()
        }
        return self.matmul(x, arrays, transpose)


class PairedLatentAttention(LatentAttention):
    """Latent attention with both up-projections in one matrix, as in the checkpoint.

    Published quantized copies contain the matrix in this form.
    """

    def make_up_projections(self, c: LatentConfig) -> None:
        self.kv_b_proj = HeadPairs(c)
        self.key_rows = slice(c.qk_nope_head_dim)
        self.value_rows = slice(c.qk_nope_head_dim, None)

    def queries_to_latent(self, q_nope: mx.array, heads: slice) -> mx.array:
        return self.kv_b_proj(q_nope, heads, self.key_rows, transpose=False)

    def latents_to_keys(self, latents: mx.array, heads: slice) -> mx.array:
        return self.kv_b_proj(latents, heads, self.key_rows)

    def latents_to_values(self, latents: mx.array, heads: slice) -> mx.array:
        return self.kv_b_proj(latents, heads, self.value_rows)


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.self_attn = PairedLatentAttention(
            c, RoPE(c.qk_rope_head_dim, c.rope, interleaved=True)
        )
        if index < c.first_k_dense_replace:
            self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        else:
            self.mlp = make_grouped_moe(c, GroupLimitedSoftmax)
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)


WEIGHTS = (Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),)
