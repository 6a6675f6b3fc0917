"""Keys of config.json that describe multi-head latent attention."""

from dataclasses import dataclass

from mlxarch.blocks.config import MAX_HEAD_SIZE, DecoderConfig, Size
from mlxarch.blocks.rope import yarn_mscale
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LatentConfig(DecoderConfig):
    """Config of a decoder with multi-head latent attention.

    ``head_dim``, which transformers 5 writes, and ``num_key_value_heads`` have no meaning here.
    """

    q_lora_rank: Size | None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    attention_bias: bool = False

    @property
    def head_size(self) -> int:
        """Features of a query: those without a position and those with RoPE."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def score_scale(self) -> float:
        """1/sqrt(head size), times the square of YaRN's mscale if ``mscale_all_dim`` is set.

        Source: deepseek-ai/DeepSeek-V3, inference/model.py.
        """
        scale = self.head_size**-0.5
        all_dim = self.rope.number("mscale_all_dim", 0) if self.rope.type == "yarn" else 0
        if not all_dim:
            return scale
        return scale * yarn_mscale(self.rope.number("factor"), all_dim) ** 2

    def check(self) -> None:
        """Check the sizes; heads need not divide the hidden size.

        Raises:
            ConfigError: a head or a latent is too wide.
        """
        widest = max(self.head_size, self.v_head_dim, self.kv_lora_rank)
        if widest > MAX_HEAD_SIZE:
            raise ConfigError(
                f"config.json: {widest} features of a head or a latent; at most {MAX_HEAD_SIZE} "
                "are allowed"
            )
