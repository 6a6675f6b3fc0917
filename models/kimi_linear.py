"""Kimi Linear (Moonshot AI, 2025).

    x ─┬─ norm ─ KDA or latent attention ─ + ─┬─ norm ─┬─ router ─ 8 of 256 experts ─ + ─ + ─
       │                                   │  │        └─ shared expert ──────────────┘   │
       └───────────────────────────────────┘  └───────────────────────────────────────────┘

Stands out: three layers of linear attention (Kimi Delta Attention), whose state has a fixed size and
forgets each feature at a rate of its own, for each layer of latent attention, which has no
positions (NoPE); experts as in DeepSeek V3; the first layer is dense.
Source: arXiv:2510.26692; moonshotai/Kimi-Linear-48B-A3B-Instruct/config.json; transformers'
KimiLinearModel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Cache,
    ForwardContext,
    GatedMLP,
    LatentAttention,
    LatentConfig,
    NoRoPE,
    RMSNorm,
    causal_lm,
    swiglu,
)
from mlxarch.blocks.moe.shared_experts import GroupedExpertsConfig, make_grouped_moe
from mlxarch.blocks.recurrent.kimi_delta_attention import KDASizes, KimiDeltaAttention
from mlxarch.blocks.weight_mapping import Flatten, Rename, SplitHeads, Stack, TransposeTo
from mlxarch.errors import ConfigError

LINEAR_KEYS = ("kda_layers", "num_heads", "head_dim", "short_conv_kernel_size")


@dataclass(frozen=True, kw_only=True)
class Config(GroupedExpertsConfig, LatentConfig):
    """Config; ``linear_attn_config`` counts the layers from 1."""

    aliases: ClassVar = {
        "model_max_length": "max_position_embeddings",
        "moe_renormalize": "norm_topk_prob",
        "num_expert_group": "n_group",
        "num_experts": "n_routed_experts",
        "num_experts_per_token": "num_experts_per_tok",
        "num_shared_experts": "n_shared_experts",
    }

    hidden_act: Literal["silu"] = "silu"
    linear_attn_config: dict[str, Any]
    layer_types: tuple[Literal["linear_attention", "full_attention"], ...] | None = None
    moe_router_activation_func: Literal["sigmoid"] = "sigmoid"
    moe_layer_freq: Literal[1] = 1

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys; transformers 5 may write sizes and kinds of layers without the others."""
        found = dict(config)
        kinds = config.get("layer_types")
        if "linear_attn_config" not in config and isinstance(kinds, list):
            found["linear_attn_config"] = {
                "kda_layers": [n for n, kind in enumerate(kinds, 1) if kind == "linear_attention"],
                "num_heads": config.get("linear_num_heads"),
                "head_dim": config.get("linear_head_dim"),
                "short_conv_kernel_size": config.get("linear_conv_kernel_dim"),
            }
        return super().from_dict(found)

    def is_linear(self, index: int) -> bool:
        """Whether the layer at ``index`` is a KDA; the others have latent attention."""
        return index + 1 in self.linear_attn_config["kda_layers"]

    @property
    def score_scale(self) -> float:
        """1/sqrt(head size), as there are no positions that could be scaled."""
        return self.head_size**-0.5

    @property
    def kernel(self) -> int:
        """Inputs that a convolution sees."""
        return self.linear_attn_config["short_conv_kernel_size"]

    @property
    def kda(self) -> KDASizes:
        """Sizes of the KDA layers."""
        found = self.linear_attn_config
        return KDASizes(heads=found["num_heads"], head_size=found["head_dim"], kernel=self.kernel)

    def check(self) -> None:
        super().check()
        found = self.linear_attn_config
        sizes = [found.get(key) for key in LINEAR_KEYS[1:]]
        layers = found.get("kda_layers")
        if not isinstance(layers, list) or not all(type(n) is int and n > 0 for n in sizes):
            raise ConfigError(
                f"config.json: linear_attn_config must hold {', '.join(LINEAR_KEYS)}, positive "
                f"integers but for the list, found {found!r}"
            )


class DecoderLayer(nn.Module):
    """Decoder layer with norms before the token mixer and before the experts."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        if c.is_linear(index):
            self.self_attn = KimiDeltaAttention(c.hidden_size, c.kda, c.rms_norm_eps)
        else:
            self.self_attn = LatentAttention(c, NoRoPE())
        if index < c.first_k_dense_replace:
            self.mlp = GatedMLP(c.hidden_size, c.intermediate_size, swiglu)
        else:
            self.mlp = make_grouped_moe(c)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), context, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


build = causal_lm(DecoderLayer)

WEIGHTS = (
    Rename(r"\.block_sparse_moe\.", ".mlp."),
    Rename(r"\.mlp\.e_score_correction_bias$", ".mlp.gate.e_score_correction_bias"),
    Rename(r"_conv\.conv\.weight$", "_conv1d.weight"),
    TransposeTo(r"_conv1d\.weight$", "kernel"),
    Flatten(r"\.A_log$"),
    Rename(r"\.w1\.", ".gate_proj."),
    Rename(r"\.w2\.", ".down_proj."),
    Rename(r"\.w3\.", ".up_proj."),
    Stack(r"\.mlp\.experts\.(?P<expert>\d+)\.(\w+_proj)\.", r".mlp.switch_mlp.\2."),
    SplitHeads(
        r"\.kv_b_proj\.weight$",
        (".embed_q.weight", ".unembed_out.weight"),
        ("qk_nope_head_dim", "v_head_dim"),
    ),
)
