"""GLM-5 (Z.ai, 2026), also GLM-5.1 and 5.2.

    x ─┬─ norm ─┬─ latent attention ─ + ─┬─ norm ─┬─ router ─ 8 of 256 experts ─ + ─ + ─
       │        └─ indexer ─┘         │  │        └─ shared expert ──────────────┘   │
       └──────────────────────────────┘  └───────────────────────────────────────────┘

Stands out: DeepSeek V3.2 without groups of experts; RoPE turns pairs of neighbours in the indexer
too; from GLM-5.2 on most layers attend to the tokens that an earlier layer chose.
Source: zai-org/GLM-5/config.json; transformers' GlmMoeDsaModel.
"""

from dataclasses import dataclass
from typing import Literal

from mlxarch.models import deepseek_v32


@dataclass(frozen=True, kw_only=True)
class Config(deepseek_v32.Config):
    """Config of DeepSeek V3.2 with one group of experts."""

    n_group: Literal[1] = 1
    topk_group: Literal[1] = 1
    indexer_rope_interleave: bool = True


build = deepseek_v32.build
WEIGHTS = deepseek_v32.WEIGHTS
