"""Prefill and decode speed against mlx-lm, and against llama.cpp where it runs, alternating in one process.

    python benchmarks/speed.py --folder DIR [--gguf FILE] [--tokens 128] [--prompt 64] [--rounds 5]
    python benchmarks/speed.py --shape llama3-8b:4 --shape qwen3-0.6b:8 [--prompt 512]

``--folder`` is a model both programs read; ``--shape`` makes random weights of a published shape, and both sides use
the same arrays. Needs mlx-lm; llama.cpp is timed with one thread if the package xllamacpp is there.
Every figure is the median over the rounds, and a ratio is the median of the rounds' ratios.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import llama, qwen3

import mlxarch
from mlxarch.blocks import fuse
from mlxarch.blocks.linear import Embedding, Matrix
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.quantization.scheme import Quantization

# the published config.json of meta-llama/Llama-3.1-8B (without its RoPE scaling) and Qwen/Qwen3-0.6B
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
        "rope_theta": 5e5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}
Run = Callable[[list[int], int], Iterator[Any]]


def ours(model: Any) -> Run:
    def run(prompt: list[int], tokens: int) -> Iterator[Any]:
        session = Session(model.make_caches())
        return (token for token, _ in decode(model, session, prompt, Sampling(), tokens))

    return run


def theirs(model: Any) -> Run:
    def run(prompt: list[int], tokens: int) -> Iterator[Any]:
        return (
            int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens)
        )

    return run


def llama_cpp(path: Path) -> Run:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cache_prompt = (
        str(path),
        2048,
        1,
        False,
    )
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def run(prompt: list[int], tokens: int) -> Iterator[Any]:
        # the server reports its own clock; there is no step to wait for in between
        request = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        timings = server.handle_completions(request)["timings"]
        yield -1, timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000

    return run


def timed(run: Run, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Prompt tokens per second until the first token, and tokens per second after it."""
    begin, times = time.perf_counter(), []
    for token in run(prompt, tokens):
        if isinstance(token, tuple):
            return len(prompt) / token[1], (tokens - 1) / token[2]
        times.append(time.perf_counter() - begin)
    return len(prompt) / times[0], (len(times) - 1) / (times[-1] - times[0])


def compare(title: str, sides: dict[str, Run], prompt: list[int], tokens: int, rounds: int) -> None:
    for run in sides.values():
        timed(run, prompt, min(tokens, 8))  # warm up
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for index in range(rounds):
        names = list(sides) if index % 2 == 0 else list(sides)[::-1]
        for name in names:
            rows[name].append(timed(sides[name], prompt, tokens))
    print(f"\n{title}: {len(prompt)} prompt tokens, {tokens} generated, {rounds} rounds")
    print(f"  {'':24}{'prefill tok/s':>15}{'decode tok/s':>15}   mlxarch ÷ it: prefill, decode")
    for name, figures in rows.items():
        prefill, generated = (statistics.median(f[i] for f in figures) for i in (0, 1))
        ratios = [
            statistics.median(o[i] / f[i] for o, f in zip(rows["mlxarch"], figures, strict=True))
            for i in (0, 1)
        ]
        print(
            f"  {name:24}{prefill:15.1f}{generated:15.2f}{ratios[0]:20.3f}{ratios[1]:10.3f}",
            flush=True,
        )


def random_pair(name: str, bits: int, group_size: int = 64) -> tuple[Any, Any]:
    """Our model and mlx-lm's with the same random arrays; what is not packed is bfloat16, float32 on a CPU."""
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    config, settings = SHAPES[name], Quantization(bits, group_size)
    model = architecture(config).build()
    weights: dict[str, mx.array] = {}
    for path, module in model.named_modules():
        if isinstance(module, Matrix):
            shape = module.weight.shape
            module.quantization, grid = settings, settings.scales_shape(shape)
            module.weight = mx.random.randint(0, 2**31 - 1, settings.packed_shape(shape)).astype(
                mx.uint32
            )
            spread = (shape[-1] ** -0.5) / 2**bits
            module.scales = (mx.random.uniform(0.5, 1.5, grid) * spread).astype(dtype)
            module.biases = (-module.scales * 2 ** (bits - 1)).astype(dtype)
            if isinstance(module, Embedding):
                module.dtype = dtype
        elif "weight" in module:
            module.weight = module.weight.astype(dtype)
        mx.eval(module.parameters())
        weights |= {
            f"{path}.{k}": v
            for k, v in module.items()
            if isinstance(v, mx.array) and not k.startswith("_")
        }
    kind = {"llama": llama, "qwen3": qwen3}[config["model_type"]]
    peer = kind.Model(kind.ModelArgs.from_dict(config))
    peer.set_dtype(dtype)
    mx_nn_quantize(peer, group_size, bits)
    peer.load_weights(list(weights.items()))
    mx.eval(peer.parameters())
    fuse(model)
    ids = mx.array([[1, 2, 3, 4, 5, 6, 7, 8]])
    apart = mx.abs(model(ids) - peer(ids)).max().item() / mx.abs(peer(ids)).max().item()
    print(f"{name} at {bits} bits: logits of the two differ by {apart:.1e} of the largest")
    return model, peer


def mx_nn_quantize(model: Any, group_size: int, bits: int) -> None:
    import mlx.nn as nn

    nn.quantize(model, group_size=group_size, bits=bits)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--skip-default", action="store_true", help="leave out mlx-lm's default type on a CPU"
    )
    a = parser.parse_args()
    print(
        f"mlxarch {mlxarch.__version__}, mlx {mx.__version__}, mlx-lm {mlx_lm.__version__}, {mx.default_device()}"
    )
    print(f"{platform.platform()}, {mx.device_info()}")
    prompt = [(7 * i) % 1000 + 10 for i in range(a.prompt)]
    if a.folder:
        model, config = load_model(a.folder)
        sides = {"mlxarch": ours(model)}
        peer = mlx_lm.load(str(a.folder))[0]
        peer.set_dtype(mx.float32)
        mx.eval(peer.parameters())
        sides["mlx-lm, float32"] = theirs(peer)
        if a.gguf:
            sides["llama.cpp, 1 thread"] = llama_cpp(a.gguf)
        compare(f"{config['model_type']} in {a.folder.name}", sides, prompt, a.tokens, a.rounds)
        if not a.skip_default:
            sides = {
                "mlxarch": ours(model),
                "mlx-lm, its default": theirs(mlx_lm.load(str(a.folder))[0]),
            }
            compare("the same, mlx-lm as it comes", sides, prompt, a.tokens, max(1, a.rounds // 3))
    for shape in a.shape:
        name, bits = shape.split(":")
        model, peer = random_pair(name, int(bits))
        compare(
            f"{name}, {bits} bits",
            {"mlxarch": ours(model), "mlx-lm": theirs(peer)},
            prompt,
            a.tokens,
            a.rounds,
        )
        total = sum(v.nbytes for _, v in tree_flatten(peer.parameters()))
        print(f"  weights {total / 1e9:.2f} GB, peak {mx.get_peak_memory() / 1e9:.2f} GB")
        del model, peer
        mx.clear_cache()


if __name__ == "__main__":
    main()
