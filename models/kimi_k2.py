"""Kimi K2 (Moonshot AI, 2025), Instruct and Thinking.

    x ─┬─ norm ─ latent attention ─ + ─┬─ norm ─┬─ router ─ 8 of 384 experts ─ + ─ + ─
       │                            │  │        └─ shared expert ──────────────┘   │
       └────────────────────────────┘  └───────────────────────────────────────────┘

Stands out: DeepSeek V3's architecture with half the heads and 1.5 times the experts, not limited to
groups; only the first layer is dense. K2 Thinking is published with experts in 4 bits, as trained.
Source: arXiv:2507.20534; moonshotai/Kimi-K2-Instruct/config.json and
moonshotai/Kimi-K2-Thinking/config.json.
"""

from dataclasses import dataclass
from typing import Literal

from mlxarch.models import deepseek_v3


@dataclass(frozen=True, kw_only=True)
class Config(deepseek_v3.Config):
    """DeepSeek V3's config, without groups of experts."""

    n_group: Literal[1] = 1
    topk_group: Literal[1] = 1


build = deepseek_v3.build
WEIGHTS = deepseek_v3.WEIGHTS
