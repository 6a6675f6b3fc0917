"""OLMo 2 (Ai2, 2024), also OLMo 3.

    x ─┬─ attention ─ norm ─ + ─┬─ SwiGLU ─ norm ─ + ─
       └──────────────────────┘  └─────────────────┘

Stands out: the norms come after attention and feed-forward, inside the residual; QK-norm over the whole projection.
OLMo 3 has a window on three of four layers, and YaRN on the others only.
Source: arXiv:2501.00656; config.json of allenai/OLMo-2-1124-7B and allenai/Olmo-3-1025-7B; transformers' Olmo3Config.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Attention, Cache, GatedMLP, LayerTypesConfig, RMSNorm, Step, causal_lm, swiglu
from mlxarch.blocks.rope import RoPE, Rotation
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(LayerTypesConfig):
    """No biases anywhere. The window and the kinds of layers are OLMo 3's."""

    hidden_act: Literal["silu"] = "silu"

    def usual_kind(self, index: int) -> Literal["sliding_attention", "full_attention"]:
        return "sliding_attention" if self.model_type == "olmo3" and (index + 1) % 4 else "full_attention"

    def rotation_of(self, kind: str) -> Rotation:
        found, own = super().rotation_of(kind), (self.rope_parameters or {}).get(kind)
        return found if own or kind == "full_attention" else Rotation(found.theta)

    def check(self) -> None:
        super().check()
        if self.model_type == "olmo2" and self.sliding_window:
            raise ConfigError(f"config.json: OLMo 2 has no window, found sliding_window = {self.sliding_window}")


class DecoderLayer(nn.Module):
    """Norm after attention and after the feed-forward."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, eps=c.rms_norm_eps)
        rope = RoPE(c.head_size, c.rotation_of(c.kind(index)))
        self.self_attn = Attention(c, rope=rope, span=c.span(index), norm=norm, qk_norm="projection")
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        self.post_attention_layernorm, self.post_feedforward_layernorm = norm(c.hidden_size), norm(c.hidden_size)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(x, step, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x))


build = causal_lm(DecoderLayer)
