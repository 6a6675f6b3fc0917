"""North Mini Code (Cohere, 2026), Cohere 2 with experts.

    x ─┬─ norm ─┬─ attention ─────────────────────┬─ + ─
       │        ├─ router ─ 8 of 128 experts ─ + ─┤   │
       │        └─ shared expert ──────────────┘  │   │
       └──────────────────────────────────────────┴───┘

Stands out: attention and experts in parallel behind one norm; the weights of experts are computed
from the chosen scores alone; shared and routed experts are averaged; the first layers are dense, and
may have full attention with RoPE; otherwise three sliding layers with interleaved RoPE for each full
one without positions (NoPE).
Source: config.json of CohereLabs' North-Mini-Code-1.0; transformers' Cohere2MoeModel, and its
config.json keys.
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
    LayerNorm,
    LayerTypesConfig,
    MoE,
    NoRoPE,
    Positive,
    RMSNorm,
    RoPE,
    Size,
    swiglu,
)
from mlxarch.blocks.moe.moe import TopK
from mlxarch.blocks.weight_mapping import Stack


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig):
    """Config; norms are RMS norms where the file has an epsilon for them."""

    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    logit_scale: Positive
    layer_norm_eps: Positive = 1e-5
    rms_norm_eps: Positive | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    sliding_window_pattern: Size = 4
    first_k_dense_replace: Count = 0
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    prefix_dense_intermediate_size: Size | None = None
    prefix_dense_sliding_window_pattern: Size | None = None
    num_experts: Size
    num_experts_per_tok: Size
    num_shared_experts: Count = 0
    expert_selection_fn: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    shared_expert_combination_strategy: Literal["average", "sum"] = "average"
    tie_word_embeddings: bool = True

    def is_dense(self, index: int) -> bool:
        """Whether the layer at ``index`` is one of the dense first ones."""
        if self.mlp_layer_types is not None:
            return self.mlp_layer_types[index] == "dense"
        return index < self.first_k_dense_replace

    def default_layer_type(self, index: int) -> Literal["sliding_attention", "full_attention"]:
        period = self.sliding_window_pattern
        if self.is_dense(index):
            period = self.prefix_dense_sliding_window_pattern or period
        else:
            index -= self.first_k_dense_replace
        return "sliding_attention" if (index + 1) % period else "full_attention"

    def has_rope(self, index: int) -> bool:
        """Whether the layer at ``index`` has RoPE: sliding ones, and dense ones that are all full."""
        every = self.is_dense(index) and self.prefix_dense_sliding_window_pattern == 1
        return every or self.layer_type(index) == "sliding_attention"

    def check(self) -> None:
        super().check()
        self.check_length("mlp_layer_types", self.mlp_layer_types)

    @property
    def make_norm(self) -> partial[nn.Module]:
        """Constructor of a norm of the hidden state."""
        if self.rms_norm_eps is not None:
            return partial(RMSNorm, self.hidden_size, self.rms_norm_eps)
        return partial(LayerNorm, self.hidden_size, self.layer_norm_eps, bias=False)


def sigmoid_shares(logits: mx.array) -> mx.array:
    """Sigmoids of the chosen logits, divided by their sum."""
    scores = mx.sigmoid(logits)
    return scores / scores.sum(-1, keepdims=True)


class AveragedMoE(MoE):
    """Routed and shared experts, averaged or added."""

    def __init__(self, c: Config) -> None:
        functions = {"softmax": partial(mx.softmax, axis=-1), "sigmoid": mx.sigmoid}
        function = functions[c.expert_selection_fn]
        if c.expert_selection_fn == "sigmoid" and c.norm_topk_prob:
            function = sigmoid_shares
        width = c.intermediate_size
        gate = TopK(c.hidden_size, c.num_experts, c.num_experts_per_tok, weight_function=function)
        shared = width * c.num_shared_experts
        super().__init__(
            gate,
            Experts(c.hidden_size, width, c.num_experts, swiglu),
            GatedMLP(c.hidden_size, shared, swiglu) if shared else None,
        )
        average = shared and c.shared_expert_combination_strategy == "average"
        self.factor = 0.5 if average else 1.0

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) * self.factor


class DecoderLayer(nn.Module):
    """Decoder layer whose attention and experts see the same norm."""

    residual_outputs = ()  # the experts' output is multiplied

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(
            c,
            rope=RoPE(c.head_size, c.rope, interleaved=True) if c.has_rope(index) else NoRoPE(),
            span=c.span(index),
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        if c.is_dense(index):
            width = c.prefix_dense_intermediate_size or c.intermediate_size
            self.mlp = GatedMLP(c.hidden_size, width, swiglu)
        else:
            self.mlp = AveragedMoE(c)
        self.input_layernorm = c.make_norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        y = self.input_layernorm(x)
        return x + self.self_attn(y, context, cache) + self.mlp(y)


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    return CausalLM(c, layers, c.make_norm(), logit_scale=c.logit_scale)


WEIGHTS = (Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),)
