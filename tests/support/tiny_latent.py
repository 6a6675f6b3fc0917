"""A block of latent attention with random weights."""

from typing import Any

import mlx.core as mx

from mlxarch.blocks import LatentAttention, LatentConfig, RoPE
from mlxarch.blocks.linear import Matrix
from mlxarch.quantization.scheme import Quantization

HEADS = 4
SIZES: dict[str, Any] = dict(
    model_type="deepseek_v3", vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=HEADS, max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=10000.0,
    q_lora_rank=32, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip


def attention(bits: int | None = None, **settings: int | None) -> LatentAttention:
    """With random weights, the matrices of its heads packed if asked."""
    c = LatentConfig.from_dict(SIZES | settings)
    block = LatentAttention(c, RoPE(c.qk_rope_head_dim, c.rope, interleaved=True))
    for index, (_, module) in enumerate(block.named_modules()):
        if isinstance(module, Matrix):
            shape = module.weight.shape
            module.weight = mx.random.normal(shape, key=mx.random.key(index)) * shape[-1] ** -0.5
            if bits is not None and len(shape) == 3:
                module.quantization = Quantization(bits, 32)
                module.weight, module.scales, module.biases = mx.quantize(module.weight, 32, bits)
    return block


def draw(length: int, batch: int = 1, seed: int = 9) -> mx.array:
    return mx.random.normal((batch, length, SIZES["hidden_size"]), key=mx.random.key(seed))
