"""DeepSeek V2 (DeepSeek, 2024), also V2 Lite and V2.5.

    x ─┬─ norm ─ latent attention ─ + ─┬─ norm ─┬─ router ─ 6 of 160 experts ─ + ─ + ─
       │                            │  │        └─ 2 shared experts ───────────┘   │
       └────────────────────────────┘  └───────────────────────────────────────────┘

Stands out: the first multi-head latent attention; experts chosen by softmax, in the large model within the best 3 of
8 groups, and their weights do not sum to one; the first layer is dense. In Lite, queries have no latent of their own.
Source: arXiv:2405.04434; config.json of deepseek-ai/DeepSeek-V2 and deepseek-ai/DeepSeek-V2-Lite.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Cache, GatedMLP, LatentAttention, LatentConfig, RMSNorm, RoPE, Step, causal_lm, swiglu
from mlxarch.blocks.grouped_experts import GroupedExpertsConfig, grouped_experts
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.renames import Stack
from mlxarch.blocks.routers import GroupLimitedSoftmax


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, LatentConfig):
    """Renormalised weights are refused: DeepSeek's own code and transformers' disagree on them, and no model has them.
    Without a method the experts are chosen greedily (transformers' DeepseekV2Config).
    """

    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["softmax"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    norm_topk_prob: Literal[False] = False
    moe_layer_freq: Literal[1] = 1

    @property
    def groups(self) -> tuple[int, int]:
        """See GroupedExpertsConfig."""
        return (1, 1) if self.topk_method == "greedy" else super().groups


class HeadPairs(Matrix):
    """Two matrices for each head, N rows that make its keys and V that make its values: (H · (N + V), rank)."""

    def __init__(self, c: LatentConfig) -> None:
        self.heads = c.num_attention_heads
        super().__init__(self.heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)

    def __call__(self, x: mx.array, heads: slice, rows: slice, transpose: bool = True) -> mx.array:
        arrays = {name: mx.unflatten(array, 0, (self.heads, -1))[heads, rows] for name, array in self.items()}
        return self.product(x, arrays, transpose)


class PairedLatentAttention(LatentAttention):
    """Keys and values come from the one matrix of the checkpoint, which quantized copies hold as well."""

    def make_head_matrices(self, c: LatentConfig) -> None:
        self.kv_b_proj = HeadPairs(c)
        self.for_keys, self.for_values = slice(c.qk_nope_head_dim), slice(c.qk_nope_head_dim, None)

    def to_latent(self, q: mx.array, heads: slice) -> mx.array:
        return self.kv_b_proj(q, heads, self.for_keys, transpose=False)

    def to_keys(self, latents: mx.array, heads: slice) -> mx.array:
        return self.kv_b_proj(latents, heads, self.for_keys)

    def to_values(self, latents: mx.array, heads: slice) -> mx.array:
        return self.kv_b_proj(latents, heads, self.for_values)


class DecoderLayer(nn.Module):
    """Norm before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.self_attn = PairedLatentAttention(c, RoPE(c.qk_rope_head_dim, c.rotation, interleaved=True))
        sparse = index >= c.first_k_dense_replace
        self.mlp = (
            grouped_experts(c, GroupLimitedSoftmax) if sparse else GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        )
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), step, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)


WEIGHTS = (Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),)
