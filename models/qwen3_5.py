"""Qwen3.5 (Alibaba, 2026), dense and MoE, text decoder; also Qwen3.6 and Qwen3.8.

    x ─┬─ norm ─ gated DeltaNet ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────────┘  └────────────────┘

Stands out: three layers of linear attention (gated DeltaNet), whose state has a fixed size, for each
layer of full attention, whose outputs are gated; RoPE on a quarter of each head; norms with weights
centred at zero, but for the DeltaNet's own. The MoE has many small experts and a gated shared one.
Source: arXiv:2412.06464 (gated DeltaNet); config.json of Qwen/Qwen3.5-27B and Qwen/Qwen3.5-35B-A3B;
transformers' Qwen3_5TextModel and Qwen3_5MoeTextModel.
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
    RoPE,
    SoftmaxTopK,
    ZeroCenteredRMSNorm,
    swiglu,
)
from mlxarch.blocks.config import PartialRoPEConfig
from mlxarch.blocks.moe.shared_experts import GatedSharedMoE
from mlxarch.blocks.recurrent.gated_delta_net import GatedDeltaNetConfig
from mlxarch.blocks.weight_mapping import (
    Ignore,
    Rename,
    SplitRows,
    Stack,
    SubtractOne,
    TransposeTo,
)
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(GatedDeltaNetConfig, PartialRoPEConfig):
    """Config; the MoE has no ``intermediate_size``. Text tokens need no three-axis RoPE."""

    hidden_act: Literal["silu"] = "silu"
    intermediate_size: Count = 0
    attn_output_gate: Literal[True] = True
    partial_rotary_factor: float = 0.25
    num_experts: Count = 0
    num_experts_per_tok: Count = 0
    moe_intermediate_size: Count = 0
    shared_expert_intermediate_size: Count = 0
    mlp_only_layers: tuple[int, ...] = ()

    def check(self) -> None:
        super().check()
        widths = (self.num_experts_per_tok, self.moe_intermediate_size)
        if not all((*widths, self.shared_expert_intermediate_size)[: 3 * bool(self.num_experts)]):
            raise ConfigError(
                "config.json: experts need num_experts_per_tok, moe_intermediate_size and "
                "shared_expert_intermediate_size; take the original model's"
            )


class DecoderLayer(nn.Module):
    """Decoder layer with norms before the token mixer and before the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(ZeroCenteredRMSNorm, eps=c.rms_norm_eps)
        if c.is_linear(index):
            self.linear_attn = GatedDeltaNet(c)
        else:
            self.self_attn = GatedAttention(c, rope=RoPE(c.rope_dims, c.rope), norm=norm)
        sparse = c.num_experts and index not in c.mlp_only_layers
        self.mlp = moe(c) if sparse else GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        mixer = self.linear_attn if "linear_attn" in self else self.self_attn
        x = x + mixer(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def moe(c: Config) -> GatedSharedMoE:
    """Create the experts of one layer, their router and the shared expert."""
    gate = SoftmaxTopK(c.hidden_size, c.num_experts, c.num_experts_per_tok, renormalise=True)
    experts = Experts(c.hidden_size, c.moe_intermediate_size, c.num_experts, swiglu)
    shared = GatedMLP(c.hidden_size, c.shared_expert_intermediate_size, swiglu)
    return GatedSharedMoE(gate, experts, shared)


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    return CausalLM(c, layers, ZeroCenteredRMSNorm(c.hidden_size, c.rms_norm_eps))


PREFIX = "model.language_model."

NORMS = r"(layernorm|[qk]_norm|model\.norm)\.weight$"
WEIGHTS = (
    Ignore(r"^mtp\.", "multi-token prediction head"),
    SubtractOne(NORMS, r"\.conv1d\.weight$"),
    TransposeTo(r"\.conv1d\.weight$", "linear_conv_kernel_dim"),
    Rename(r"(?<=\.experts\.)(gate_up_proj|down_proj)$", r"\1.weight"),
    SplitRows(
        r"\.experts\.gate_up_proj\.weight$",
        (".experts.gate_proj.weight", ".experts.up_proj.weight"),
    ),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.experts.\2."),
    Rename(r"\.mlp\.experts\.", ".mlp.switch_mlp."),
)
