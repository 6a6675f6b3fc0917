"""GGUF files of a tiny Llama, written by the gguf package."""

from pathlib import Path

import gguf
import numpy as np

K = gguf.GGMLQuantizationType
HIDDEN, HEADS, KV_HEADS, HEAD, WIDE = 256, 4, 2, 64, 512
VOCABULARY = [chr(code) for code in range(0x100, 0x100 + 61)] + [
    "<s>",
    "</s>",
    "ĀĀ",
]  # any 64 tokens will do here


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row order of Llama's q and k as llama.cpp's converter writes it: halves of a head become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def weights(layers: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (64, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for n in range(layers):
        shapes |= {f"blk.{n}.{name}.weight": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {
            f"blk.{n}.attn_q.weight": (HEADS * HEAD, HIDDEN),
            f"blk.{n}.attn_output.weight": (HIDDEN, HIDDEN),
        }
        shapes |= {f"blk.{n}.attn_{name}.weight": (KV_HEADS * HEAD, HIDDEN) for name in "kv"}
        shapes |= {f"blk.{n}.ffn_{name}.weight": (WIDE, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"blk.{n}.ffn_down.weight": (HIDDEN, WIDE)}
    return {
        name: (random.standard_normal(shape) / 8).astype(np.float32)
        for name, shape in shapes.items()
    }


def q6_k(rows: int, columns: int) -> np.ndarray:
    """The package does not quantize to Q6_K: blocks of random codes, each with a small scale at its end."""
    blocks = np.random.default_rng(6).integers(0, 256, (rows, columns // 256, 210), np.uint8)
    blocks[..., 208:] = np.array([0.01], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write(
    path: Path,
    tensors: dict,
    kinds: dict | None = None,
    architecture: str = "llama",
    keys: dict | None = None,
) -> Path:
    """``kinds``: GGUF name -> type. ``keys``: metadata, which replaces or (None) removes the usual."""
    writer = gguf.GGUFWriter(path, architecture)
    usual = {
        f"{architecture}.block_count": 1,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": WIDE,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": VOCABULARY,
        "tokenizer.ggml.token_type": [1] * 61 + [3, 3, 1],
        "tokenizer.ggml.merges": ["Ā Ā"],
        "tokenizer.ggml.bos_token_id": 61,
        "tokenizer.ggml.eos_token_id": 62,
    }
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in (usual | (keys or {})).items():
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name, K.F32)
        if values.dtype == np.uint8:
            writer.add_tensor(name, values, raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    return path


def by_package(path: Path) -> dict[str, np.ndarray]:
    """Name -> float32 values, as the gguf package has them."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
