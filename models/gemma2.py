"""Gemma 2 (Google, 2024).

    x ─┬─ norm ─ attention, capped ─ norm ─ + ─┬─ norm ─ GeGLU ─ norm ─ + ─
       └──────────────────────────────────────┘  └───────────────────────┘

Stands out: attention scores and logits are squeezed through a tanh; norms on both sides of attention and feed-forward,
their weights around zero; sliding and full layers take turns; embeddings times sqrt(hidden_size).
Source: arXiv:2408.00118; google/gemma-2-2b/config.json; transformers' Gemma2Config.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Attention, Cache, CausalLM, GatedMLP, Positive, RoPE, Size, Step, ZeroCenteredRMSNorm, geglu
from mlxarch.blocks.layer_types import AlternatingConfig


@dataclass(frozen=True, kw_only=True)
class Config(AlternatingConfig):
    """The head is tied unless the file says otherwise, as in transformers' Gemma2Config."""

    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    query_pre_attn_scalar: Positive
    attn_logit_softcapping: Positive | None
    final_logit_softcapping: Positive | None
    sliding_window_pattern: Size = 2
    tie_word_embeddings: bool = True


class DecoderLayer(nn.Module):
    """Norms before and after attention, before and after the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(
            c,
            rope=RoPE(c.head_size, c.rotation),
            span=c.span(index),
            scale=c.query_pre_attn_scalar**-0.5,
            softcap=c.attn_logit_softcapping,
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, geglu)
        norm = partial(ZeroCenteredRMSNorm, c.hidden_size, c.rms_norm_eps)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), step, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


def build(c: Config) -> CausalLM:
    """A model with the right shapes and no weights."""
    norm = ZeroCenteredRMSNorm(c.hidden_size, c.rms_norm_eps)
    layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
    return CausalLM(c, layers, norm, embed_scale=c.hidden_size**0.5, softcap=c.final_logit_softcapping)
