"""Lightning indexer of DeepSeek Sparse Attention: small heads that score every earlier token."""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention.latent_config import LatentConfig
from mlxarch.blocks.config import Count, Size
from mlxarch.blocks.linear import ExactLinear
from mlxarch.blocks.norms import LayerNorm
from mlxarch.blocks.rope import NoRoPE, RoPE
from mlxarch.errors import ConfigError

IndexedLayers = tuple[Literal["indexed_attention", "deepseek_sparse_attention"], ...] | None
"""``layer_types`` of a model in which every layer has an indexer or takes the choice of another."""

KEY_NORM_EPS = 1e-6  # transformers' DeepseekV32Indexer; rms_norm_eps is that of the other norms


@dataclass(frozen=True, kw_only=True)
class IndexedLatentConfig(LatentConfig):
    """Config of a decoder whose latent attention reads the tokens that an indexer chooses.

    Attributes:
        indexer_types: for each layer, "full" with an indexer of its own, or "shared" with the
            choice of the last layer that has one. Without it every ``index_topk_freq``-th layer is
            full, and all before ``index_skip_topk_offset``.
    """

    q_lora_rank: Size  # the indexer reads the queries' latents
    index_head_dim: Size
    index_n_heads: Size
    index_topk: Size
    indexer_types: tuple[Literal["full", "shared"], ...] | None = None
    index_topk_freq: Size = 1
    index_skip_topk_offset: Count = 0
    index_topk_pattern: None = None

    def shares_choice(self, index: int) -> bool:
        """Whether the layer at ``index`` takes the choice of an earlier layer."""
        if self.indexer_types is not None:
            return self.indexer_types[index] == "shared"
        return max(index + 1 - self.index_skip_topk_offset, 0) % self.index_topk_freq != 0

    def check(self) -> None:
        super().check()
        layers = self.num_hidden_layers
        if self.indexer_types is not None and len(self.indexer_types) != layers:
            raise ConfigError(
                f"config.json: indexer_types has {len(self.indexer_types)} values, and "
                f"num_hidden_layers is {layers}; there must be one for each layer"
            )
        if self.shares_choice(0):
            raise ConfigError(
                "config.json: indexer_types or index_skip_topk_offset makes the first layer share "
                "the choice of an earlier one; it must be 'full'"
            )
        if self.qk_rope_head_dim > self.index_head_dim:
            raise ConfigError(
                f"config.json: qk_rope_head_dim = {self.qk_rope_head_dim} is larger than "
                f"index_head_dim = {self.index_head_dim}; RoPE turns that many features of an "
                "index key"
            )


class LightningIndexer(nn.Module):
    """Score of a token: sum over heads of weight * relu(query · key), all small and unquantized.

    One key per token serves all heads. The first features of queries and keys have RoPE. The
    Hadamard rotation of the published code changes no score and is left out.
    Source: DeepSeek-V3.2 technical report; deepseek-ai/DeepSeek-V3.2-Exp, inference/model.py.

    Args:
        rope: position embedding of the first features; its pairing may differ from attention's.

    Shape:
        x: (B, L, hidden_size), q_latents: (B, L, q_lora_rank) -> keys (B, 1, L, D), queries
        (B, H, L, D), weights (B, L, H)
    """

    def __init__(self, c: IndexedLatentConfig, rope: RoPE | NoRoPE) -> None:
        super().__init__()
        heads = c.index_n_heads
        self.wq_b = ExactLinear(c.q_lora_rank, heads * c.index_head_dim)
        self.wk = ExactLinear(c.hidden_size, c.index_head_dim)
        self.k_norm = LayerNorm(c.index_head_dim, KEY_NORM_EPS)
        self.weights_proj = ExactLinear(c.hidden_size, heads)
        self.rope = rope
        self.scale = (heads * c.index_head_dim) ** -0.5

    def __call__(
        self, x: mx.array, q_latents: mx.array, offset: int | mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        heads, _ = self.weights_proj.weight.shape
        q = mx.unflatten(self.wq_b(q_latents), -1, (heads, -1)).swapaxes(1, 2)  # (B, H, L, D)
        k = self.k_norm(self.wk(x))[:, None]  # (B, 1, L, D)
        weights = self.weights_proj(x).astype(mx.float32) * self.scale
        return self.rope(k, offset), self.rope(q, offset), weights
