"""Qwen3 MoE (Alibaba, 2025), also Qwen1.5 MoE, Qwen2 MoE, and the text decoder of Qwen3-VL MoE.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ router ─ 8 of 128 experts ─ + ─
       └──────────────────────┘  └───────────────────────────────────┘

Stands out: many small experts, none of them shared; QK-norm on every head. Qwen2 MoE has biases on
queries, keys and values instead, and a shared expert behind a gate.
Source: arXiv:2505.09388; config.json of Qwen/Qwen3-30B-A3B and Qwen/Qwen1.5-MoE-A2.7B.
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
from mlxarch.blocks.moe.shared_experts import GatedSharedMoE
from mlxarch.blocks.weight_mapping import Rename, SplitRows, Stack, TransposeTo


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; transformers 5 writes ``num_local_experts`` for ``num_experts``.

    Published files switch the sliding window off.
    """

    hidden_act: Literal["silu"] = "silu"
    moe_intermediate_size: Size
    num_experts: Count = 0
    num_local_experts: Count = 0
    num_experts_per_tok: Size
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: tuple[int, ...] = ()
    shared_expert_intermediate_size: Count | None = None
    attention_bias: bool = False
    qkv_bias: bool = True
    use_sliding_window: Literal[False] = False
    sliding_window: int | None = None

    @property
    def renormalises(self) -> bool:
        """Whether the weights of the chosen experts are divided by their sum; always in VL models."""
        return self.norm_topk_prob or self.model_type.startswith("qwen3_vl")


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        attention = partial(Attention, c, rope=RoPE(c.head_size, c.rope))
        if c.model_type == "qwen2_moe":
            self.self_attn = attention(bias=c.qkv_bias)
        else:
            self.self_attn = attention(
                norm=norm, bias=c.attention_bias, output_bias=c.attention_bias
            )
        sparse = index not in c.mlp_only_layers and (index + 1) % c.decoder_sparse_step == 0
        self.mlp = moe(c) if sparse else GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def moe(c: Config) -> MoE:
    """Create the experts of one layer and their router."""
    experts = c.num_experts or c.num_local_experts
    gate = SoftmaxTopK(c.hidden_size, experts, c.num_experts_per_tok, renormalise=c.renormalises)
    switch_mlp = Experts(c.hidden_size, c.moe_intermediate_size, experts, swiglu)
    if c.shared_expert_intermediate_size:
        shared = GatedMLP(c.hidden_size, c.shared_expert_intermediate_size, swiglu)
        return GatedSharedMoE(gate, switch_mlp, shared)
    return MoE(gate, switch_mlp)


build = causal_lm(DecoderLayer)


WEIGHTS = (
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
    # Qwen3-VL publishes the experts of a layer in one tensor, as (E, in, out)
    TransposeTo(r"\.experts\.gate_up_proj$", "hidden_size", swap_square=True),
    TransposeTo(r"\.experts\.down_proj$", "moe_intermediate_size", swap_square=True),
    Rename(r"\.experts\.(gate_up_proj|down_proj)$", r".switch_mlp.\1.weight"),
    SplitRows(r"\.gate_up_proj\.weight$", (".gate_proj.weight", ".up_proj.weight")),
)
