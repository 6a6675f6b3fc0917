"""CPU kernels against llama.cpp: prefill and decode of SmolLM2's shape, alternating in one process.

    python benchmarks/llama_cpp.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf                  # 4 and 8 bits
    python benchmarks/llama_cpp.py --gguf FILE --threads 2 --rounds 9 --prompt 128 --prompt 512

Needs the packages xllamacpp, which is llama.cpp, and gguf. Both sides have the same shape and as many bits: at 4 bits
groups of 32 against Q4_1, at 8 bits groups of 64 against Q8_0, which is written beforehand. Our weights are random.
Figures are medians over the rounds, ratios the medians of the rounds' ratios: by the clock, and by the time of the
process on all cores, which other programs disturb less. llama.cpp rounds activations to 8 bits, we do not.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cpu_kernels
import gguf
import numpy as np
import xllamacpp

from mlxarch.cpu_kernels import native

VOCABULARY = 49152
GROUP_SIZES = {4: 32, 8: 64}
Side = Callable[[list[int], int], tuple[float, float]]
"""Prompt and number of tokens to generate -> seconds of prefill and of decode."""


class Rate(NamedTuple):
    """Tokens per second: by the clock and by the time of the process."""

    clock: float
    process: float


def llama_cpp(path: Path, threads: int) -> Side:
    """llama.cpp's server in this process; it measures the two phases itself."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.cache_prompt = 2048, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def run(prompt: list[int], tokens: int) -> tuple[float, float]:
        request = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
        answer: Any = server.handle_completions(request | {"cache_prompt": False})
        timings = answer["timings"]
        return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000

    return run


def mlxarch(bits: int) -> Side:
    """Our model, decoded greedily as in llama.cpp."""
    model = cpu_kernels.random_model("smollm2", bits, GROUP_SIZES[bits])

    def run(prompt: list[int], tokens: int) -> tuple[float, float]:
        prefill, decode, _ = cpu_kernels.measure(model, prompt, tokens)
        return len(prompt) / prefill, (tokens - 1) / decode if tokens > 1 else 0.0

    return run


def write_q8_0(source: Path, target: Path) -> None:
    """Write a copy of a GGUF file whose matrices are Q8_0."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        values = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type))
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values.astype(np.float32))
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rates(side: Side, prompt: list[int], tokens: int) -> Rate:
    """Rate of prefill of the prompt if ``tokens`` is 1, of decode after it otherwise."""
    before = time.process_time()
    seconds = side(prompt, tokens)
    process = time.process_time() - before
    if tokens == 1:
        return Rate(len(prompt) / seconds[0], len(prompt) / process)
    return Rate((tokens - 1) / seconds[1], (tokens - 1) / process)


def compare(ours: Side, theirs: Side, prompt: list[int], tokens: int, rounds: int) -> str:
    """Measure both in alternation, and return the cells of a row of the table."""
    pairs = []
    for index in range(rounds):
        sides = (ours, theirs) if index % 2 == 0 else (theirs, ours)
        found = [rates(side, prompt, tokens) for side in sides]
        pairs.append(found if index % 2 == 0 else found[::-1])
    cells = []
    for kind in range(2):
        medians = [statistics.median(pair[side][kind] for pair in pairs) for side in range(2)]
        ratio = statistics.median(pair[0][kind] / pair[1][kind] for pair in pairs)
        cells.append(f"{medians[0]:7.1f} : {medians[1]:7.1f} = {ratio:5.2f}")
    return "   ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M in Q4_1")
    parser.add_argument("--bits", type=int, action="append", choices=GROUP_SIZES)
    parser.add_argument("--prompt", type=int, action="append")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    os.environ["MLXARCH_THREADS"] = str(given.threads)
    print(f"{native.description()}; llama.cpp as in xllamacpp {xllamacpp.__version__}")
    print("tokens per second, mlxarch : llama.cpp = ratio; by the clock   by process time")
    for bits in given.bits or GROUP_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            path = given.gguf
            if bits == 8:
                path = Path(folder, "q8_0.gguf")
                write_q8_0(given.gguf, path)
            sides = mlxarch(bits), llama_cpp(path, given.threads)
            generator = np.random.default_rng(0)
            for count in given.prompt or (128, 512):
                prompt = generator.integers(0, VOCABULARY, count).tolist()
                for side in sides:
                    side(prompt, 1)
                row = compare(*sides, prompt, 1, given.rounds)
                print(f"{bits} bits, prefill of {count:4}: {row}", flush=True)
            row = compare(*sides, prompt[:8], given.tokens, given.rounds)
            print(f"{bits} bits, decode         : {row}", flush=True)
            del sides


if __name__ == "__main__":
    main()
