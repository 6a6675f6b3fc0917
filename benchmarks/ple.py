"""Gemma 3n E4B's shape with its table of per-layer embeddings in memory and on the disk: memory, speed, bits.

    python benchmarks/ple.py                        # on a GPU: E4B whole, 4 bits, table too; random weights
    python benchmarks/ple.py --small                # on a CPU: E4B's table and number of layers, narrow layers
    python benchmarks/ple.py --small --bits 16      # 4, 8 or 16 bits, of the table alone
    python benchmarks/ple.py --small --wrong        # the table filled too late, which shows that it would be noticed

Writes the model into a temporary folder (2 to 9 GB for the whole one), and measures

* memory: each way in a process of its own; what MLX holds after loading and at the peak of a generation, and the whole
  process at its peak;
* bits: logits of a prompt and the tokens of a generation, which must be the same;
* speed: decode in turns within one process, rows warm (in the system's cache) and cold (dropped from it and from
  mlxarch's before each turn), and, for comparison, rows looked up before the next pass is built and not after. Tokens
  are drawn at random from all the vocabulary, so that rows are seldom met again.

It exits with 1 if bits differ, or if decode with warm rows is slower than 0.95 of that from memory.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import mlxarch
from mlxarch.blocks import CausalLM
from mlxarch.blocks.linear import Matrix
from mlxarch.generation import decode as generation
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.execution import Execution
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.ssd_streaming.embeddings import LateRows, StreamedEmbedding

TABLE, GROUP, BITS = "model.embed_tokens_per_layer", 64, 4
SMALL = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=4)
WAYS = {"memory": Execution(), "ssd": Execution(ple="ssd")}
LEAST = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4, help="of the table")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, help="where to write; else the system's place for temporary files"
    )
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--wrong", action="store_true")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(memory(options.folder, options.measure)))
        return
    if options.wrong:
        LateRows.fill = lambda self, tokens: None
    print(f"MLX {mx.__version__}, {mx.default_device()}; table of {options.bits} bits", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        begin, folder = time.perf_counter(), Path(place)
        row = write(folder, options.bits, options.small)
        print(
            f"written in {time.perf_counter() - begin:.0f} s; {row} bytes for a token", flush=True
        )
        if not options.skip_memory:
            compare_memory(folder)
        sys.exit(compare_speed(folder, options.tokens, options.rounds))


# The model ------------------------------------------------------------------------------------------------------------


def write(folder: Path, bits: int, small: bool) -> int:
    """A folder of random weights; returns the bytes of one row of the table."""
    text = json.loads(
        Path(mlxarch.__file__).with_name("configs").joinpath("gemma3n-e4b.json").read_text()
    )["text_config"]
    config: dict[str, Any] = text | (SMALL if small else {})
    model = architecture(config).build()
    shapes = {name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()}
    matrices = {
        f"{path}.weight"
        for path, m in model.named_modules()
        if isinstance(m, Matrix) and m.quantizable
    }
    shard: dict[str, mx.array] = {}
    weight_map: dict[str, str] = {}
    for name, shape in shapes.items():
        if name == f"{TABLE}.weight":
            continue
        shard |= (
            packed(name, shape)
            if name in matrices and shape[-1] % GROUP == 0
            else {name: floats(shape)}
        )
        if sum(array.nbytes for array in shard.values()) > 5e8:
            save(folder, shard, weight_map)
    save(folder, shard, weight_map)
    row = write_table(folder / "table.safetensors", shapes[f"{TABLE}.weight"], bits, weight_map)
    section: dict[str, Any] = {"bits": BITS, "group_size": GROUP}
    section[TABLE] = {"bits": bits, "group_size": GROUP} if bits < 16 else False
    (folder / "config.json").write_text(json.dumps(config | {"quantization": section}))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return row


def packed(name: str, shape: tuple[int, ...]) -> dict[str, mx.array]:
    """Codes are uniform, scales such that a product keeps its size."""
    codes = (
        mx.random.randint(-(2**31), 2**31 - 1, (shape[0], shape[1] * BITS // 32))
        .astype(mx.int32)
        .view(mx.uint32)
    )
    scales = mx.full((shape[0], shape[1] // GROUP), shape[1] ** -0.5 / 4.6, mx.bfloat16)
    base = name.removesuffix(".weight")
    return {name: codes, f"{base}.scales": scales, f"{base}.biases": -7.5 * scales}


def floats(shape: tuple[int, ...]) -> mx.array:
    if len(shape) == 1:
        return mx.ones(shape, mx.bfloat16)
    return (mx.random.normal(shape) * shape[-1] ** -0.5).astype(mx.bfloat16)


def save(folder: Path, shard: dict[str, mx.array], weight_map: dict[str, str]) -> None:
    file = f"model-{len(set(weight_map.values())) + 1}.safetensors"
    mx.save_safetensors(str(folder / file), shard)
    weight_map |= dict.fromkeys(shard, file)
    shard.clear()


def write_table(file: Path, shape: tuple[int, ...], bits: int, weight_map: dict[str, str]) -> int:
    """Random rows, written in blocks; nothing holds all of them."""
    rows, width = shape
    arrays: dict[str, tuple[str, int, int]] = {"weight": ("U32", width * bits // 32, 4)}
    if bits < 16:
        arrays |= {part: ("BF16", width // GROUP, 2) for part in ("scales", "biases")}
    else:
        arrays = {"weight": ("BF16", width, 2)}
    table, end = {}, 0
    for part, (dtype, columns, size) in arrays.items():
        stop = end + rows * columns * size
        table[f"{TABLE}.{part}"] = {
            "dtype": dtype,
            "shape": [rows, columns],
            "data_offsets": [end, stop],
        }
        end = stop
    header = json.dumps(table).encode()
    rng, scale = np.random.default_rng(0), 1 / 16 / 2**bits * 3.5
    constants = {"scales": scale, "biases": -(2**bits - 1) / 2 * scale}
    with open(file, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for part, (_, columns, size) in arrays.items():
            for start in range(0, rows, 8192):
                some = (min(8192, rows - start), columns)
                if part in constants:  # a bfloat16 is the upper half of a float32
                    values = np.full(some, constants[part], np.float32).view(np.uint32) >> 16
                    out.write(values.astype(np.uint16).tobytes())
                elif bits < 16:
                    out.write(rng.bytes(prod(some) * size))
                else:
                    values = np.frombuffer(rng.bytes(2 * prod(some)), np.uint16)
                    out.write(
                        (values & 0x807F | 0x3D80).tobytes()
                    )  # of either sign, 1/16 to 1/8 large
        out.flush()
        os.fsync(out.fileno())
    weight_map |= dict.fromkeys(table, file.name)
    return sum(columns * size for _, columns, size in arrays.values())


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(folder: Path, way: str) -> dict[str, int]:
    mx.set_cache_limit(64 << 20)
    model, _ = load_model(
        folder, execution=WAYS[way], dtype="bfloat16"
    )  # a CPU would hold floats as float32
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    generate(model, 0, 2, length=4)
    return {"held": held, "peak": mx.get_peak_memory(), "rss": peak_rss()}


def peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the parent's memory at the fork into ru_maxrss
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def compare_memory(folder: Path) -> None:
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--folder", str(folder), "--measure", way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found[way] = json.loads(done.stdout)
        print(
            f"table in {way}: "
            + ", ".join(f"{key} {value / 1e9:.2f} GB" for key, value in found[way].items())
        )
    saved = {key: (found["memory"][key] - found["ssd"][key]) / 1e9 for key in found["ssd"]}
    print(
        "saved: " + ", ".join(f"{key} {value:.2f} GB" for key, value in saved.items()), flush=True
    )


# Bits and speed -------------------------------------------------------------------------------------------------------


def prompt(model: CausalLM, seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.vocab_size, length).tolist()


def generate(model: CausalLM, seed: int, count: int, length: int = 48) -> tuple[list[int], float]:
    """Tokens, and how many a second."""
    session, sampling = Session(model.make_caches()), Sampling(temperature=8.0, seed=seed)
    found = list(decode(model, session, prompt(model, seed, length), sampling, count))
    return [token for token, _ in found], found[-1][1].decode_rate


def digest(model: CausalLM) -> str:
    logits = model(mx.array([prompt(model, 1, 48)]))
    return hashlib.sha256(np.array(logits.view(mx.uint8)).tobytes()).hexdigest()[:16]


def forget(model: CausalLM, folder: Path) -> None:
    """Drop rows from both caches, where the system lets itself be asked to."""
    for module in model.modules():
        if isinstance(module, StreamedEmbedding):
            module.cache._held.clear()
    if hasattr(os, "posix_fadvise"):
        fd = os.open(folder / "table.safetensors", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def compare_speed(folder: Path, count: int, rounds: int) -> int:
    models = {way: load_model(folder, execution=execution)[0] for way, execution in WAYS.items()}
    [table] = [
        module for module in models["ssd"].modules() if isinstance(module, StreamedEmbedding)
    ]
    logits = {way: digest(model) for way, model in models.items()}
    tokens = {way: generate(model, 0, count)[0] for way, model in models.items()}  # and warms up
    same = len(set(logits.values())) == 1 and tokens["memory"] == tokens["ssd"]
    print(
        f"logits {logits}, {len(set(tokens['ssd']))} different tokens of {count}; same bits: {same}",
        flush=True,
    )
    rates: dict[str, list[float]] = {"memory": [], "ssd": [], "ssd, cold": [], "ssd, at once": []}
    costs: dict[str, list[float]] = {case: [] for case in rates if case != "memory"}
    late = generation.late_rows
    for turn in range(1, rounds + 1):
        for case in [*rates] if turn % 2 else reversed(rates):
            way = case.partition(",")[0]
            if case == "ssd, cold":
                forget(models[way], folder)
            generation.late_rows = (lambda model: None) if case == "ssd, at once" else late
            before = table.cache.stats.read_seconds
            rates[case].append(generate(models[way], turn, count)[1])
            if case in costs:
                costs[case].append((table.cache.stats.read_seconds - before) / (count + 1) * 1e6)
    for case, found in rates.items():
        ratio = statistics.median(
            mine / its for mine, its in zip(found, rates["memory"], strict=True)
        )
        cost = (
            f", {statistics.median(costs[case]):.0f} us a token in reads" if case in costs else ""
        )
        print(
            f"{case}: {statistics.median(found):.2f} tokens/s, {ratio:.3f} of that from memory{cost}"
        )
        if case == "ssd":
            same = same and ratio >= LEAST
    print(f"rows: {table.cache.stats.rows}, of which kept from before {table.cache.stats.hits}")
    return 0 if same else 1


if __name__ == "__main__":
    main()
