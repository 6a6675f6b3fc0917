"""What config.json says of multi-head latent attention."""

from dataclasses import dataclass

from mlxarch.blocks.config import MAX_HEAD_SIZE, DecoderConfig, Size
from mlxarch.blocks.rope import yarn_mscale
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LatentConfig(DecoderConfig):
    """``head_dim``, which transformers 5 writes, means nothing here, nor does ``num_key_value_heads``."""

    q_lora_rank: Size | None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    attention_bias: bool = False

    @property
    def head_size(self) -> int:
        """Features of a query: those without a position, and those that RoPE turns."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def score_scale(self) -> float:
        """1/sqrt(head size), times the square of YaRN's mscale where there is an ``mscale_all_dim``.

        Source: deepseek-ai/DeepSeek-V3, inference/model.py.
        """
        rotation, scale = self.rotation, self.head_size**-0.5
        all_dim = rotation.number("mscale_all_dim", 0) if rotation.kind == "yarn" else 0
        return scale * yarn_mscale(rotation.number("factor"), all_dim) ** 2 if all_dim else scale

    def check(self) -> None:
        """See DecoderConfig. That heads divide the hidden size is not asked for."""
        widest = max(self.head_size, self.v_head_dim, self.kv_lora_rank)
        if widest > MAX_HEAD_SIZE:
            raise ConfigError(
                f"config.json: {widest} features of a head or a latent; at most {MAX_HEAD_SIZE} are allowed"
            )
