"""Quantized models of peers, as folders that ``quality.py`` can score: mlx-lm's quantizers and llama.cpp.

    python benchmarks/quality_peers.py gguf FOLDER FILE                         # a trained model as llama.cpp wants it
    python benchmarks/quality_peers.py llama.cpp FOLDER OUTPUT [--library FILE]  # Q4_K_M, dequantized again

``--library`` is llama.cpp's libllama (.so, .dylib), by default the one of the package llama-cpp-python.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Q4_K_M = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M of llama.h

# mlx-lm ---------------------------------------------------------------------------------------------------------------

MLX_LM = {  # the grids that our variants have, embeddings and head included
    "awq": "--bits 4 --group-size 64 --embed-bits 4 --embed-group-size 64",
    "gptq": "--bits 4 --group-size 64 --fallback-bits 4 --fallback-group-size 64",
    "dynamic_quant": "--target-bpw 5.0 --low-bits 4 --low-group-size 64 --high-bits 6 --high-group-size 64",
}


def mlx_lm(method: str, original: Path, output: Path, calibration: str, samples: int) -> None:
    """One of mlx-lm's quantizers, on ``samples`` windows of 512 tokens where it lets one choose."""
    arguments = MLX_LM[method].split()
    if method != "dynamic_quant":
        arguments += ["--num-samples", str(samples)]
    with tempfile.TemporaryDirectory() as home:
        cache = Path(home) / ".cache" / "mlx-lm"  # where it looks before it would download a text
        cache.mkdir(parents=True)
        (cache / "calibration_v5.txt").write_text(calibration)
        command = [
            sys.executable,
            "-m",
            "mlx_lm",
            method,
            "--model",
            original,
            "--mlx-path",
            output.resolve(),
        ]
        subprocess.run(
            [*command, *arguments], check=True, cwd=home, env=os.environ | {"HOME": home}
        )
    for file in output.glob(
        "*.safetensors"
    ):  # its scales have the type it computed in, float32 on a CPU
        arrays: dict[str, Any] = dict(mx.load(str(file)))
        floats = {
            name: array.astype(mx.bfloat16)
            for name, array in arrays.items()
            if array.dtype == mx.float32
        }
        mx.eval(arrays, floats)
        mx.save_safetensors(str(file), arrays | floats, {"format": "mlx"})


# llama.cpp ------------------------------------------------------------------------------------------------------------


def write_gguf(folder: Path, file: Path) -> None:
    """A Qwen3 or Gemma 3 of ``trained_models.py`` in float32."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    kind = {"qwen3": gguf.MODEL_ARCH.QWEN3, "gemma3_text": gguf.MODEL_ARCH.GEMMA3}[
        config["model_type"]
    ]
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[kind])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__))
    writer.add_token_merges(
        [" ".join(m) if isinstance(m, list) else m for m in vocabulary["merges"]]
    )
    for name, array in weights(folder).items():
        values = np.array(array.astype(mx.float32))
        if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
            values += 1  # llama.cpp multiplies by what is stored
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(original: Path, output: Path, library: Path | None = None) -> float:
    """Q4_K_M of llama.cpp, dequantized into a float32 folder; returns the bits per weight that it had."""
    import gguf

    with tempfile.TemporaryDirectory() as place:
        plain, packed = Path(place) / "f32.gguf", Path(place) / "q4_k_m.gguf"
        write_gguf(original, plain)
        quantize_gguf(plain, packed, library or llama_cpp_library())
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(packed).tensors}
        config = json.loads((original / "config.json").read_text())
        gemma = config["model_type"] == "gemma3_text"
        kind = gguf.MODEL_ARCH.GEMMA3 if gemma else gguf.MODEL_ARCH.QWEN3
        names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
        values: dict[str, mx.array] = {}
        for name, array in weights(original).items():
            tensor = found.pop(names.get_name(name, try_suffixes=(".weight",)))
            floats = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(array.shape)
            values[name] = mx.array(
                floats - 1 if gemma and name.endswith("norm.weight") else floats
            )
        if found:
            raise SystemExit(f"llama.cpp wrote tensors that are unknown: {', '.join(found)}")
        bits = 8 * sum(t.n_bytes for t in gguf.GGUFReader(packed).tensors)
        write_folder(original, output, values)
    return float(bits) / sum(value.size for value in values.values())


def quantize_gguf(source: Path, target: Path, library: Path) -> None:
    """``llama_model_quantize`` with the defaults."""

    class Parameters(
        ctypes.Structure
    ):  # the first two fields of llama_model_quantize_params, room for the others
        _fields_ = [
            ("threads", ctypes.c_int32),
            ("ftype", ctypes.c_int),
            ("others", ctypes.c_byte * 1024),
        ]

    lib = ctypes.CDLL(str(library))
    lib.llama_model_quantize_default_params.restype = Parameters
    lib.llama_model_quantize.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.POINTER(Parameters),
    ]
    lib.llama_backend_init()
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = Q4_K_M
    if status := lib.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    ):
        raise SystemExit(f"llama_model_quantize returned {status}")


def llama_cpp_library() -> Path:
    """libllama of llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("lib/libllama.*")) if spec else []  # type: ignore[index]
    if not found:
        raise SystemExit(
            "llama.cpp is missing: install llama-cpp-python, or name its libllama with --library"
        )
    return found[0]


# Folders --------------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, mx.array]:
    """All arrays of a folder."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(file))
    return found


def write_folder(original: Path, output: Path, values: dict[str, mx.array]) -> None:
    """``values`` as float32 beside the small files of ``original``."""
    output.mkdir(parents=True, exist_ok=True)
    for file in original.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, output)
    config = json.loads((original / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    (output / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=2))
    floats = {name: value.astype(mx.float32) for name, value in values.items()}
    mx.save_safetensors(str(output / "model.safetensors"), floats, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=["gguf", "llama.cpp"])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--library", type=Path)
    options = parser.parse_args()
    if options.work == "gguf":
        write_gguf(options.source, options.output)
    else:
        print(f"{llama_cpp(options.source, options.output, options.library):.3f} bits per weight")


if __name__ == "__main__":
    main()
