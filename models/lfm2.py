"""LFM2 (Liquid AI, 2025), dense and MoE, also LFM2.5.

    x ─┬─ norm ─ short convolution ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └─────────────────────────────┘  └────────────────┘

Stands out: most layers mix tokens by a gated convolution over three of them, and a few by attention
with QK-norm; tied embeddings. The MoE has sigmoid scores with a bias that balances the load, and
dense first layers.
Source: LiquidAI/LFM2-1.2B/config.json and LiquidAI/LFM2-8B-A1B/config.json; transformers' Lfm2Model
and Lfm2MoeModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

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
    GroupLimitedSigmoid,
    MoE,
    Positive,
    ResidualOutput,
    RMSNorm,
    RoPE,
    ShortConvolution,
    Size,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.weight_mapping import Rename, Stack, TransposeTo
from mlxarch.errors import ConfigError

LayerType = Literal["conv", "full_attention"]


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; ``intermediate_size`` is before its adjustment, where there is one."""

    aliases: ClassVar = {
        "norm_eps": "rms_norm_eps",
        "block_ff_dim": "intermediate_size",
        "tie_embedding": "tie_word_embeddings",
    }

    layer_types: tuple[LayerType, ...] | None = None
    full_attn_idxs: tuple[int, ...] = ()
    conv_L_cache: Size
    conv_bias: bool = False
    block_auto_adjust_ff_dim: bool = False
    block_ffn_dim_multiplier: Positive | None = 1.0
    block_multiple_of: Size = 256
    tie_word_embeddings: bool = True
    num_experts: Count = 0
    num_experts_per_tok: Count = 0
    num_dense_layers: Count = 0
    moe_intermediate_size: Count = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0
    use_expert_bias: Literal[True] = True

    def is_convolution(self, index: int) -> bool:
        """Whether the layer at ``index`` has a convolution; the others have attention."""
        if self.layer_types is not None:
            return self.layer_types[index] == "conv"
        return index not in self.full_attn_idxs

    @property
    def dense_width(self) -> int:
        """Width of a dense feed-forward: two thirds of the given one, rounded up, if adjusted."""
        if not self.block_auto_adjust_ff_dim:
            return self.intermediate_size
        width = int(int(2 * self.intermediate_size / 3) * (self.block_ffn_dim_multiplier or 1))
        return -(-width // self.block_multiple_of) * self.block_multiple_of

    def check(self) -> None:
        super().check()
        if len(self.layer_types or range(self.num_hidden_layers)) != self.num_hidden_layers:
            raise ConfigError("config.json: layer_types must have one value for each layer")


class DecoderLayer(nn.Module):
    """Decoder layer with norms before the token mixer and before the feed-forward."""

    residual_outputs = tuple(map(ResidualOutput, ("conv", "self_attn", "feed_forward")))

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        if c.is_convolution(index):
            self.conv = ShortConvolution(c.hidden_size, c.conv_L_cache, c.conv_bias)
        else:
            self.self_attn = Attention(c, rope=RoPE(c.head_size, c.rope), norm=norm)
        sparse = c.num_experts and index >= c.num_dense_layers
        self.feed_forward = moe(c) if sparse else GatedMLP(c.hidden_size, c.dense_width, swiglu)
        self.operator_norm = norm(c.hidden_size)
        self.ffn_norm = norm(c.hidden_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        mixer = self.conv if "conv" in self else self.self_attn
        x = x + mixer(self.operator_norm(x), context, cache)
        return x + self.feed_forward(self.ffn_norm(x))


def moe(c: Config) -> MoE:
    """Create the experts of one layer and their router."""
    gate = GroupLimitedSigmoid(
        c.hidden_size,
        c.num_experts,
        c.num_experts_per_tok,
        renormalise=c.norm_topk_prob,
        scale=c.routed_scaling_factor,
        eps=1e-6,
    )
    return MoE(gate, Experts(c.hidden_size, c.moe_intermediate_size, c.num_experts, swiglu))


build = causal_lm(DecoderLayer)

HALVES = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
WEIGHTS = (
    TransposeTo(r"\.conv\.conv\.weight$", "conv_L_cache"),
    *(
        Stack(rf"\.experts\.(?P<expert>\d+)\.{published}\.", rf".switch_mlp.{ours}.")
        for published, ours in HALVES
    ),
    *(Rename(rf"\.feed_forward\.{name}\.", f".feed_forward.{ours}.") for name, ours in HALVES),
    Rename(r"^model\.embedding_norm\.", "model.norm."),
    Rename(r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    Rename(r"\.self_attn\.([qk])_layernorm\.", r".self_attn.\1_norm."),
    Rename(r"\.feed_forward\.expert_bias$", ".feed_forward.gate.e_score_correction_bias"),
)
SAVED = (
    *(Rename(rf"\.feed_forward\.{ours}\.", f".feed_forward.{name}.") for name, ours in HALVES),
    Rename(r"^model\.norm\.", "model.embedding_norm."),
    Rename(r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    Rename(r"\.self_attn\.([qk])_norm\.", r".self_attn.\1_layernorm."),
    Rename(r"\.feed_forward\.gate\.e_score_correction_bias$", ".feed_forward.expert_bias"),
)
