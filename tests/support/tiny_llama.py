"""Small Llama checkpoints with random weights, and what is in a folder; NumPy only."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
TOKENIZER = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "merges.txt": "a b",
}


def make_llama(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    inner: int = 128,
    vocab: int = 96,
    tied: bool = False,
    dtype: type = np.float32,
    shards: int = 1,
    seed: int = 0,
    **config: Any,
) -> dict[str, np.ndarray]:
    """Write a checkpoint with tokenizer files into ``folder``, which is made; returns its weights."""
    draw = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in (f"model.layers.{n}" for n in range(layers)):
        for name, rows in {
            "q_proj": hidden,
            "k_proj": hidden // 2,
            "v_proj": hidden // 2,
            "o_proj": hidden,
        }.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = (rows, hidden)
        shapes |= {
            f"{layer}.mlp.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")
        }
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {
            f"{layer}.{name}.weight": (hidden,)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    weights = {
        name: (draw.normal(size=shape) * 0.1).astype(dtype) for name, shape in shapes.items()
    }
    settings = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 128, "tie_word_embeddings": tied,
        "torch_dtype": np.dtype(dtype).name,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings | config))
    for name, text in TOKENIZER.items():
        (folder / name).write_text(text)
    save_weights(folder, weights, shards)
    return weights


def save_weights(folder: Path, weights: dict[str, np.ndarray], shards: int = 1) -> None:
    """Write the weights as one file, or as several with an index."""
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    files = {
        name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors"
        for n, name in enumerate(weights)
    }
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
