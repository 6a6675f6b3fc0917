"""Grok 2.5 (xAI, 2024).

    x ─┬─ norm ─ attention ─ norm ─ + ─┬─ norm ─┬─ GeGLU ───────────────────┬─ 1/√2 ─ norm ─ + ─
       └─────────────────────────────┘  │        └─ router ─ 2 of 8 experts ─┘                │
                                        └─────────────────────────────────────────────────────┘

Stands out: a dense feed-forward beside the experts; norms on both sides of everything; soft caps on scores, router and
logits; scores that grow with the logarithm of the query's position. It is published in slices for eight ranks, and its
config calls it "git", as another architecture does.
Source: xai-org/grok-2/config.json; grok.py of sglang, with which its maker serves it.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import mlx.core as mx
import mlx.nn as nn
from msgspec import Meta

from mlxarch.blocks import Cache, CausalLM, DecoderConfig, GatedMLP, Held, Mask, Positive, RMSNorm, RoPE, Size, Step
from mlxarch.blocks.attention import Attention
from mlxarch.blocks.feedforward import one_kernel
from mlxarch.blocks.moe import Experts, MoE
from mlxarch.blocks.renames import Join, Rename, Stack
from mlxarch.blocks.routers import SoftmaxTopK
from mlxarch.blocks.scores import attend_by_scores


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """``intermediate_size`` is the dense branch's. RoPE of type "original" is plain, whatever scaling stands by it."""

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
    """Bends x into -limit … limit."""
    return limit * mx.tanh(x / limit)


@one_kernel
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """With the exact gelu."""
    return 0.5 * gate * (1 + mx.erf(gate * math.sqrt(0.5))) * up


class TemperedAttention(Attention):
    """Scores are capped, then multiplied by log(position) / log(length) for the queries behind that length."""

    def __init__(self, c: Config) -> None:
        super().__init__(c, rope=RoPE(c.head_size, c.rotation))
        self.limit, self.length = c.attn_logit_softcapping, c.attn_temperature_len

    def attend(self, q: mx.array, k: Held, v: Held, mask: Mask, step: Step) -> mx.array:
        grown = mx.log(mx.maximum(step.positions, self.length)) / math.log(self.length)  # (L,) or (B, L)
        grown = grown.reshape(-1, 1, 1, q.shape[-2], 1)
        return attend_by_scores(q, k, v, mask, lambda scores: cap(scores * self.scale, self.limit) * grown)


class CappedRouter(SoftmaxTopK):
    """The logits are capped; the chosen experts' weights are not brought to a sum of one."""

    def __init__(self, c: Config) -> None:
        super().__init__(c.hidden_size, c.num_local_experts, c.num_experts_per_tok, renormalise=False)
        self.limit = c.router_logit_softcapping

    def logits(self, x: mx.array) -> mx.array:
        return cap(super().logits(x), self.limit)


class DecoderLayer(nn.Module):
    """Norms before and behind attention, before and behind the two branches of the feed-forward."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.self_attn: Attention = TemperedAttention(c)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, geglu)
        experts = Experts(c.hidden_size, c.moe_intermediate_size, c.num_local_experts, geglu)
        self.block_sparse_moe = MoE(CappedRouter(c), experts)
        self.pre_attn_norm, self.post_attn_norm, self.pre_moe_norm, self.post_moe_norm = norm(), norm(), norm(), norm()

    def branches(self, x: mx.array) -> mx.array:
        return (self.mlp(x) + self.block_sparse_moe(x)) * math.sqrt(0.5)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        x = x + self.post_attn_norm(self.self_attn(self.pre_attn_norm(x), step, cache))
        return x + self.post_moe_norm(self.branches(self.pre_moe_norm(x)))


class Grok2(CausalLM):
    """Embeddings and logits are multiplied, and the logits capped."""

    def __init__(self, c: Config) -> None:
        layers, norm = [DecoderLayer(c) for _ in range(c.num_hidden_layers)], RMSNorm(c.hidden_size, c.rms_norm_eps)
        super().__init__(c, layers, norm, embed_scale=c.embedding_multiplier_scale)
        self.output_scale, self.limit = c.output_multiplier_scale, c.final_logit_softcapping

    def head(self, state: mx.array) -> mx.array:
        return cap(super().head(state) * self.output_scale, self.limit)


build = Grok2

WEIGHTS = (
    Join(r"\.(w[13]\.weight)\.rank(?P<rank>\d+)$", r".\1", axis=-2),
    Join(r"\.(w2\.weight)\.rank(?P<rank>\d+)$", r".\1", axis=-1),
    *(Rename(rf"\.{old}\.", f".{new}_proj.") for old, new in (("w1", "gate"), ("w2", "down"), ("w3", "up"))),
    Stack(r"\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".switch_mlp.\2."),
)
