"""Aggregate decode rate of the engine for 1 to 16 rows, against one row without it and against mlx-lm.

    python benchmarks/batching.py --shape qwen3-0.6b:4 --shape llama3-8b:4 --prompt 512 [--tokens 128]
        [--rows 1,4,8,16] [--rounds 3] [--layers N] [--kv-bits 8]

``--shape NAME:BITS`` makes random weights of a model of the catalog. The rate counts tokens from the moment when all
rows have their first token until each has ``--tokens``. Rows are of equal length, or ragged: from an eighth of the
prompt's length up to all of it. All sides run in one process, alternately, and a ratio is the median of the rounds'
ratios. mlx-lm's batch generator runs beside it, on the same arrays, where the package is installed and has the model.
"""

import argparse
import importlib
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import mlxarch
from mlxarch.blocks import CausalLM, fuse
from mlxarch.blocks.linear import Embedding, Matrix
from mlxarch.engine import Engine, GenerationRequest, RowOutput
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.registry import architecture
from mlxarch.quantization.scheme import Quantization

CONFIGS = Path(mlxarch.__file__).parent / "hub" / "configs"
GROUP_SIZE = 64
MANY_TOKENS = 100_000
Prompts = Sequence[Sequence[int]]
Times = list[list[float]]  # of each token of each row
Run = Callable[[Prompts, int], Times]


def random_model(config: dict[str, Any], bits: int) -> tuple[CausalLM, dict[str, mx.array]]:
    """A model with random packed weights, and these by name."""
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    model, settings = architecture(config).build(), Quantization(bits, GROUP_SIZE)
    weights: dict[str, mx.array] = {}
    for path, module in model.named_modules():
        if isinstance(module, Matrix) and module.quantizable:
            shape = module.weight.shape
            module.quantization, grid = settings, settings.scales_shape(shape)
            packed = mx.random.randint(0, 2**31 - 1, settings.packed_shape(shape))
            module.weight = packed.astype(mx.uint32)
            spread = (shape[-1] ** -0.5) / 2**bits
            module.scales = (mx.random.uniform(0.5, 1.5, grid) * spread).astype(dtype)
            module.biases = (-module.scales * 2 ** (bits - 1)).astype(dtype)
            if isinstance(module, Embedding):
                module.dtype = dtype
        else:
            own = {k: v for k, v in module.items() if isinstance(v, mx.array)}
            module.update({name: value.astype(dtype) for name, value in own.items()})
        arrays = {k: v for k, v in module.items() if isinstance(v, mx.array)}
        mx.eval(arrays)
        weights |= {f"{path}.{k}": v for k, v in arrays.items() if not k.startswith("_")}
    fuse(model)
    return model, weights


def peer_model(config: dict[str, Any], bits: int, weights: dict[str, mx.array]) -> Any:
    """mlx-lm's model of the same shape, with the same arrays where it has their names; None without mlx-lm."""
    try:
        kind = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    except ImportError as error:
        print(f"  mlx-lm is left out: {error}")
        return None
    peer = kind.Model(kind.ModelArgs.from_dict(config))
    peer.set_dtype(next(v.dtype for k, v in weights.items() if k.endswith("scales")))
    nn.quantize(
        peer,
        group_size=GROUP_SIZE,
        bits=bits,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and f"{path}.scales" in weights
        ),
    )
    peer.load_weights(list(weights.items()), strict=False)
    for module in peer.modules():  # one by one: what has no array of ours is packed from its own
        mx.eval({k: v for k, v in module.items() if isinstance(v, mx.array)})
    return peer


def without_engine(model: CausalLM, kv: Quantization | None) -> Run:
    def run(prompts: Prompts, tokens: int) -> Times:
        session = Session(model.make_caches(kv=kv))
        steps = decode(model, session, prompts[0], Sampling(), tokens)
        return [[time.perf_counter() for _ in steps]]

    return run


def with_engine(engine: Engine) -> Run:
    def run(prompts: Prompts, tokens: int) -> Times:
        times: Times = [[] for _ in prompts]
        enough = threading.Event()
        handles = []
        for prompt, own in zip(prompts, times, strict=True):

            def deliver(output: RowOutput, own: list[float] = own) -> None:
                own.extend(time.perf_counter() for _ in output.tokens)
                if output.finish_reason is not None or all(len(row) >= tokens for row in times):
                    enough.set()

            most = engine.context_length - len(prompt)  # rows that begin early go on until the end
            request = GenerationRequest(prompt=tuple(prompt), max_tokens=most)
            handles.append(engine.submit(request, deliver))
        enough.wait()
        for handle in handles:
            handle.cancel()
        for handle in handles:
            handle.done.wait()
        return times

    return run


def with_peer(peer: Any) -> Run:
    from mlx_lm.generate import BatchGenerator  # pyright: ignore[reportMissingImports]

    def run(prompts: Prompts, tokens: int) -> Times:
        generator = BatchGenerator(peer, completion_batch_size=len(prompts))
        ids = generator.insert([list(prompt) for prompt in prompts], [MANY_TOKENS] * len(prompts))
        times: dict[Any, list[float]] = {each: [] for each in ids}
        while any(len(own) < tokens for own in times.values()):
            answers = generator.next()
            if isinstance(answers, tuple):  # newer versions: of prompts, of generated tokens
                answers = answers[-1]
            for answer in answers:
                times[answer.uid].append(time.perf_counter())
        return list(times.values())

    return run


def rate(run: Run, prompts: Prompts, tokens: int) -> tuple[float, float]:
    """Tokens a second of all rows together, and seconds until all have their first token."""
    begin = time.perf_counter()
    times = run(prompts, tokens)
    start, end = max(own[0] for own in times), min(own[-1] for own in times)
    count = sum(start < moment <= end for own in times for moment in own)
    return count / (end - start), start - begin


def prompts_of(rows: int, length: int, ragged: bool) -> list[list[int]]:
    """Prompts without a common beginning."""
    lengths = [length] * rows
    if ragged and rows > 1:
        lengths = [length // 8 + (length - length // 8) * row // (rows - 1) for row in range(rows)]
    return [[(7 * i + 13 * row) % 1000 + 10 for i in range(n)] for row, n in enumerate(lengths)]


def compare(sides: dict[str, Run], rows: int, ragged: bool, a: argparse.Namespace) -> None:
    prompts = prompts_of(rows, a.prompt, ragged)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for run in sides.values():
        rate(run, prompts, 8)  # warm up
    for number in range(a.rounds):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            found[name].append(rate(sides[name], prompts, a.tokens))
    for name, figures in found.items():
        speed, first = (statistics.median(each[i] for each in figures) for i in (0, 1))
        pairs = zip(found["engine"], figures, strict=True)
        ratio = statistics.median(own[0] / other[0] for own, other in pairs)
        kind = "ragged" if ragged else "equal"
        print(f"  {rows:4} {kind:8}{name:12}{speed:12.1f}{first:14.3f}{ratio:12.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--kv-bits", type=int, choices=(8, 4))
    a = parser.parse_args()
    print(f"mlxarch {mlxarch.__version__}, mlx {mx.__version__}, {mx.default_device()}")
    print(f"{platform.platform()}, {mx.device_info()}")
    kv = Quantization(a.kv_bits, GROUP_SIZE) if a.kv_bits else None
    counts = [int(count) for count in a.rows.split(",")]
    for shape in a.shape:
        name, bits = shape.split(":")
        config = json.loads((CONFIGS / f"{name}.json").read_text())
        if a.layers:
            config["num_hidden_layers"] = a.layers
            if config.get("layer_types"):
                config["layer_types"] = config["layer_types"][: a.layers]
        model, weights = random_model(config, int(bits))
        peer = peer_model(config, int(bits), weights)
        del weights
        print(f"\n{name}, {bits} bits: {a.prompt} prompt tokens, {a.tokens} generated each")
        print(
            f"  {'rows':4} {'lengths':8}{'':12}{'tok/s':>12}{'all begun, s':>14}{'engine ÷ it':>12}"
        )
        with Engine(model, max_rows=max(counts), kv=kv, prefix_cache_bytes=0) as engine:
            for rows in counts:
                sides: dict[str, Run] = {"engine": with_engine(engine)}
                if rows == 1:
                    sides["stream()"] = without_engine(model, kv)
                if peer is not None:
                    sides["mlx-lm"] = with_peer(peer)
                for ragged in (False, True)[: 1 if rows == 1 else 2]:
                    compare(sides, rows, ragged, a)
            print(f"  rows independent by the probe: {engine.status().rows_independent}")


if __name__ == "__main__":
    main()
