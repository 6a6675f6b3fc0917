"""Grok 2.5 (xAI, 2024).

    x ─┬─ norm ─ attention ─ norm ─ + ─┬─ norm ─┬─ GeGLU ───────────────────┬─ 1/√2 ─ norm ─ + ─
       └─────────────────────────────┘  │        └─ router ─ 2 of 8 experts ─┘                │
                                        └─────────────────────────────────────────────────────┘

Stands out: a dense feed-forward beside the experts; norms before and after attention and
feed-forward; soft caps on scores, router and logits; scores that grow with the logarithm of the
query's position. Published in slices for eight ranks; its model_type is "git", like that of another
architecture.
Source: xai-org/grok-2/config.json; grok.py of sglang, with which xAI serves it.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import mlx.core as mx
import mlx.nn as nn
from msgspec import Meta

from mlxarch.blocks import (
    Cache,
    CausalLM,
    DecoderConfig,
    ForwardContext,
    GatedMLP,
    KVArray,
    Mask,
    Positive,
    ResidualOutput,
    RMSNorm,
    RoPE,
    Size,
)
from mlxarch.blocks.attention.attention import Attention
from mlxarch.blocks.attention.blockwise import attend_blockwise
from mlxarch.blocks.feed_forward import compile_elementwise
from mlxarch.blocks.moe.moe import Experts, MoE
from mlxarch.blocks.moe.routers import SoftmaxTopK
from mlxarch.blocks.weight_mapping import Join, Rename, Stack


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config; ``intermediate_size`` is the width of the dense branch.

    RoPE of type "original" has no scaling, whatever other keys say.
    """

    hidden_act: Literal["gelu"] = "gelu"
    moe_intermediate_size: Size
    num_local_experts: Size
    num_experts_per_tok: Size
    residual_moe: Literal[True]
    attn_logit_softcapping: Positive
    router_logit_softcapping: Positive
    final_logit_softcapping: Positive
    attn_temperature_len: Annotated[int, Meta(ge=2)]
    embedding_multiplier_scale: float
    output_multiplier_scale: float
    rope_type: Literal["original"]
    sliding_window_size: Literal[-1] = -1


def cap(x: mx.array, limit: float) -> mx.array:
    """Soft cap: limit * tanh(x / limit)."""
    return limit * mx.tanh(x / limit)


@compile_elementwise
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, with the exact GELU."""
    return 0.5 * gate * (1 + mx.erf(gate * math.sqrt(0.5))) * up


class TemperedAttention(Attention):
    """Attention with capped scores, times log(position) / log(length) for positions > length."""

    def __init__(self, c: Config) -> None:
        super().__init__(c, rope=RoPE(c.head_size, c.rope))
        self.limit = c.attn_logit_softcapping
        self.length = c.attn_temperature_len

    def attend(
        self,
        q: mx.array,
        k: KVArray,
        v: KVArray,
        mask: Mask,
        context: ForwardContext,
        *index: Any,
    ) -> mx.array:
        # (L,), or (B, L) in a padded batch
        temperature = mx.log(mx.maximum(context.positions, self.length)) / math.log(self.length)
        temperature = temperature.reshape(-1, 1, 1, q.shape[-2], 1)
        return attend_blockwise(
            q, k, v, mask, lambda scores: cap(scores * self.scale, self.limit) * temperature
        )


class CappedRouter(SoftmaxTopK):
    """Router with capped logits; the weights of the chosen experts are not renormalised."""

    def __init__(self, c: Config) -> None:
        super().__init__(
            c.hidden_size, c.num_local_experts, c.num_experts_per_tok, renormalise=False
        )
        self.limit = c.router_logit_softcapping

    def logits(self, x: mx.array) -> mx.array:
        return cap(super().logits(x), self.limit)


class DecoderLayer(nn.Module):
    """Decoder layer with norms before and after attention and the two feed-forward branches."""

    # the two feed-forward branches share a norm
    residual_outputs = (ResidualOutput("self_attn", "post_attn_norm"),)

    def __init__(self, c: Config) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.self_attn: Attention = TemperedAttention(c)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, geglu)
        experts = Experts(c.hidden_size, c.moe_intermediate_size, c.num_local_experts, geglu)
        self.block_sparse_moe = MoE(CappedRouter(c), experts)
        self.pre_attn_norm = norm()
        self.post_attn_norm = norm()
        self.pre_moe_norm = norm()
        self.post_moe_norm = norm()

    def feed_forward(self, x: mx.array) -> mx.array:
        """Sum of the dense branch and the experts, times 1/sqrt(2)."""
        return (self.mlp(x) + self.block_sparse_moe(x)) * math.sqrt(0.5)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.post_attn_norm(self.self_attn(self.pre_attn_norm(x), context, cache))
        return x + self.post_moe_norm(self.feed_forward(self.pre_moe_norm(x)))


class Grok2(CausalLM):
    """Model with scaled embeddings, and with logits that are scaled and capped."""

    def __init__(self, c: Config) -> None:
        layers = [DecoderLayer(c) for _ in range(c.num_hidden_layers)]
        norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        super().__init__(c, layers, norm, embed_scale=c.embedding_multiplier_scale)
        self.output_scale = c.output_multiplier_scale
        self.limit = c.final_logit_softcapping

    def head(self, state: mx.array) -> mx.array:
        """Compute logits: last hidden state (B, L, hidden_size) -> (B, L, V)."""
        return cap(super().head(state) * self.output_scale, self.limit)


build = Grok2

WEIGHTS = (
    Join(r"\.(w[13]\.weight)\.rank(?P<rank>\d+)$", r".\1", axis=-2),
    Join(r"\.(w2\.weight)\.rank(?P<rank>\d+)$", r".\1", axis=-1),
    *(
        Rename(rf"\.{old}\.", f".{new}_proj.")
        for old, new in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
    ),
    Stack(r"\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".switch_mlp.\2."),
)
