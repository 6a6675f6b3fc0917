"""A mixture of experts larger than the memory it may use, with random weights of a published shape.

    python benchmarks/streaming.py write qwen3-30b-a3b big          # 17 GB, written without holding them
    python benchmarks/streaming.py write gpt-oss-20b big            # 12 GB
    python benchmarks/streaming.py run big --memory 5GB             # peak memory of the process, tokens, what was read
    python benchmarks/streaming.py run big                          # all in memory: the same tokens
    python benchmarks/streaming.py reads big --slots 24             # bytes per second of misses, against plain reads

``run`` generates 16 tokens behind 16. ``reads`` drops the files from the system's cache, lets the model read what it
misses, and then reads the same records again in the same groups by a plain thread pool, in turns.
"""

import argparse
import hashlib
import json
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxarch.blocks import CausalLM
from mlxarch.blocks.linear import ExpertLinear, Matrix
from mlxarch.checkpoint.shards import Shard
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.generation.timings import Timings
from mlxarch.loading.execution import Execution
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.loading.resolve import resolve
from mlxarch.planner.mlx_limits import set_limits
from mlxarch.planner.plan import Request
from mlxarch.quantization.scheme import Quantization
from mlxarch.ssd_streaming.attach import experts_of
from mlxarch.ssd_streaming.expert_records import ExpertRecords, read_extents
from mlxarch.ssd_streaming.experts import READER_THREADS, streaming_of
from mlxarch.store.lookup import plan_folder
from mlxarch.system.machines import parse_size

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
        max_position_embeddings=40960, tie_word_embeddings=False, hidden_act="silu", moe_intermediate_size=768,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    ),
    "gpt-oss-20b": dict(
        model_type="gpt_oss", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=150000.0,
        max_position_embeddings=131072, tie_word_embeddings=False, hidden_act="silu", num_local_experts=32,
        num_experts_per_tok=4, sliding_window=128,
    ),
}  # fmt: skip
EXPERTS = {"qwen3-30b-a3b": Quantization(4, 64), "gpt-oss-20b": Quantization(4, 32, "mxfp4")}
REST = {"qwen3-30b-a3b": Quantization(4, 64), "gpt-oss-20b": Quantization(8, 64)}
POOL = 64 << 20  # bytes of random codes, of which every weight takes another stretch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    writing = actions.add_parser("write")
    writing.add_argument("shape", choices=SHAPES)
    writing.add_argument("--layers", type=int, help="instead of the shape's own")
    running, reading = actions.add_parser("run"), actions.add_parser("reads")
    for action in (writing, running, reading):
        action.add_argument("folder", type=Path)
    for action in (running, reading):
        action.add_argument("--memory", help="that the process may use, such as 5GB")
        action.add_argument("--slots", type=int, help="for experts of each layer, instead")
        action.add_argument("--verify", choices=("first", "always", "never"), default="first")
        action.add_argument("--prompt", type=int, default=16)
        action.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    if options.action == "write":
        print(
            f"{write(options.shape, options.folder, options.layers) / 1e9:.2f} GB in {options.folder}"
        )
    elif options.action == "run":
        run(options.folder, execution_of(options), options.prompt, options.tokens)
    else:
        reads(options.folder, execution_of(options), options.prompt, options.tokens)


# A model of a shape --------------------------------------------------------------------------------------------------


def write(shape: str, folder: Path, layers: int | None) -> int:
    """Returns its bytes."""
    config = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    model, packing = architecture(config).build(), dict[str, Quantization]()
    for path, module in model.named_modules():
        if isinstance(module, Matrix) and module.quantizable:
            packing[path] = EXPERTS[shape] if isinstance(module, ExpertLinear) else REST[shape]
    shapes = {
        path: a.shape
        for path, a in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    }
    header, end, kinds = {}, 0, []
    for path, wanted in shapes.items():
        owner, _, leaf = path.rpartition(".")
        for name, dtype, size, kind in arrays(path, owner, leaf, wanted, packing.get(owner)):
            nbytes = prod(size) * {"U32": 4, "BF16": 2, "U8": 1}[dtype]
            header[name] = {
                "dtype": dtype,
                "shape": list(size),
                "data_offsets": [end, end + nbytes],
            }
            kinds.append((kind, nbytes))
            end += nbytes
    section: dict[str, Any] = vars(REST[shape]) | {
        path: vars(q) for path, q in packing.items() if q != REST[shape]
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization": section}))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (kind, nbytes) in enumerate(kinds):
            for piece in random_bytes(kind, nbytes, number):
                file.write(piece)
        os.fsync(file.fileno())
    return end


def arrays(
    path: str, owner: str, leaf: str, shape: tuple[int, ...], packing: Quantization | None
) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """Name, type, shape and kind of what a parameter is stored as."""
    if packing is None or leaf != "weight":
        yield path, "BF16", shape, "ones" if "norm" in path else "small"
        return
    yield path, "U32", packing.packed_shape(shape), "codes"
    groups = packing.scales_shape(shape)
    if packing.mode == "affine":
        # or attention's averages would soon be all that is left of a token, and all would go to the same experts
        gain = 6 if "embed" in owner else -3 if "o_proj" in owner else 0
        yield f"{owner}.scales", "BF16", groups, f"scales {packing.bits} {gain}"
        yield f"{owner}.biases", "BF16", groups, f"biases {packing.bits} {gain}"
    else:
        yield f"{owner}.scales", "U8", groups, "exponents"


def random_bytes(kind: str, nbytes: int, seed: int) -> Iterator[memoryview]:
    """Weights with a standard deviation of about 0.02, whatever they are packed as."""
    pool, start = make_pool(kind), seed * 7919 * 64 % (POOL // 2)
    while nbytes:
        piece = pool[start : start + min(nbytes, POOL // 2)].data
        yield piece
        nbytes, start = nbytes - piece.nbytes, (start + 12345 * 64) % (POOL // 2)


@cache
def make_pool(kind: str) -> np.ndarray:
    draw = np.random.default_rng(0)
    if kind in ("codes", "exponents"):
        return draw.integers(
            *((0, 256) if kind == "codes" else (119, 122)), POOL, np.uint8
        )  # 2^-8 … 2^-6
    name, bits, gain = (kind + " 4 0").split()[:3]
    step = 2.0 ** (int(gain) - 4 - int(bits))
    # the codes' mean is exactly zero: any other would grow from layer to layer
    level = {"ones": 1.0, "scales": step, "biases": -step * (2 ** int(bits) - 1) / 2}
    floats = np.full(POOL // 2, level.get(name, 0.0), np.float32)
    if kind == "small":
        floats = draw.normal(0, 0.02, POOL // 2).astype(np.float32)
    return (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)  # bfloat16


# Runs ----------------------------------------------------------------------------------------------------------------


def execution_of(options: argparse.Namespace) -> Execution:
    if options.memory is not None:
        request = Request(
            memory=parse_size(options.memory), context=options.prompt + options.tokens
        )
        plan = plan_folder(options.folder, request).require()
        set_limits(plan)
        print(f"plan {plan.total / 1e9:.2f} GB: {plan.offloaded or 'all in memory'}")
        return plan.execution
    if options.slots is None:
        return Execution()
    resolved = resolve(open_checkpoint(options.folder))
    experts = experts_of(resolved.model)
    slots = tuple(options.slots if n in experts else 0 for n in range(len(resolved.model.layers)))
    return Execution(slots=slots, verify=options.verify)


def generate(
    folder: Path, execution: Execution, prompt: int, tokens: int
) -> tuple[CausalLM, list[int], Timings, str]:
    """The model, the tokens, the timings, and a hash of all that the caches hold."""
    model, _ = load_model(folder, execution=execution)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, prompt).tolist()
    session = Session(model.make_caches(prompt + tokens), renew=model.make_caches)
    steps = list(decode(model, session, ids, Sampling(), tokens))
    held = hashlib.sha256()
    for array in (array for layer in session.caches if layer for array in layer.arrays()):
        held.update(np.asarray(array.view(mx.uint8)).tobytes())
    return model, [token for token, _ in steps], steps[-1][1], held.hexdigest()


def run(folder: Path, execution: Execution, prompt: int, tokens: int) -> None:
    begin = time.perf_counter()
    model, found, timings, held = generate(folder, execution, prompt, tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak of the process {peak / 1e9:.2f} GB, of MLX {mx.get_peak_memory() / 1e9:.2f} GB")
    print(
        f"prefill {timings.prefill_seconds:.1f} s, decode {timings.decode_rate:.2f} tokens/s",
        end=", ",
    )
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if (streaming := streaming_of(model)) is not None:
        s = streaming.stats
        print(
            f"expert slots {streaming.nbytes / 1e9:.2f} GB; "
            f"read {s.bytes_read / 1e9:.2f} GB in {s.read_seconds:.1f} s"
        )
        print(f"hits {s.hit_rate:.3f}, of the last tokens {s.steady_hit_rate:.3f}", end="; ")
        print(
            f"{s.bytes_per_token / 1e6:.0f} MB a token; waited {s.sync_seconds:.1f} s for routers"
        )
    print("tokens", *found)
    print("caches", held)


def reads(folder: Path, execution: Execution, prompt: int, tokens: int) -> None:
    """Interleaved: a group of records as the model reads it, then the same group by plain reads, both cold."""
    model, _ = load_model(folder, execution=execution)
    [*files] = streaming_of(model).shared.files.values()
    layers = list(streaming_of(model).layers.values())
    room = np.ones(
        (max(layer.memory.slots for layer in layers), layers[0].records.nbytes), np.uint8
    )
    draw, threads = np.random.default_rng(1), ThreadPoolExecutor(READER_THREADS)
    seconds: dict[str, list[float]] = {"model": [], "plain": []}
    nbytes = 0
    for number in range(max(4 * len(layers), 48)):
        layer = layers[number % len(layers)]
        records, missing = (
            layer.records,
            [e for e in draw.permutation(layer.records.count) if layer._slot_of[e] < 0],
        )
        group = [int(expert) for expert in missing[: layer.memory.slots // 2]]
        for kind in ("model", "plain") if number % 2 else ("plain", "model"):
            for file in files:
                os.posix_fadvise(file._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            if kind == "model":
                layer._admit(group, set())
            else:
                list(threads.map(partial(plain, records, room), range(len(group)), group))
            seconds[kind].append(time.perf_counter() - begin)
        nbytes += len(group) * records.nbytes
    rates = {kind: nbytes / sum(spent) / 1e9 for kind, spent in seconds.items()}
    ratio = np.median(np.array(seconds["plain"]) / np.array(seconds["model"]))
    print(
        f"{nbytes / 1e9:.2f} GB: by the model {rates['model']:.2f} GB/s, plain {rates['plain']:.2f} GB/s",
        end=", ",
    )
    print(
        f"ratio {rates['model'] / rates['plain']:.3f}, median of {len(seconds['plain'])} groups {ratio:.3f}"
    )


def plain(records: ExpertRecords, room: np.ndarray, number: int, expert: int) -> None:
    """The record's bytes into the ``number``-th row of memory, by as few reads as there are runs of bytes."""
    runs: list[tuple[Shard, int, int]] = []
    for place in (found for part in records.parts for found in read_extents(part.tensor, expert)):
        if runs and runs[-1][0] is place.shard and sum(runs[-1][1:]) == place.start:
            runs[-1] = place.shard, runs[-1][1], runs[-1][2] + place.nbytes
        else:
            runs.append((place.shard, place.start, place.nbytes))
    done = 0
    for shard, start, nbytes in runs:
        os.preadv(records.files[shard]._fd, [room[number, done : done + nbytes].data], start)
        done += nbytes


if __name__ == "__main__":
    main()
