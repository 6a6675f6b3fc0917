"""Peak memory of prefilling long prompts through two layers of DeepSeek V3's shape, with random weights.

    python benchmarks/mla_memory.py                  # on a GPU: 128 heads; prompts of 2048, 8192 and 32768 tokens
    python benchmarks/mla_memory.py --small          # on a CPU: 32 heads; 512, 2048 and 8192 tokens
    python benchmarks/mla_memory.py --small --whole  # all heads at once, which shows that the measurement notices

The prompt runs in chunks, as in a generation. Memory is counted above that of the weights, the cache of both layers
included. It exits with 1 if it grows faster than the context.
"""

import argparse
import sys
import time
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlxarch.blocks import CausalLM, fuse
from mlxarch.blocks.attention import latent_attention
from mlxarch.generation.prefill import default_chunk
from mlxarch.loading.registry import architecture

DEEPSEEK_V3: dict[str, Any] = dict(
    model_type="deepseek_v3", vocab_size=1024, hidden_size=7168, intermediate_size=18432, num_hidden_layers=2,
    num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, first_k_dense_replace=2, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, n_group=8,
    topk_group=4, moe_intermediate_size=2048, norm_topk_prob=True, routed_scaling_factor=2.5, rms_norm_eps=1e-6,
    max_position_embeddings=163840, rope_theta=10000.0, tie_word_embeddings=False,
    rope_scaling=dict(
        type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
        original_max_position_embeddings=4096,
    ),
)  # fmt: skip
SMALL: dict[str, Any] = dict(
    hidden_size=512, intermediate_size=1024, num_attention_heads=32, q_lora_rank=192, kv_lora_rank=64,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contexts", nargs="*", type=int, help="tokens of the prompts")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--whole", action="store_true", help="all heads at once")
    parser.add_argument(
        "--chunk", type=int, help="tokens that run at once; by default as in a generation"
    )
    options = parser.parse_args()
    contexts = sorted(options.contexts) or (
        [512, 2048, 8192] if options.small else [2048, 8192, 32768]
    )
    chunk = options.chunk or (256 if options.small else default_chunk())
    if options.whole:
        latent_attention.MAX_SCORES = 2**30 * 16
    elif options.small:
        latent_attention.MAX_SCORES = 2**20
    shape = DEEPSEEK_V3 | (SMALL if options.small else {})
    model = random_model(shape)
    heads, width = shape["num_attention_heads"], 4 if mx.default_device() == mx.cpu else 2
    print(f"MLX {mx.__version__}, {mx.default_device()}; {heads} heads, chunks of {chunk} tokens")
    print("tokens    seconds  peak, MB  of it cache, MB  scores of a layer at once, MB")
    peaks = []
    for context in contexts:
        peak, cache, seconds = prefill(model, context, min(chunk, context))
        peaks.append(peak)
        scores = heads * min(chunk, context) * context * width
        print(
            f"{context:6d} {seconds:10.1f} {peak / 1e6:9.0f} {cache / 1e6:16.1f} {scores / 1e6:30.0f}",
            flush=True,
        )
    growth = peaks[-1] / peaks[0], contexts[-1] / contexts[0]
    print(f"context grows by {growth[1]:.1f}, memory by {growth[0]:.1f}")
    sys.exit(growth[0] > growth[1])


def random_model(shape: dict[str, Any]) -> CausalLM:
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16

    def draw(x: mx.array) -> mx.array:
        return (
            mx.random.normal(x.shape, dtype) * x.shape[-1] ** -0.5
            if x.ndim > 1
            else mx.ones(x.shape, dtype)
        )

    model = architecture(shape).build()
    model.update(tree_map(draw, model.parameters()))
    mx.eval(model.parameters())
    fuse(model)
    return model


def prefill(model: CausalLM, context: int, chunk: int) -> tuple[int, int, float]:
    """Bytes at the peak above those before, bytes of the caches, seconds."""
    tokens = mx.random.randint(0, model.vocab_size, (1, context))
    mx.eval(tokens)
    mx.clear_cache()
    mx.reset_peak_memory()
    before, start = mx.get_active_memory(), time.perf_counter()
    caches = model.make_caches(context)
    for first in range(0, context, chunk):
        state = model.hidden_state(tokens[:, first : first + chunk], caches)
        mx.eval(state, *(cache.arrays() for cache in caches if cache))
    seconds = time.perf_counter() - start
    return mx.get_peak_memory() - before, sum(cache.nbytes for cache in caches if cache), seconds


if __name__ == "__main__":
    main()
