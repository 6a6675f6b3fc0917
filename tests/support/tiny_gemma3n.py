"""A tiny Gemma 3n whose table of per-layer embeddings has more rows than a prompt, and fewer than the vocabulary."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

import parity
from mlxarch.blocks import CausalLM
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.execution import Execution
from mlxarch.loading.load import load_model
from mlxarch.loading.registry import architecture
from mlxarch.ssd_streaming.embeddings import StreamedEmbedding

TABLE = "model.embed_tokens_per_layer"
ROWS, VOCAB = 300, 320
MEMORY, SSD = Execution(), Execution(ple="ssd")
MODES: dict[str, dict[str, Any]] = {
    **{
        f"affine-{bits}": {"bits": bits, "group_size": 32, "method": "round"}
        for bits in (2, 3, 4, 5, 6, 8)
    },
    **{
        mode: {"bits": int(bits), "mode": mode}
        for mode, bits in (("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4))
    },
    **{dtype: {"bits": None, "dtype": dtype} for dtype in ("float32", "bfloat16", "float16")},
}


def make_gemma3n(folder: Path, **settings: Any) -> Path:
    """Write the model, with random weights in float32."""
    config = json.loads((parity.GOLDEN / "gemma3n_text" / "config.json").read_text()) | {
        **{
            "vocab_size": VOCAB,
            "vocab_size_per_layer_input": ROWS,
            "hidden_size_per_layer_input": 32,
        },
        **{"intermediate_size": 64, "hidden_size": 64, "laurel_rank": 32, "head_dim": 32},
        **settings,
    }
    rng = np.random.default_rng(1)
    shapes = dict(tree_flatten(architecture(config).build().parameters()))
    weights = {
        name: rng.normal(0, 0.3, value.shape).astype(np.float32) for name, value in shapes.items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def load(folder: Path, execution: Execution = MEMORY, **arguments: Any) -> CausalLM:
    """A model, and nothing else."""
    return load_model(folder, execution=execution, **arguments)[0]


def table_of(model: CausalLM) -> StreamedEmbedding:
    """Embedding table that is read from the disk."""
    [table] = [module for module in model.modules() if isinstance(module, StreamedEmbedding)]
    return table


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def generated(model: CausalLM, tokens: list[int], count: int = 12, **sampling: Any) -> list[int]:
    """Answer of the model, greedy by default."""
    session = Session(model.make_caches())
    return [token for token, _ in decode(model, session, tokens, Sampling(**sampling), count)]
