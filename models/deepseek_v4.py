"""DeepSeek V4 (DeepSeek, 2026), Flash and Pro.

    x ─┬─ mix ─ norm ─ compressed attention ─ + ─┬─ mix ─ norm ─┬─ router ─ 6 of 256 experts ─ + ─ + ─
       │                                      │  │              └─ shared expert ──────────────┘   │
       └────────── mix of 4 streams ──────────┘  └─────────────── mix of 4 streams ────────────────┘

Stands out: one vector per token is key and value of all heads; a query sees a window of 128 tokens,
and entries that stand for 4 tokens, of which an indexer chooses 512, or for 128 tokens; outputs are
rotated back; four residual streams; the first layers choose experts by the token alone.
Source: deepseek-ai/DeepSeek-V4-Flash/config.json and inference/model.py; transformers'
DeepseekV4Model.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Cache,
    CausalLM,
    Count,
    Experts,
    ForwardContext,
    GatedMLP,
    MoE,
    Positive,
    RMSNorm,
    RoPE,
    RoPEConfig,
    Router,
    Size,
)
from mlxarch.blocks.feed_forward import clamped_swiglu
from mlxarch.blocks.moe.routers import top_k_indices
from mlxarch.blocks.residual_streams.sinkhorn import (
    StreamConnection,
    StreamsConfig,
    normalised,
    weighted_sum,
)
from mlxarch.blocks.sparse.compressed_attention import (
    CompressedAttention,
    CompressedAttentionConfig,
)
from mlxarch.blocks.weight_mapping import Ignore, IgnoreExtraLayers, Rename, Stack
from mlxarch.errors import ConfigError

TOKENS = "tokens"  # ids of a pass (B, L), in ``ForwardContext.shared``
SLIDING, CHOSEN, HEAVY = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
LayerType = Literal[
    "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
]
RATES = {0: SLIDING, 4: CHOSEN, 128: HEAVY}


@dataclass(frozen=True, kw_only=True)
class Config(StreamsConfig, CompressedAttentionConfig):
    """Config; ``compress_ratios`` names the kind of each layer by its published rate."""

    hidden_act: Literal["silu"] = "silu"
    intermediate_size: Count = 0
    partial_rotary_factor: float | None = None  # of qk_rope_head_dim, which says it too
    compress_ratios: tuple[int, ...] | None = None
    compress_rates: dict[str, Size] | None = None
    compress_rope_theta: Positive
    layer_types: tuple[LayerType, ...] | None = None
    mlp_layer_types: tuple[Literal["hash_moe", "moe"], ...] | None = None
    num_hash_layers: Count = 0
    moe_intermediate_size: Size
    n_routed_experts: Size
    n_shared_experts: Size
    num_experts_per_tok: Size
    norm_topk_prob: Literal[True] = True
    scoring_func: Literal["sqrtsoftplus"]
    routed_scaling_factor: Positive
    swiglu_limit: Positive

    @property
    def rope(self) -> RoPEConfig:
        return self.rope_for("compress")

    def rope_for(self, layer_type: str) -> RoPEConfig:
        """RoPE of windows alone ("main"), or of layers with entries ("compress")."""
        section: dict[str, Any] = dict((self.rope_parameters or {}).get(layer_type) or {})
        if not section and layer_type == "main":
            section = {"rope_theta": self.rope_theta}
        if not section:
            section = {**(self.rope_scaling or {}), "rope_theta": self.compress_rope_theta}
        if layer_type == "compress":
            section["attention_factor"] = 1.0
        return self.complete_rope(section)

    def kind(self, index: int) -> str:
        """Kind of attention of the layer at ``index``."""
        if self.layer_types is not None:
            return self.layer_types[index]
        return RATES[(self.compress_ratios or ())[index]]

    def rate(self, kind: str) -> int | None:
        """Tokens of an entry in layers of a kind; None without entries."""
        published = {name: rate for rate, name in RATES.items() if rate}
        return (published | (self.compress_rates or {})).get(kind)

    def is_hashed(self, index: int) -> bool:
        """Whether the layer at ``index`` chooses experts by the token."""
        if self.mlp_layer_types is not None:
            return self.mlp_layer_types[index] == "hash_moe"
        return index < self.num_hash_layers

    def check(self) -> None:
        super().check()
        kinds = self.layer_types or self.compress_ratios or ()
        if len(kinds) < self.num_hidden_layers or not set(self.compress_ratios or ()) <= {*RATES}:
            raise ConfigError(
                "config.json: compress_ratios must hold 0, 4 or 128 for each of "
                f"{self.num_hidden_layers} layers, or layer_types a kind; found {list(kinds)}"
            )
        if self.num_attention_heads % self.o_groups:
            raise ConfigError(
                f"config.json: num_attention_heads = {self.num_attention_heads} must be a multiple "
                f"of o_groups = {self.o_groups}"
            )


class TokenRouter(Router):
    """Weights by sqrt(softplus(x)); experts by the weights and a bias, or by the token's row."""

    float32 = ("e_score_correction_bias",)

    @property
    def integers(self) -> dict[str, int]:
        """Parameters that are indices, with the first index that is too large."""
        return {"tid2eid": self.weight.shape[0]}

    def __init__(self, c: Config, hashed: bool) -> None:
        super().__init__(c.hidden_size, c.n_routed_experts)
        self.k = c.num_experts_per_tok
        self.scale = c.routed_scaling_factor
        if hashed:
            self.tid2eid = mx.zeros((c.vocab_size, self.k), mx.int64)
        else:
            self.e_score_correction_bias = mx.zeros((c.n_routed_experts,))

    def route(self, x: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """Experts (B, L, k) and weights for inputs (B, L, dim) of tokens (B, L)."""
        scores = mx.sqrt(nn.softplus(self.logits(x)))
        if "tid2eid" in self:
            chosen = self["tid2eid"][tokens]
        else:
            chosen = top_k_indices(scores + self["e_score_correction_bias"], self.k)
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return chosen, weights / (weights.sum(-1, keepdims=True) + 1e-20) * self.scale


class TokenMoE(MoE):
    """Experts whose router may look at the token."""

    def __call__(self, x: mx.array, tokens: mx.array) -> mx.array:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.combine(x, *cast(TokenRouter, self.gate).route(x, tokens))


class DecoderLayer(nn.Module):
    """Decoder layer between streams, with norms before attention and before the experts."""

    residual_outputs = ()

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        kind = c.kind(index)
        rope = RoPE(
            c.qk_rope_head_dim,
            c.rope_for("main" if kind == SLIDING else "compress"),
            interleaved=True,
        )
        self.attn = CompressedAttention(c, rope, c.rate(kind), kind == CHOSEN)
        width = c.moe_intermediate_size
        activation = clamped_swiglu(c.swiglu_limit)
        experts = Experts(c.hidden_size, width, c.n_routed_experts, activation)
        shared = GatedMLP(c.hidden_size, width * c.n_shared_experts, activation)
        self.ffn = TokenMoE(TokenRouter(c, c.is_hashed(index)), experts, shared)
        self.attn_norm = norm()
        self.ffn_norm = norm()
        self.hc_attn = StreamConnection(c)
        self.hc_ffn = StreamConnection(c)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        connection = self.hc_attn(x)
        out = self.attn(self.attn_norm(connection.inputs), context, cache)
        x = self.hc_attn.write(x, connection, out)
        connection = self.hc_ffn(x)
        out = self.ffn(self.ffn_norm(connection.inputs), context.shared[TOKENS])
        return self.hc_ffn.write(x, connection, out)


class StreamsNorm(RMSNorm):
    """Norm of a sum of the streams, whose weights depend on all of them."""

    float32 = ("fn", "base", "scale")

    def __init__(self, c: Config) -> None:
        super().__init__(c.hidden_size, c.rms_norm_eps)
        self.fn = mx.zeros((c.hc_mult, c.hc_mult * c.hidden_size))
        self.base = mx.zeros((c.hc_mult,))
        self.scale = mx.ones((1,))
        self.hc_eps = c.hc_eps

    def __call__(self, x: mx.array) -> mx.array:
        logits = normalised(x, self.eps) @ self["fn"].T * self["scale"] + self["base"]
        return super().__call__(weighted_sum(x, mx.sigmoid(logits) + self.hc_eps))


class StreamsLM(CausalLM):
    """Language model with several residual streams."""

    def __init__(self, c: Config) -> None:
        layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
        super().__init__(c, layers, StreamsNorm(c))
        self.streams = c.hc_mult

    def embed(self, tokens: mx.array, context: ForwardContext) -> mx.array:
        context.shared[TOKENS] = tokens
        return mx.tile(super().embed(tokens, context), (1, 1, self.streams))


build = StreamsLM

WEIGHTS = (
    IgnoreExtraLayers(),
    Ignore(r"^(model\.)?mtp\.", "multi-token prediction head"),
    Rename(r"^model\.embed\.", "model.embed_tokens."),
    Rename(r"^model\.head\.", "lm_head."),
    Rename(r"^model\.hc_head_", "model.norm."),
    Rename(r"\.hc_(attn|ffn)_(fn|base|scale)$", r".hc_\1.\2"),
    Rename(r"\.ffn\.gate\.bias$", ".ffn.gate.e_score_correction_bias"),
    *(
        Stack(rf"\.ffn\.experts\.(?P<expert>\d+)\.{published}\.", rf".ffn.switch_mlp.{name}.")
        for published, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
    ),
    Rename(r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    Rename(r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    Rename(r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
)
