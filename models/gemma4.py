"""Gemma 4 (Google, 2026), text decoder: dense, E2B and E4B, MoE, and the unified 12B.

    x ─┬─ norm ─ attention ─ norm ─ + ─┬─ norm ─ GeGLU ─ norm ─ + ─┬─ per-layer ─ + ─ scale ─
       └─────────────────────────────┘  └──────────────────────┘  └────────────┘

Stands out: full layers have wider heads than sliding ones, fewer KV heads, RoPE on a quarter of the
head, and in large models values that are the keys before their norm; scores are not scaled; a factor
for the output of every layer. E2B and E4B see an embedding of the token for every layer, and their
last layers reuse keys and values of earlier ones. The MoE adds experts to the dense feed-forward.
Source: config.json of google/gemma-4-E2B-it, google/gemma-4-26B-A4B-it and google/gemma-4-31B-it;
transformers' Gemma4TextModel; each file's config.json.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Cache, CausalLM, Experts, ForwardContext, GatedMLP, Linear, RMSNorm, RoPE
from mlxarch.blocks.attention.shared_kv_attention import SharedKVAttention, SharedKVConfig
from mlxarch.blocks.config import Count, Positive, Size
from mlxarch.blocks.feed_forward import geglu
from mlxarch.blocks.layer import ResidualOutput
from mlxarch.blocks.moe.routers import ScaledSoftmaxTopK
from mlxarch.blocks.per_layer_embeddings import PerLayerEmbeddingLM
from mlxarch.blocks.weight_mapping import IgnoreFrom, Rename, SplitRows
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(SharedKVConfig):
    """Config; full layers have ``global_head_dim``, or their own keys in ``per_layer_config``."""

    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_k_eq_v: bool = False
    final_logit_softcapping: Positive | None = None
    use_bidirectional_attention: Literal["vision", False] | None = None  # between images only
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: Count | None = 0
    vocab_size_per_layer_input: Size | None = None
    enable_moe_block: bool = False
    num_experts: Size | None = None
    top_k_experts: Size | None = None
    moe_intermediate_size: Size | None = None
    tie_word_embeddings: bool = True
    partial_rotary_factor: None = None  # stands in rope_parameters, for proportional RoPE

    def check(self) -> None:
        super().check()
        experts = (self.num_experts, self.top_k_experts, self.moe_intermediate_size)
        if self.enable_moe_block and not all(experts):
            raise ConfigError(
                "config.json: enable_moe_block needs num_experts, top_k_experts and "
                "moe_intermediate_size; take the original model's"
            )


class DecoderLayer(nn.Module):
    """Decoder layer with norms before and after attention and feed-forward."""

    residual_outputs = (ResidualOutput("self_attn", "post_attention_layernorm"),)

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.index = index
        shares = index >= c.first_sharing_layer
        own = c.for_layer(index)
        full = c.layer_type(index) == "full_attention"
        self.self_attn = SharedKVAttention(
            own,
            rope=RoPE(own.head_size, c.rope_for(c.layer_type(index))),
            span=c.span(index),
            shares_kv=shares,
            values_are_keys=full and c.attention_k_eq_v,
        )
        wide = shares and c.use_double_wide_mlp
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size * (1 + wide), geglu)
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        self.layer_scalar = mx.ones((1,))
        if c.enable_moe_block:
            self.router = ScaledSoftmaxTopK(
                c.hidden_size, c.num_experts or 0, c.top_k_experts or 0, c.rms_norm_eps
            )
            width = c.moe_intermediate_size or 0
            self.experts = Experts(c.hidden_size, width, c.num_experts or 0, geglu)
            self.post_feedforward_layernorm_1 = norm()
            self.pre_feedforward_layernorm_2 = norm()
            self.post_feedforward_layernorm_2 = norm()
        if c.hidden_size_per_layer_input:
            self.per_layer_input_gate = Linear(c.hidden_size, c.hidden_size_per_layer_input)
            self.per_layer_projection = Linear(c.hidden_size_per_layer_input, c.hidden_size)
            self.post_per_layer_input_norm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        attention = self.self_attn(self.input_layernorm(x), context, cache)
        x = x + self.post_attention_layernorm(attention)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        if "router" in self:
            y = self.post_feedforward_layernorm_1(y) + self.mix_experts(x)
        x = x + self.post_feedforward_layernorm(y)
        if "per_layer_input_gate" in self:
            embedding = context.shared["embeddings"][:, :, self.index]
            y = self.per_layer_projection(geglu(self.per_layer_input_gate(x), embedding))
            x = x + self.post_per_layer_input_norm(y)
        return x * self["layer_scalar"]

    def mix_experts(self, x: mx.array) -> mx.array:
        """Weighted sum of the chosen experts' outputs, normalised."""
        chosen, weights = self.router(x)
        y = self.experts(self.pre_feedforward_layernorm_2(x), chosen)
        return self.post_feedforward_layernorm_2((y * weights[..., None].astype(x.dtype)).sum(-2))


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
    cap = c.final_logit_softcapping
    model = PerLayerEmbeddingLM(c, layers, norm, embed_scale=c.hidden_size**0.5, softcap=cap)
    if c.hidden_size_per_layer_input:
        rows = c.vocab_size_per_layer_input or c.vocab_size
        model.add_per_layer_embeddings(rows, c.hidden_size_per_layer_input, c.rms_norm_eps)
    return model


PREFIX = "model.language_model."

WEIGHTS = (
    IgnoreFrom(
        "first_sharing_layer",
        r"\.self_attn\.[kv]_(proj|norm)\.",
        "keys and values of sharing layers",
        carried=True,
    ),
    Rename(r"\.router\.proj\.weight$", ".router.weight"),
    Rename(r"\.router\.scale$", ".router.input_scale"),
    Rename(r"(?<=\.experts\.)(gate_up_proj|down_proj)$", r"\1.weight"),
    SplitRows(
        r"\.experts\.gate_up_proj\.weight$",
        (".experts.gate_proj.weight", ".experts.up_proj.weight"),
    ),
    Rename(r"\.experts\.switch_glu\.", ".experts."),
)
