"""MiniMax M2 (MiniMax, 2025).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ router ─ 8 of 256 experts ─ + ─
       └──────────────────────┘  └───────────────────────────────────┘

Stands out: QK-norm over the whole projection; RoPE on half of each head; sigmoid scores with a bias
that balances the load; no shared expert. Published in float8.
Source: MiniMaxAI/MiniMax-M2/config.json; transformers' MiniMaxM2Model.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    Experts,
    ForwardContext,
    GroupLimitedSigmoid,
    MoE,
    ResidualOutput,
    RMSNorm,
    RoPE,
    Size,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.config import PartialRoPEConfig
from mlxarch.blocks.weight_mapping import Ignore, IgnoreExtraLayers, Rename, Stack


@dataclass(frozen=True, kw_only=True)
class Config(PartialRoPEConfig):
    """Config; published files give the features with RoPE as ``rotary_dim``."""

    hidden_act: Literal["silu"] = "silu"
    rotary_dim: Size | None = None
    num_local_experts: Size
    num_experts_per_tok: Size
    scoring_func: Literal["sigmoid"] = "sigmoid"
    use_qk_norm: Literal[True] = True
    use_routing_bias: Literal[True] = True
    shared_intermediate_size: Literal[0] = 0

    @property
    def rope_dims(self) -> int:
        return self.rotary_dim or super().rope_dims


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the experts."""

    residual_outputs = (ResidualOutput("self_attn"), ResidualOutput("block_sparse_moe"))

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        rope = RoPE(c.rope_dims, c.rope)
        self.self_attn = Attention(c, rope=rope, norm=norm, qk_norm="projection")
        experts = c.num_local_experts
        gate = GroupLimitedSigmoid(c.hidden_size, experts, c.num_experts_per_tok)
        switch_mlp = Experts(c.hidden_size, c.intermediate_size, experts, swiglu)
        self.block_sparse_moe = MoE(gate, switch_mlp)
        self.input_layernorm = norm(c.hidden_size)
        self.post_attention_layernorm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)

BIAS = "block_sparse_moe.e_score_correction_bias"
OWN_BIAS = "block_sparse_moe.gate.e_score_correction_bias"
WEIGHTS = (
    IgnoreExtraLayers(),
    Ignore(r"^(model\.)?mtp", "multi-token prediction head"),
    *(
        Stack(rf"\.experts\.(?P<expert>\d+)\.{published}\.", rf".switch_mlp.{name}.")
        for published, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    ),
    Rename(BIAS, OWN_BIAS),
)
SAVED = (Rename(OWN_BIAS, BIAS),)
