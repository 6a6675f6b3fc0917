"""ERNIE 4.5 (Baidu, 2025), dense and MoE.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU or experts ─ + ─
       └──────────────────────┘  └───────────────────────────┘

Stands out: Llama's decoder with interleaved RoPE. The MoE chooses by softmax scores with a bias that
balances the load, beside shared experts; its first layers are dense.
Source: ERNIE 4.5 Technical Report; baidu/ERNIE-4.5-0.3B-PT/config.json and
baidu/ERNIE-4.5-21B-A3B-PT/config.json; transformers' Ernie4_5_MoeModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    Count,
    DecoderConfig,
    Experts,
    ForwardContext,
    GatedMLP,
    MoE,
    RMSNorm,
    RoPE,
    Size,
    SoftmaxTopK,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.moe.routers import top_k_indices
from mlxarch.blocks.weight_mapping import Ignore, Rename, Stack

SMALLEST_SUM = 1e-12  # by which weights are divided


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; experts are in every ``moe_layer_interval``-th layer from start to end, -1 the last."""

    hidden_act: Literal["silu"] = "silu"
    use_bias: bool = False
    moe_num_experts: Count = 0
    moe_k: Count = 0
    moe_intermediate_size: Count = 0
    moe_num_shared_experts: Count = 0
    moe_layer_start_index: Count = 0
    moe_layer_end_index: int = -1
    moe_layer_interval: Size = 1

    def is_sparse(self, index: int) -> bool:
        """Whether the layer at ``index`` has experts."""
        end = self.moe_layer_end_index
        last = self.num_hidden_layers - 1 if end == -1 else end
        due = (index + 1) % self.moe_layer_interval == 0
        return bool(self.moe_num_experts and due and self.moe_layer_start_index <= index <= last)


class BiasedSoftmax(SoftmaxTopK):
    """Softmax scores, of which the k largest are chosen after a bias that balances the load."""

    float32 = ("e_score_correction_bias",)

    def __init__(self, c: Config) -> None:
        super().__init__(c.hidden_size, c.moe_num_experts, c.moe_k, renormalise=True)
        self.e_score_correction_bias = mx.zeros((1, c.moe_num_experts))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = mx.softmax(self.logits(x), axis=-1)
        chosen = top_k_indices(scores + self["e_score_correction_bias"], self.k)
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return chosen, weights / mx.maximum(weights.sum(-1, keepdims=True), SMALLEST_SUM)


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        rope = RoPE(c.head_size, c.rope, interleaved=True)
        self.self_attn = Attention(c, rope=rope, bias=c.use_bias, output_bias=c.use_bias)
        if c.is_sparse(index):
            width = c.moe_intermediate_size
            experts = Experts(c.hidden_size, width, c.moe_num_experts, swiglu, c.use_bias)
            shared = width * c.moe_num_shared_experts
            mlp = GatedMLP(c.hidden_size, shared, swiglu, c.use_bias) if shared else None
            self.mlp = MoE(BiasedSoftmax(c), experts, mlp)
        else:
            self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu, c.use_bias)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)

WEIGHTS = (
    Ignore(r"^model\.mtp_", "multi-token prediction head"),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
    Rename(r"\.mlp\.moe_statics\.", ".mlp.gate."),
)
SAVED = (Rename(r"\.mlp\.gate\.e_score", ".mlp.moe_statics.e_score"),)
