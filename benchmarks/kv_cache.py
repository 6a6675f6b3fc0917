"""Quantized KV caches: divergence of the logits, peak memory and speed at 16, 8 and 4 bits.

    python benchmarks/kv_cache.py quality FOLDER [--text FILE] [--tokens 2000]
    python benchmarks/kv_cache.py memory [--shape small|llama3-8b] [--contexts 4096 …] [--layers 4]

``quality`` runs a real model over a text, by default this repository's own, and compares each token's chances with
those of unpacked keys and values: mean and largest KL divergence, and how often the likeliest token is the same. The
prompt passes in chunks, the last 64 tokens one by one. ``memory`` fills the caches of a few layers with random weights:
peak memory above that of the weights while the prompt passes and while 32 tokens are generated, and tokens a second.
It exits with 1 where fewer bits take more memory.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxarch.blocks import CausalLM, fuse
from mlxarch.generation.prefill import default_chunk
from mlxarch.kv_cache.base import evaluate_caches
from mlxarch.loading.registry import architecture
from mlxarch.quantization.scheme import Quantization

LLAMA: dict[str, Any] = dict(
    model_type="llama", hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    rms_norm_eps=1e-5, vocab_size=128256, rope_theta=5e5, max_position_embeddings=131072, tie_word_embeddings=False,
)  # fmt: skip
SHAPES = {
    "llama3-8b": LLAMA,
    # little besides keys and values, for a CPU
    "small": LLAMA
    | dict(
        hidden_size=256, intermediate_size=256, num_attention_heads=8, head_dim=64, vocab_size=512
    ),
}
BITS = (16, 8, 4)
ONE_BY_ONE = 64  # tokens of the text
GENERATED = 32


def packing(bits: int) -> Quantization | None:
    return Quantization(bits, 64) if bits < 16 else None


# Quality ------------------------------------------------------------------------------------------------------------


def quality(folder: Path, text: Path | None, count: int) -> bool:
    from mlxarch.loading.load import load_model
    from mlxarch.tokenizer.tokenizer import Tokenizer

    files = [text] if text else sorted(Path(__file__).parents[1].glob("docs/**/*.md"))
    ids = Tokenizer.from_folder(folder).encode("\n".join(file.read_text() for file in files))[
        :count
    ]
    model, _ = load_model(folder)
    caches, at = {bits: model.make_caches(len(ids), kv=packing(bits)) for bits in BITS}, 0
    found: dict[int, list[tuple[float, bool]]] = {bits: [] for bits in BITS[1:]}
    while at < len(ids):
        length = max(min(default_chunk(), len(ids) - ONE_BY_ONE - at), 1)
        logits = {
            bits: np.array(
                model(mx.array([ids[at : at + length]]), caches[bits])[0].astype(mx.float32)
            )
            for bits in BITS
        }
        for row in range(length):
            wanted = log_chances(logits[16][row])
            for bits in BITS[1:]:
                other = log_chances(logits[bits][row])
                found[bits].append(
                    (float(np.exp(wanted) @ (wanted - other)), wanted.argmax() == other.argmax())
                )
        at += length
    print(f"{folder.name}, {len(ids)} tokens, MLX {mx.__version__}, {mx.default_device()}")
    print("bits  mean KL    largest KL  same likeliest token")
    for bits, rows in found.items():
        divergence, same = np.array(rows).T
        print(f"{bits:4d}  {divergence.mean():.2e}   {divergence.max():.2e}    {same.mean():.4f}")
    return float(np.mean([divergence for divergence, _ in found[8]])) <= 1e-3


def log_chances(logits: np.ndarray) -> np.ndarray:
    """In float64, so that small divergences are no rounding."""
    logits = logits.astype(np.float64)
    return logits - (logits.max() + np.log(np.exp(logits - logits.max()).sum()))


# Memory -------------------------------------------------------------------------------------------------------------


def memory(shape: str, contexts: list[int], layers: int) -> bool:
    model = random_model(SHAPES[shape] | {"num_hidden_layers": layers})
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))  # pyright: ignore
    print(
        f"{layers} layers of {shape}, weights {weights / 1e6:.0f} MB, MLX {mx.__version__}, {mx.default_device()}"
    )
    print("                    peak above the weights, MB     of it     tokens a second")
    print(
        "context  bits        prefill         decode    caches     prefill     decode   logits differ by"
    )
    good = True
    for context in contexts:
        peaks, reference = {}, None
        for bits in BITS:
            peaks[bits], cache, speed, logits = run(model, context, bits)
            reference = logits if reference is None else reference
            error = mx.abs(logits - reference).max().item()
            prefill_peak, decode_peak = (peak / 1e6 for peak in peaks[bits])
            print(
                f"{context:7d} {bits:5d} {prefill_peak:14.1f} {decode_peak:14.1f} {cache / 1e6:9.1f} {speed[0]:11.1f} "
                f"{speed[1]:10.1f}   {error:.3f} of {logits.std().item():.2f}",
                flush=True,
            )
        good &= all(peaks[a][i] > peaks[b][i] for a, b in ((16, 8), (8, 4)) for i in range(2))
    return good


def random_model(shape: dict[str, Any]) -> CausalLM:
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16

    def draw(x: mx.array) -> mx.array:
        return (
            mx.random.normal(x.shape, dtype) * x.shape[-1] ** -0.5
            if x.ndim > 1
            else mx.ones(x.shape, dtype)
        )

    mx.random.seed(1)
    model = architecture(shape).build()
    model.update(tree_map(draw, model.parameters()))
    mx.eval(model.parameters())
    fuse(model)
    return model


def run(
    model: CausalLM, context: int, bits: int
) -> tuple[tuple[int, int], int, tuple[float, float], mx.array]:
    """Peaks of prefill and decode above what was there before, bytes of the caches, speeds of both, last logits."""
    tokens = mx.random.randint(0, model.vocab_size, (1, context), key=mx.random.key(2))
    mx.eval(tokens)
    mx.clear_cache()
    before, peaks, speeds = mx.get_active_memory(), [], []
    caches = model.make_caches(context + GENERATED, kv=packing(bits))
    mx.reset_peak_memory()
    start = time.perf_counter()
    for first in range(0, context - 1, default_chunk()):
        model.hidden_state(tokens[:, first : min(first + default_chunk(), context - 1)], caches)
        evaluate_caches(caches)
    peaks.append(mx.get_peak_memory() - before)
    speeds.append(context / (time.perf_counter() - start))
    token, logits = tokens[:, -1:], mx.array(0.0)
    mx.clear_cache()
    mx.reset_peak_memory()
    for step in range(GENERATED):
        if step == 2:  # the first ones may compile kernels
            start = time.perf_counter()
        logits = model.head(model.hidden_state(token, caches))[0, 0].astype(mx.float32)
        mx.eval(logits)
        token = tokens[:, step : step + 1]
    speeds.append((GENERATED - 2) / (time.perf_counter() - start))
    peaks.append(mx.get_peak_memory() - before)
    held = sum(cache.nbytes for cache in caches if cache)
    return (peaks[0], peaks[1]), held, (speeds[0], speeds[1]), logits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    kind = kinds.add_parser("quality")
    kind.add_argument("folder", type=Path)
    kind.add_argument("--text", type=Path)
    kind.add_argument("--tokens", type=int, default=2000)
    kind = kinds.add_parser("memory")
    kind.add_argument(
        "--shape", choices=SHAPES, default="small" if mx.default_device() == mx.cpu else "llama3-8b"
    )
    kind.add_argument("--contexts", type=int, nargs="+")
    kind.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    if options.kind == "quality":
        sys.exit(not quality(options.folder, options.text, options.tokens))
    contexts = options.contexts or (
        [4096] if mx.default_device() == mx.cpu else [8192, 16384, 32768]
    )
    sys.exit(not memory(options.shape, contexts, options.layers))


if __name__ == "__main__":
    main()
