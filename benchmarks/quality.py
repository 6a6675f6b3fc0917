"""How good quantized models are, by method, beside mlx-lm's quantizers and llama.cpp's Q4_K_M at the same size.

    python benchmarks/quality.py [--work DIR] [--trained DIR] [--gguf FILE] [--library FILE] [--only REGEX …]

The originals are SmolLM2-135M-Instruct, read from the Q4_1 file that ``mlxarch pull smollm2-135m`` fetches, the same
with uniform noise of half a step of that grid on every weight (a search is flattered by an original that lies on a
4-bit grid), and the two models of ``trained_models.py``. The first two read the texts that come with mlxarch, the
others text that was held out of their training. In every variant embeddings and head are quantized too, and scales are
bfloat16. What was measured is kept in DIR, so that the same command goes on where it stopped; ``--only`` picks
originals and variants by regular expressions. Needs gguf; mlx-lm and llama.cpp (see ``quality_peers.py``) are measured
where they are installed.
"""

import argparse
import dataclasses
import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import quality_peers as peers

from mlxarch.checkpoint.gguf.source import open_gguf
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.receipt import format_forecast
from mlxarch.errors import MlxArchError
from mlxarch.quantize import Target, prepare, toward
from mlxarch.quantize.calibration.texts import Text, bundled_texts
from mlxarch.quantize.evaluation.evaluate import EvaluationSettings, evaluate
from mlxarch.quantize.mixed_precision.bit_allocation import DEFAULT_GROUP_SIZE
from mlxarch.system import paths

Make = Callable[
    [Path, Path], dict[str, float]
]  # (original, output) -> figures that the folder does not tell

OURS: dict[str, dict[str, Any]] = {
    f"{method}, {bits} bits, group {group}": dict(bits=bits, group_size=group, method=method)
    for method, bits, group in [
        *(
            ("round", bits, group)
            for bits, group in ((4, 64), (4, 32), *((bits, 64) for bits in (8, 6, 5, 3, 2)))
        ),
        *((method, bits, 64) for bits in (4, 3) for method in ("search", "gptq")),
        ("search", 8, 64),
    ]
}
READERS = {
    f"{name}, calibrated": settings
    for name, settings in OURS.items()
    if settings["method"] != "round"
}
MIXED = {
    "mixed, 5.0 bits": dict(target=Target(bits=5.0)),
    "mixed, 5.0 bits, gptq": dict(target=Target(bits=5.0), method="gptq"),
    **{f"mixed, KL {kl}": dict(target=Target(kl=kl)) for kl in (0.005, 0.03, 0.15)},
}

CLAIMS = [  # of two variants' mean KL: what it is called, the two, what the mean ratio must not exceed, and each
    (
        "4 bits: search ÷ rounding",
        "search, 4 bits, group 64",
        "round, 4 bits, group 64",
        0.40,
        0.50,
    ),
    (
        "4 bits: gptq ÷ rounding",
        "gptq, 4 bits, group 64",
        "round, 4 bits, group 64",
        0.33,
        math.inf,
    ),
    (
        "4 bits: search of text ÷ rounding",
        "search, 4 bits, group 64, calibrated",
        "round, 4 bits, group 64",
        0.40,
        0.50,
    ),
    (
        "4 bits: gptq of text ÷ rounding",
        "gptq, 4 bits, group 64, calibrated",
        "round, 4 bits, group 64",
        0.33,
        math.inf,
    ),
    ("3 bits: search ÷ rounding", "search, 3 bits, group 64", "round, 3 bits, group 64", 0.50, 1.0),
    ("3 bits: gptq ÷ rounding", "gptq, 3 bits, group 64", "round, 3 bits, group 64", 0.40, 1.0),
    (
        "mixed 5.0 bits ÷ rounding in groups of 32",
        "mixed, 5.0 bits",
        "round, 4 bits, group 32",
        0.25,
        math.inf,
    ),
    (
        "mixed 5.0 bits with gptq ÷ the same",
        "mixed, 5.0 bits, gptq",
        "round, 4 bits, group 32",
        0.25,
        math.inf,
    ),
    (
        "search ÷ mlx-lm's awq, 4 bits, same text",
        "search, 4 bits, group 64, calibrated",
        "mlx-lm awq",
        1.0,
        1.0,
    ),
    (
        "gptq ÷ mlx-lm's gptq, 4 bits, same text",
        "gptq, 4 bits, group 64, calibrated",
        "mlx-lm gptq",
        1.0,
        1.0,
    ),
    (
        "mixed ÷ mlx-lm's dynamic_quant, of its size",
        "mixed, size of dynamic_quant",
        "mlx-lm dynamic_quant",
        1.0,
        1.0,
    ),
    (
        "mixed ÷ llama.cpp's Q4_K_M, of its size",
        "mixed, size of Q4_K_M",
        "llama.cpp Q4_K_M",
        1.0,
        1.0,
    ),
]


# Originals ------------------------------------------------------------------------------------------------------------


def floats_of(gguf: Path, output: Path, dither: bool) -> None:
    """A GGUF file's weights in float32, with ``dither`` each within half a step of its grid."""
    source = open_gguf(gguf)
    draw, values = np.random.default_rng(0), {}
    for name, tensor in source.tensors.items():
        values[name] = tensor.load().astype(mx.float32)
        if dither and isinstance(tensor, QuantizedTensor):
            steps = np.repeat(
                np.array(tensor.components["scales"].load().astype(mx.float32)),
                tensor.quantization.group_size,
                -1,
            )
            values[name] += mx.array(
                draw.uniform(-0.5, 0.5, steps.shape).astype(np.float32) * steps
            )
    output.mkdir(parents=True, exist_ok=True)
    for name, held in source.sidecars.items():
        (output / name).write_bytes(held if isinstance(held, bytes) else held.read_bytes())
    (output / "config.json").write_text(
        json.dumps(source.config | {"torch_dtype": "float32"}, indent=2)
    )
    mx.save_safetensors(str(output / "model.safetensors"), values, {"format": "pt"})


def in_float32(trained: Path, output: Path) -> None:
    """The same values in the type that everybody computes in on a CPU, mlx-lm too."""
    peers.write_folder(trained, output, peers.weights(trained))


# Variants -------------------------------------------------------------------------------------------------------------


def ours(texts: list[Text], target: Target | None = None, **settings: Any) -> Make:
    def make(original: Path, output: Path) -> dict[str, float]:
        if target is not None:
            settings.setdefault("group_size", DEFAULT_GROUP_SIZE)
        conversion = prepare(original, output, dtype="bfloat16", texts=texts, **settings)
        conversion = conversion if target is None else toward(conversion, target)
        conversion.run(force=True)
        return {} if conversion.expected_kl is None else {"forecast": conversion.expected_kl}

    return make


def makers(
    options: argparse.Namespace,
    texts: list[Text],
    calibration: str,
    trained: bool,
    results: dict[str, Any],
) -> dict[str, Make]:
    """Every variant of an original by name; llama.cpp's blocks need rows that only the trained models have."""
    read = options.work / "calibration.txt"
    read.write_text(calibration)
    made: dict[str, Make] = {
        name: ours(texts, **settings) for name, settings in (OURS | MIXED).items()
    }
    made |= {name: ours(texts, calibration=read, **settings) for name, settings in READERS.items()}
    for method in peers.MLX_LM:

        def theirs(original: Path, output: Path, method: str = method) -> dict[str, float]:
            peers.mlx_lm(method, original, output, calibration, options.samples)
            return {}

        made[f"mlx-lm {method}"] = theirs
    if trained:

        def q4_k_m(original: Path, output: Path) -> dict[str, float]:
            return {"bits_per_weight": peers.llama_cpp(original, output, options.library)}

        made["llama.cpp Q4_K_M"] = q4_k_m
    for peer in ("llama.cpp Q4_K_M", "mlx-lm dynamic_quant"):

        def its_size(original: Path, output: Path, peer: str = peer) -> dict[str, float]:
            return ours(texts, Target(bits=results[peer]["bits_per_weight"]))(original, output)

        made[f"mixed, size of {peer.split()[-1]}"] = its_size
    return made


def measure(
    original: Path, folder: Path, make: Make, texts: list[Text], tokens: int
) -> dict[str, Any]:
    """Make a variant and compare it with its original; bits are those of the quantized matrices, scales included."""
    begin = time.perf_counter()
    figures = make(original, folder)
    seconds = time.perf_counter() - begin
    found = evaluate(folder, original, texts=texts, settings=EvaluationSettings(tokens=tokens))
    return {
        "bits_per_weight": found.size.quantized_bits_per_weight,
        "seconds": seconds,
        **figures,
        "texts": found.texts,
        "versions": found.versions,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        **{
            name: dataclasses.asdict(table)
            for name, table in {"all": found.all, **found.domains}.items()
        },
    }


# Tables ---------------------------------------------------------------------------------------------------------------


def show(results: dict[str, dict[str, Any]]) -> None:
    """Markdown: the variants of each original, and where each claim stands."""
    for original, rows in results.items():
        if not rows:
            continue
        print(
            f"\n{original}\n\n| variant | bits/weight | KL, nats/token | top-1 | perplexity ratio | seconds |"
        )
        print("|---|---|---|---|---|---|")
        for name, row in sorted(rows.items(), key=lambda item: item[1]["bits_per_weight"]):
            kl, top, perplexity = (
                row["all"][key] for key in ("kl_mean", "top1_agreement", "perplexity_ratio")
            )
            print(
                f"| {name} | {row['bits_per_weight']:.2f} | {kl['value']:.4f} ± {kl['error']:.4f} | "
                f"{100 * top['value']:.1f} % | {perplexity['value']:.3f} | {row['seconds']:.0f} |"
            )
    print(
        "\n| claim | must be | mean | "
        + " | ".join(results)
        + " |\n|---|---|---|"
        + "---|" * len(results)
    )
    for claim, one, other, mean, each in CLAIMS:
        ratios = {name: ratio(rows, one, other) for name, rows in results.items()}
        judged = [r for name, found in ratios.items() if name != "SmolLM2" for r in found.values()]
        cells = [
            f"{np.mean(list(r.values())):.2f} (≤ {max(r.values()):.2f})" if r else "–"
            for r in ratios.values()
        ]
        must = f"≤ {mean:.2f}" + (f", each ≤ {each:.2f}" if math.isfinite(each) else "")
        print(
            f"| {claim} | {must} | {np.mean(judged):.2f} | "
            if judged
            else f"| {claim} | {must} | – | ",
            end="",
        )
        print(" | ".join(cells) + " |")

    for name, rows in results.items():
        for variant, row in rows.items():
            if forecast := row.get("forecast"):
                measured = row["all"]["kl_mean"]["value"]
                print(f"\n{name}, {variant}: forecast {format_forecast(forecast, measured)}")
        for method in ("round", "search"):
            if eight := rows.get(f"{method}, 8 bits, group 64"):
                kl, top = (eight["all"][key]["value"] for key in ("kl_mean", "top1_agreement"))
                print(
                    f"\n{name}, {method}, 8 bits: KL {kl:.5f} (must be ≤ 0.0015), top-1 {100 * top:.1f} % (≥ 98 %)"
                )
        rounded = [rows.get(f"round, {bits} bits, group 64") for bits in (8, 6, 5, 4, 3, 2)]
        if all(rounded):
            kls = [row["all"]["kl_mean"]["value"] for row in rounded if row]
            print(
                f"\n{name}, rounded to 8, 6, 5, 4, 3 and 2 bits: KL {', '.join(f'{kl:.3g}' for kl in kls)}"
            )


def ratio(rows: dict[str, Any], one: str, other: str) -> dict[str, float]:
    """Ratio of the mean KL divergences of two variants, by text."""
    if one not in rows or other not in rows:
        return {}
    texts = rows[one]["texts"]
    return {
        text: rows[one][text]["kl_mean"]["value"] / rows[other][text]["kl_mean"]["value"]
        for text in texts
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=paths.cache() / "quality")
    parser.add_argument("--trained", type=Path, default=paths.cache() / "trained")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--library", type=Path, help="llama.cpp's libllama")
    parser.add_argument(
        "--only", nargs="+", default=[], help="expressions that ORIGINAL: VARIANT must match"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument(
        "--samples", type=int, default=16, help="windows that mlx-lm's awq and gptq calibrate on"
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=64 << 10,
        help="bytes of text that mlx-lm's quantizers get",
    )
    options = parser.parse_args()
    kinds: dict[str, Callable[[Path], None]] = {}
    if options.gguf:
        kinds["SmolLM2"] = lambda output: floats_of(options.gguf, output, False)
        kinds["SmolLM2, dithered"] = lambda output: floats_of(options.gguf, output, True)
    for name in ("qwen3", "gemma3"):
        if (folder := options.trained / name / "config.json").exists():
            kinds[f"trained {name}"] = lambda output, folder=folder: in_float32(
                folder.parent, output
            )
    results: dict[str, dict[str, Any]] = {}
    for name, write in kinds.items():
        place, trained = (
            options.work / name.replace(", ", "-").replace(" ", "-"),
            name.startswith("trained"),
        )
        original, kept = place / "original", place / "results.json"
        if not (original / "model.safetensors").exists():
            write(original)
        rows = results[name] = json.loads(kept.read_text()) if kept.exists() else {}
        texts, calibration = read(options, name)
        for variant, make in makers(options, texts, calibration, trained, rows).items():
            if variant in rows or not all(
                re.search(part, f"{name}: {variant}") for part in options.only
            ):
                continue
            folder = place / variant.replace(", ", "-").replace(" ", "-")
            try:
                rows[variant] = measure(original, folder, make, texts, options.tokens)
            except (
                MlxArchError,
                subprocess.CalledProcessError,
                ImportError,
                SystemExit,
                KeyError,
            ) as error:
                print(f"{name}: {variant} was not measured: {type(error).__name__}: {error}")
                continue
            kept.write_text(json.dumps(rows, indent=1))
            print(
                f"{name}: {variant}: KL {rows[variant]['all']['kl_mean']['value']:.4f}", flush=True
            )
    show(results)


def read(options: argparse.Namespace, name: str) -> tuple[list[Text], str]:
    """The texts to judge by, and another one for those quantizers that want to see text."""
    held_out = [path.read_text() for path in sorted(options.trained.glob("*/heldout.txt"))][:1]
    calibration = held_out[0][-options.calibration :] if held_out else ""
    if not name.startswith("trained"):
        return bundled_texts(), calibration
    third = len(held_out[0]) // 3
    return [
        Text(f"held out {i + 1}", held_out[0][i * third : (i + 1) * third]) for i in range(2)
    ], calibration


if __name__ == "__main__":
    main()
