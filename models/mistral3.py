"""Mistral Small 3.1 and 3.2 (Mistral, 2025), text part, also Ministral 3.

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ SwiGLU ─ + ─
       └──────────────────────┘  └────────────────┘

Stands out: Llama 3's decoder inside a vision model, with a head of its own; heads narrower than hidden_size / heads.
Ministral 3 has YaRN, and queries that grow each time the position passes a multiple of the original context.
Source: mistralai/Mistral-Small-3.1-24B-Instruct-2503/config.json; mistralai/Ministral-3-8B-Instruct-2512/config.json;
transformers' Ministral3Attention; arXiv:2501.19399 (growing queries).
"""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from mlxarch.blocks import Attention, CausalLM, Step, causal_lm
from mlxarch.models import llama3


@dataclass(frozen=True, kw_only=True)
class Config(llama3.Config):
    """Of the text part; a wrapper that does not name its kind holds a Mistral."""

    model_type: Literal["mistral", "mistral3", "ministral3"]


class GrowingAttention(Attention):
    """Queries times 1 + beta * ln(1 + floor(position / original context)), or attention would blur over distance."""

    def __init__(self, c: Config, **options: Any) -> None:
        super().__init__(c, **options)
        self.beta = c.rotation.number("llama_4_scaling_beta")
        self.original = c.rotation.number("original_max_position_embeddings")

    def turn(self, q: mx.array, k: mx.array, step: Step) -> tuple[mx.array, mx.array]:
        q, k = super().turn(q, k, step)
        passed = mx.floor(mx.maximum(step.positions, 0) / self.original)  # (L,), or (B, L) in a padded batch
        growth = 1 + self.beta * mx.log1p(passed)
        return q * growth.reshape(-1, 1, step.length, 1).astype(q.dtype), k


class DecoderLayer(llama3.DecoderLayer):
    """Llama 3's, for Ministral 3."""

    attention = GrowingAttention


def build(c: Config) -> CausalLM:
    """A model with the right shapes and no weights."""
    return causal_lm(DecoderLayer if c.model_type == "ministral3" else llama3.DecoderLayer)(c)
