"""Peak memory of quantizing a synthetic checkpoint, above what the imports take.

    python benchmarks/conversion_memory.py 1000 8000        # sizes in MB; bfloat16 Llamas with random weights

A third of each checkpoint, and at least 250 MB where there is room, is one tensor. Every conversion runs in a process
of its own. ``--chunk`` sets the bytes of a chunk in float32: with a large one, whole tensors are converted at once,
which shows that the measurement notices.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD = 4 * 10**9


def make_checkpoint(folder: Path, megabytes: int) -> int:
    """A bfloat16 Llama of about that size, its weights one block of normal noise over and over; returns its bytes."""
    import numpy as np

    hidden, inner = (4096, 14336) if megabytes >= 1000 else (1024, 4096)
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (1024, hidden),
        "v_proj": (1024, hidden),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    layer = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    layer |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    vocab = int(megabytes * 10**6 * (0.8 if megabytes < 1000 else 0.3) / 2 / hidden) // 64 * 64
    layers = max(
        1,
        round(
            (megabytes * 10**6 / 2 - vocab * hidden) / sum(int(np.prod(s)) for s in layer.values())
        ),
    )
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes |= {
        f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()
    }
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 128, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    }  # fmt: skip
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * int(np.prod(s)) for s in shards[-1].values()) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        table, end = {}, 0
        for name, shape in shard.items():
            begin, end = end, end + 2 * int(np.prod(shape))
            table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        header = json.dumps(table).encode()
        with open(folder / file, "wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for at in range(0, end, len(block)):
                out.write(block[: end - at])
        total += end
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def peak_rss() -> int:
    """Bytes that this process has held at most."""
    if sys.platform == "linux":  # ru_maxrss would be inherited from the parent
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(source: str, output: str, bits: int, chunk: int, method: Any) -> dict[str, float]:
    """Convert in this process."""
    import mlx.core as mx

    from mlxarch.quantize import prepare
    from mlxarch.quantize.conversion import Limits

    mx.eval(mx.zeros(1) + 1)
    conversion = prepare(source, output, bits=bits, method=method, limits=Limits(chunk_bytes=chunk))
    before, start = peak_rss(), time.perf_counter()
    summary = conversion.run()
    seconds = time.perf_counter() - start
    held = sum(path.stat().st_blocks * 512 for path in Path(output).iterdir())
    return {
        "source_MB": summary.source_bytes / 1e6,
        "output_MB": summary.output_bytes / 1e6,
        "import_MB": before / 1e6,
        "above_import_MB": (peak_rss() - before) / 1e6,
        "seconds": seconds,
        "estimate_error": abs(conversion.disk_bytes - held) / held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("megabytes", type=int, nargs="*", default=[1000, 8000])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=8 << 20)
    parser.add_argument("--method", default="round", help="round, search or gptq")
    parser.add_argument(
        "--folder", help="where to put the checkpoints, which are removed afterwards"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child, options.bits, options.chunk, options.method)))
        return
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            source = Path(place, "source")
            source.mkdir()
            make_checkpoint(source, megabytes)
            os.sync()
            command = [
                sys.executable,
                __file__,
                "--bits",
                str(options.bits),
                "--chunk",
                str(options.chunk),
            ]
            command += [
                "--method",
                options.method,
                "--child",
                str(source),
                str(Path(place, "output")),
            ]
            print(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(),
                flush=True,
            )


if __name__ == "__main__":
    main()
