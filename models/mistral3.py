"""Mistral Small 3.1 and 3.2 (Mistral, 2025), text decoder, also Ministral 3.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: Llama 3's decoder inside a vision model, with an untied output head; heads narrower than
hidden_size / heads. Ministral 3 has YaRN, and queries that grow with every multiple of the original
context.
Source: mistralai/Mistral-Small-3.1-24B-Instruct-2503/config.json;
mistralai/Ministral-3-8B-Instruct-2512/config.json; transformers' Ministral3Attention;
arXiv:2501.19399 (growing queries).
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlxarch.blocks import Attention, CausalLM, ForwardContext, causal_lm
from mlxarch.models import llama3


@dataclass(frozen=True, kw_only=True)
class Config(llama3.Config):
    """Config of the text decoder; without a model_type in the wrapper it is a Mistral's."""

    model_type: Literal["mistral", "mistral3", "ministral3"]


class GrowingAttention(Attention):
    """Attention with queries times 1 + beta * ln(1 + floor(position / original context)).

    Otherwise the softmax would flatten over long contexts.
    """

    def __init__(self, c: Config, **options: Any) -> None:
        super().__init__(c, **options)
        self.beta = c.rope.number("llama_4_scaling_beta")
        self.original = c.rope.number("original_max_position_embeddings")

    def apply_positions(
        self, q: mx.array, k: mx.array, context: ForwardContext
    ) -> tuple[mx.array, mx.array]:
        q, k = super().apply_positions(q, k, context)
        # (L,), or (B, L) in a padded batch
        multiples = mx.floor(mx.maximum(context.positions, 0) / self.original)
        growth = 1 + self.beta * mx.log1p(multiples)
        return q * growth.reshape(-1, 1, context.length, 1).astype(q.dtype), k


class DecoderLayer(llama3.DecoderLayer):
    """Llama 3's decoder layer with growing queries, for Ministral 3."""

    attention = GrowingAttention


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    return causal_lm(DecoderLayer if c.model_type == "ministral3" else llama3.DecoderLayer)(c)
