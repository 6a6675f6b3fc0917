"""Qwen3-Next (Alibaba, 2025), also Qwen3-Coder-Next.

    x ─┬─ norm ─ gated DeltaNet ─ + ─┬─ norm ─┬─ router ─ 10 of 512 experts ─ + ─ + ─
       │                          │  │        └─ shared expert ─ gate ─────────┘   │
       └──────────────────────────┘  └─────────────────────────────────────────────┘

Stands out: three layers of linear attention (gated DeltaNet), whose state has a fixed size, for each
layer of full attention, whose outputs are gated; RoPE on a quarter of each head; 512 small experts
and a gated shared one; norms with weights centred at zero, but for the DeltaNet's own. The rows of
the DeltaNet's projections are grouped by key head.
Source: arXiv:2412.06464 (gated DeltaNet); config.json of Qwen/Qwen3-Next-80B-A3B-Instruct;
transformers' Qwen3NextModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Cache,
    CausalLM,
    Count,
    Experts,
    ForwardContext,
    GatedAttention,
    GatedDeltaNet,
    GatedMLP,
    Linear,
    RoPE,
    Size,
    SoftmaxTopK,
    ZeroCenteredRMSNorm,
    swiglu,
)
from mlxarch.blocks.config import PartialRoPEConfig
from mlxarch.blocks.linear import ExactLinear
from mlxarch.blocks.moe.shared_experts import GatedSharedMoE
from mlxarch.blocks.recurrent.gated_delta_net import GatedDeltaNetConfig, Projections
from mlxarch.blocks.weight_mapping import Ignore, Stack, SubtractOne, TransposeTo


@dataclass(frozen=True, kw_only=True)
class Config(GatedDeltaNetConfig, PartialRoPEConfig):
    """Config; ``intermediate_size`` is the width of dense layers, which published files have not."""

    hidden_act: Literal["silu"] = "silu"
    partial_rotary_factor: float = 0.25
    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    shared_expert_intermediate_size: Size
    norm_topk_prob: bool = True
    decoder_sparse_step: Size = 1
    mlp_only_layers: tuple[int, ...] = ()
    use_sliding_window: Literal[False] = False
    sliding_window: Count | None = None


class GroupedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet whose projections hold, for every key head, what belongs to it."""

    def make_projections(self) -> None:
        c = self.c
        self.in_proj_qkvz = Linear(c.hidden_size, 2 * (c.key_width + c.value_width))
        self.in_proj_ba = ExactLinear(c.hidden_size, 2 * c.linear_num_value_heads)

    def project(self, x: mx.array) -> Projections:
        c = self.c
        groups = c.linear_num_key_heads
        heads = c.linear_num_value_heads // groups
        key = c.linear_key_head_dim
        ends = [key, 2 * key, 2 * key + heads * c.linear_value_head_dim]
        grouped = mx.unflatten(self.in_proj_qkvz(x), -1, (groups, -1))  # (B, L, groups, …)
        q, k, v, gate = (part.flatten(-2) for part in mx.split(grouped, ends, axis=-1))
        write, decay = mx.split(mx.unflatten(self.in_proj_ba(x), -1, (groups, -1)), 2, axis=-1)
        qkv = mx.concatenate([q, k, v], axis=-1)
        return Projections(qkv, gate, write.flatten(-2), decay.flatten(-2))


class DecoderLayer(nn.Module):
    """Decoder layer with norms before the token mixer and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(ZeroCenteredRMSNorm, eps=c.rms_norm_eps)
        if c.is_linear(index):
            self.linear_attn = GroupedDeltaNet(c)
        else:
            self.self_attn = GatedAttention(c, rope=RoPE(c.rope_dims, c.rope), norm=norm)
        sparse = index not in c.mlp_only_layers and (index + 1) % c.decoder_sparse_step == 0
        self.mlp = moe(c) if sparse else GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        mixer = self.linear_attn if "linear_attn" in self else self.self_attn
        x = x + mixer(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def moe(c: Config) -> GatedSharedMoE:
    """Create the experts of one layer, their router and the shared expert."""
    gate = SoftmaxTopK(
        c.hidden_size, c.num_experts, c.num_experts_per_tok, renormalise=c.norm_topk_prob
    )
    experts = Experts(c.hidden_size, c.moe_intermediate_size, c.num_experts, swiglu)
    shared = GatedMLP(c.hidden_size, c.shared_expert_intermediate_size, swiglu)
    return GatedSharedMoE(gate, experts, shared)


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    return CausalLM(c, layers, ZeroCenteredRMSNorm(c.hidden_size, c.rms_norm_eps))


WEIGHTS = (
    Ignore(r"^mtp\.", "multi-token prediction head"),
    SubtractOne(r"(layernorm|[qk]_norm|model\.norm)\.weight$", r"\.conv1d\.weight$"),
    TransposeTo(r"\.conv1d\.weight$", "linear_conv_kernel_dim"),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
)
