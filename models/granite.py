"""Granite 3 and 4 (IBM, 2025), dense and hybrid with experts.

    x ─┬─ norm ─ attention or Mamba-2 ─ + ─┬─ norm ─ SwiGLU and experts ─ + ─
       └───────────────────────────────┘  └────────────────────────────┘

Stands out: factors for embeddings, for what is added to the residual stream, for the scores, in
place of 1/sqrt(head size), and for the logits. Granite 4 H has Mamba-2 in most layers, whose state
has a fixed size, attention without positions (NoPE) in the others, and beside a dense feed-forward
in its larger models experts, whose weights are the softmax of the chosen scores.
Source: ibm-granite/granite-3.3-8b-instruct/config.json and
ibm-granite/granite-4.0-h-tiny/config.json; transformers' GraniteModel and GraniteMoeHybridModel.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Attention,
    Cache,
    CausalLM,
    Count,
    Experts,
    ForwardContext,
    GatedMLP,
    Mamba2,
    Mamba2Config,
    MoE,
    NoRoPE,
    Positive,
    RMSNorm,
    RoPE,
    Size,
    swiglu,
)
from mlxarch.blocks.moe.moe import TopK
from mlxarch.blocks.weight_mapping import Rename, SplitRows, TransposeTo
from mlxarch.errors import ConfigError

LayerType = Literal["mamba", "linear_attention", "attention", "full_attention"]


@dataclass(frozen=True, kw_only=True)
class Config(Mamba2Config):
    """Config; ``intermediate_size`` is the width of an expert in the hybrid."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0
    layer_types: tuple[LayerType, ...] | None = None
    position_embedding_type: Literal["rope", "nope"] | None = "rope"
    normalization_function: Literal["rmsnorm"] = "rmsnorm"
    shared_intermediate_size: Size | None = None
    num_local_experts: Count = 0
    num_experts_per_tok: Count = 0

    def is_mamba(self, index: int) -> bool:
        """Whether the layer at ``index`` is a Mamba-2; the others have attention."""
        return self.layer_types is not None and "attention" not in self.layer_types[index].replace(
            "linear_attention", "mamba"
        )

    def check(self) -> None:
        super().check()
        if len(self.layer_types or range(self.num_hidden_layers)) != self.num_hidden_layers:
            raise ConfigError("config.json: layer_types must have one value for each layer")


class DecoderLayer(nn.Module):
    """Decoder layer whose branches are scaled before they are added."""

    residual_outputs = ()  # they are multiplied

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.factor = c.residual_multiplier
        if c.is_mamba(index):
            self.mamba = Mamba2(c.hidden_size, c.mamba, c.rms_norm_eps)
        else:
            positions = c.position_embedding_type == "rope"
            self.self_attn = Attention(
                c,
                rope=RoPE(c.head_size, c.rope) if positions else NoRoPE(),
                scale=c.attention_multiplier,
                bias=c.attention_bias,
                output_bias=c.attention_bias,
            )
        if c.num_local_experts:
            softmax = partial(mx.softmax, axis=-1)
            count = c.num_local_experts
            gate = TopK(c.hidden_size, count, c.num_experts_per_tok, weight_function=softmax)
            experts = Experts(c.hidden_size, c.intermediate_size, count, swiglu)
            self.block_sparse_moe = MoE(gate, experts)
        width = c.shared_intermediate_size or c.intermediate_size
        self.mlp = GatedMLP(c.hidden_size, width, swiglu, c.mlp_bias)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        mixer = self.mamba if "mamba" in self else self.self_attn
        x = x + self.factor * mixer(self.input_layernorm(x), context, cache)
        y = self.post_attention_layernorm(x)
        mixed = self.mlp(y)
        if "block_sparse_moe" in self:
            mixed = self.block_sparse_moe(y) + mixed
        return x + self.factor * mixed


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
    scale = c.embedding_multiplier
    return CausalLM(c, layers, norm, embed_scale=scale, logit_scale=1 / c.logits_scaling)


HALVES = (".gate_proj.weight", ".up_proj.weight")
WEIGHTS = (
    TransposeTo(r"\.conv1d\.weight$", "mamba_d_conv"),
    Rename(r"\.router\.layer\.", ".gate."),
    Rename(r"\.shared_mlp\.", ".mlp."),
    Rename(r"\.block_sparse_moe\.(?=(in|out)put_linear)", ".block_sparse_moe.switch_mlp."),
    SplitRows(r"\.input_linear\.weight$", HALVES),
    Rename(r"\.output_linear\.", ".down_proj."),
)
