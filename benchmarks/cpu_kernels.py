"""CPU kernels against MLX's own CPU back end: prefill and decode, alternating in one process.

    python benchmarks/cpu_kernels.py                              # SmolLM2's shape at 4 bits
    python benchmarks/cpu_kernels.py --shape llama-1b --bits 8 --rounds 5

The weights are random. Every figure is the median over the rounds, a ratio the median of the rounds'
ratios. MLX's side takes fewer tokens, since it is slow. The greedy tokens of both must be equal.
"""

import argparse
import statistics
from typing import Any

import mlx.core as mx
import numpy as np

from mlxarch.blocks import CausalLM, fuse
from mlxarch.blocks.linear import Matrix
from mlxarch.cpu_kernels import native
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.registry import architecture
from mlxarch.quantization.scheme import Quantization

# the published config.json of HuggingFaceTB/SmolLM2-135M, and 16 layers of the width of Llama 3.2 1B
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "vocab_size": 49152,
        "rope_theta": 1e5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
        "rope_theta": 5e5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def random_model(shape: str, bits: int, group_size: int) -> CausalLM:
    """Model of a shape with random quantized weights."""
    model = architecture(SHAPES[shape]).build()
    mx.random.seed(0)
    for _, module in model.named_modules():
        if isinstance(module, Matrix) and module.quantizable:
            values = 0.03 * mx.random.normal(module.weight.shape)
            module.weight, module.scales, module.biases = mx.quantize(values, group_size, bits)
            module.quantization = Quantization(bits, group_size)
    mx.eval(model.parameters())
    fuse(model)
    return model


def measure(model: CausalLM, prompt: list[int], tokens: int) -> tuple[float, float, list[int]]:
    """Rates of prefill and decode in tokens per second, and the tokens."""
    session = Session(model.make_caches())
    steps = list(decode(model, session, prompt, Sampling(), tokens))
    timings = steps[-1][1]
    return timings.prefill_rate, timings.decode_rate, [token for token, _ in steps]


def main() -> None:
    """Print a table of both sides and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--mlx-tokens", type=int, default=6, help="tokens on MLX's side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-mlx", action="store_true", help="measure the kernels only")
    given = parser.parse_args()
    used, text = native.status()
    if not used:
        raise SystemExit(f"no kernels to measure: {text}")
    model = random_model(given.shape, given.bits, given.group_size)
    vocabulary = SHAPES[given.shape]["vocab_size"]
    prompt = np.random.default_rng(0).integers(0, vocabulary, given.prompt).tolist()
    measure(model, prompt[:8], 4)
    rows = []
    for _ in range(given.rounds):
        ours = measure(model, prompt, given.tokens)
        if given.skip_mlx:
            rows.append((ours, ours))
            continue
        with native.suspended():
            mlx = measure(model, prompt, given.mlx_tokens)
        if ours[2][: len(mlx[2])] != mlx[2]:
            raise SystemExit(f"the tokens differ: {ours[2][: len(mlx[2])]} and {mlx[2]}")
        rows.append((ours, mlx))
    print(f"{given.shape}, {given.bits} bits, {native.description()}, MLX {mx.__version__}")
    for index, name in enumerate(("prefill", "decode")):
        kernels = statistics.median(ours[index] for ours, _ in rows)
        if given.skip_mlx:
            print(f"  {name:8}{kernels:9.1f} tok/s")
            continue
        alone = statistics.median(mlx[index] for _, mlx in rows)
        ratio = statistics.median(ours[index] / mlx[index] for ours, mlx in rows)
        print(f"  {name:8}{kernels:9.1f} tok/s   MLX alone{alone:8.1f}   ratio{ratio:7.1f}")


if __name__ == "__main__":
    main()
