"""Do mlx-lm and mlxarch read each other's quantized folders, and compute the same from them?

    python benchmarks/interchange.py --mlx-lm PYTHON CHECKPOINT [CHECKPOINT …]

PYTHON is an interpreter of an environment with mlx-lm. Each checkpoint is quantized to 4 and 8 bits by both; each of
the two loads both results, computes in float32, and the largest difference of a logit over 64 random tokens is printed.
The difference between 4 and 8 bits is printed as well: it shows how far apart logits are that do not agree.

Gemma 3n needs ``--limit 1e-3`` where a sparsity is set: what just passes the cutoff, or just does not, depends on the
last bit, so that in float32 every implementation, transformers too, is up to 7e-4 from the same model in float64.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxarch.loading.load import load_model
from mlxarch.quantize import convert

LIMIT = 1e-4

MLX_LM = """
import sys
import mlx.core as mx, numpy as np
from mlx.utils import tree_map
from mlx_lm.convert import convert
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from pathlib import Path
what, folder, target, argument = sys.argv[1:]
if what == "convert":
    convert(folder, target, quantize=True, q_bits=int(argument), q_group_size=64)
else:
    model, _ = load_model(Path(folder))
    wide = lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p
    model.update(tree_map(wide, model.parameters()))
    # with caches: without, its Gemma 3n shares no keys and values
    np.save(target, np.array(model(mx.array(np.load(argument)), make_prompt_cache(model))))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--mlx-lm", required=True, help="a Python that has mlx-lm")
    parser.add_argument("--dtype", help="what mlxarch stores norms and scales in")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="difference of logits that is allowed"
    )
    options = parser.parse_args()
    worst = 0.0
    for checkpoint in options.checkpoints:
        with tempfile.TemporaryDirectory() as folder:
            worst = max(
                worst, compare(checkpoint.resolve(), Path(folder), options.mlx_lm, options.dtype)
            )
    print(f"largest difference {worst:.2e}, allowed {options.limit:.0e}")
    sys.exit(not worst <= options.limit)


def compare(checkpoint: Path, place: Path, python: str, dtype: str | None) -> float:
    def theirs(what: str, folder: Path, target: Path, argument: object) -> None:
        command = [python, "-c", MLX_LM, what, str(folder), str(target), str(argument)]
        subprocess.run(command, check=True, capture_output=True, cwd=place)

    tokens = place / "tokens.npy"
    worst, logits = 0.0, {}
    for bits in (4, 8):
        folders = {"mlxarch": place / f"mlxarch-{bits}", "mlx-lm": place / f"mlx-lm-{bits}"}
        summary = convert(checkpoint, folders["mlxarch"], bits=bits, dtype=dtype)
        theirs("convert", checkpoint, folders["mlx-lm"], bits)
        for maker, folder in folders.items():
            model, _ = load_model(folder, dtype="float32")
            np.save(tokens, np.random.default_rng(0).integers(0, model.vocab_size, (1, 64)))
            ours = np.array(model(mx.array(np.load(tokens))))
            theirs("logits", folder, place / "logits.npy", tokens)
            difference = float(np.abs(ours - np.load(place / "logits.npy")).max())
            print(
                f"{checkpoint.name}: {bits} bits by {maker}: {difference:.2e}",
                *summary.notes,
                flush=True,
            )
            worst, logits[bits, maker] = max(worst, difference), ours
    for maker in ("mlxarch", "mlx-lm"):
        apart = np.abs(logits[4, maker] - logits[8, maker]).max()
        print(f"{checkpoint.name}: by {maker}, 4 against 8 bits: {apart:.2e}")
    return worst


if __name__ == "__main__":
    main()
