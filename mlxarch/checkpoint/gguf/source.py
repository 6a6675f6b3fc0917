"""GGUF files as lazily read tensors, converted to MLX's format or dequantized.

Block types with groups like MLX's convert without loss; all others are dequantized.

Source: the block formats are those of ggml (ggml-common.h), MLX's packing is that of
``mx.quantize``.
"""

import json
import os
from math import prod
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.gguf.blocks import LOSSLESS_LAYOUTS, BlockLayout
from mlxarch.checkpoint.gguf.config import (
    config_from_metadata,
    huggingface_name,
    llama3_rope_scaling,
)
from mlxarch.checkpoint.gguf.tokenizer import Vocabulary, tokenizer_files
from mlxarch.checkpoint.lazy_tensor import LazyTensor, lossless_origin
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import CheckpointSource, describe_origins
from mlxarch.errors import BackendMissing, CheckpointError
from mlxarch.quantization.bit_packing import pack_codes

if TYPE_CHECKING:
    from mlxarch.checkpoint.gguf.reader import GGUFFile
    from mlxarch.checkpoint.safetensors_header import TensorInfo

FLOAT_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
FLOAT16_MAX = 65504.0
CHUNK_BYTES = 4 << 20  # read at a time when all scales of a tensor are checked


def open_gguf(path: str | os.PathLike[str]) -> CheckpointSource:
    """Open a GGUF file of a Llama or Qwen model; the header is validated, and only scales are read.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K and Q5_K become affine matrices in groups of 32 with the same
    values, MXFP4 becomes MLX's mxfp4; float32, float16 and bfloat16 stay as they are; every other
    type is dequantized to float32 as its rows are read. Names, shapes and row order are those of
    the Hugging Face checkpoint, and so are config and tokenizer files.

    Raises:
        CheckpointError: the file breaks a rule of the format, or a scale is NaN or infinite.
        ConfigError, UnsupportedArchitecture: see ``config.config_from_metadata``.
        TokenizerError: see ``tokenizer.tokenizer_files``.
        BackendMissing: the gguf package is not installed.
    """
    try:
        from mlxarch.checkpoint.gguf.reader import GGUFFile
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise BackendMissing(
            f"{path}: reading GGUF needs the gguf package; install it with: pip install "
            "'mlxarch[gguf]'"
        ) from error
    file = GGUFFile.open(path)
    try:
        return _source(file)
    except BaseException:
        file.close()
        raise


def _source(file: "GGUFFile") -> CheckpointSource:
    where = str(file.path)
    infos = dict(file.tensors)
    config = config_from_metadata(
        file.keys, {name: info.shape for name, info in infos.items()}, where
    )
    if "rope_freqs.weight" in infos:
        factors = _tensor(file, infos.pop("rope_freqs.weight"))
        config["rope_scaling"] = llama3_rope_scaling(
            np.array(factors.read_rows(0, 1).astype(mx.float32))[0], config, where
        )
    permuted = {}
    if config["model_type"] == "llama":
        permuted = {
            "attn_q": config["num_attention_heads"],
            "attn_k": config["num_key_value_heads"],
        }
    tensors: dict[str, LazyTensor] = {}
    for name, info in infos.items():
        target = huggingface_name(name)
        if target is None:
            raise CheckpointError(
                f"{where}: tensor {name!r} has no place in a {config['model_type']} model. "
                "Take another file of this model, or its safetensors repository"
            )
        heads = permuted.get(name.split(".")[-2], 0)
        tensors[target] = _tensor(file, info, heads)
    vocabulary = Vocabulary(file.keys, where)
    ids = vocabulary.special_ids()
    sidecars = tokenizer_files(vocabulary) | {
        "generation_config.json": json.dumps(ids, indent=2).encode()
    }
    return CheckpointSource(config | ids, tensors, sidecars, (file,), describe_origins(tensors))


def _tensor(file: "GGUFFile", info: "TensorInfo", heads: int = 0) -> LazyTensor:
    blocks = _BlockRows(file, info, heads)
    if info.dtype in FLOAT_TYPES:
        return _FloatTensor(blocks)
    if info.dtype in LOSSLESS_LAYOUTS and len(info.shape) > 1:
        return _Repacked(blocks)
    return _Dequantized(blocks)


class _BlockRows:
    """The bytes of a tensor, read by rows in the row order of the Hugging Face checkpoint.

    RoPE rotates neighbouring features in llama.cpp and the two halves of a head in transformers, so
    llama.cpp's converter permutes the rows of Llama's q and k. With ``heads``, row (head, half, i)
    is read from the position of row (head, i, half). The rows of a vector are its elements.
    """

    def __init__(self, file: "GGUFFile", info: "TensorInfo", heads: int = 0):
        self.file = file
        self.info = info
        self.shape = info.shape
        self.count = prod(self.shape[: max(1, len(self.shape) - 1)])
        if len(self.shape) == 1 and info.dtype not in FLOAT_TYPES:
            self.count = 1  # a block holds several elements
        self.row_bytes = info.nbytes // self.count
        self.head_rows = self.count // heads if heads else 1
        if heads and (self.head_rows * heads != self.count or self.head_rows % 2):
            raise CheckpointError(
                f"{file.path}: tensor {info.name!r} has {self.count} rows, which {heads} heads of "
                "even size do not fill"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read rows ``start`` to ``stop``: (stop - start, row_bytes) in uint8."""
        first = start // self.head_rows * self.head_rows
        last = -(-stop // self.head_rows) * self.head_rows
        raw = np.empty((last - first, self.row_bytes), np.uint8)
        self.file.read_into(self.info, raw, first * self.row_bytes)
        if self.head_rows == 1:
            return raw
        heads = (last - first) // self.head_rows
        pairs = self.head_rows // 2
        raw = raw.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(last - first, -1)
        return raw[start - first : stop - first]


class _FloatTensor(LazyTensor):
    """float32, float16 or bfloat16, as stored."""

    def __init__(self, blocks: _BlockRows):
        self.blocks = blocks
        self.shape = blocks.shape
        self.dtype = FLOAT_TYPES[blocks.info.dtype]

    def read_rows(self, start: int, stop: int) -> mx.array:
        vector = len(self.shape) == 1
        raw = self.blocks.read(0, self.blocks.count) if vector else self.blocks.read(start, stop)
        # through unsigned integers, because NumPy has no bfloat16
        integers = np.ascontiguousarray(raw).view(f"u{self.dtype.size}")
        return mx.array(integers).view(self.dtype).reshape(-1, self.shape[-1])[: stop - start]


class _Dequantized(LazyTensor):
    """Any other block type, dequantized to float32."""

    dtype = mx.float32

    def __init__(self, blocks: _BlockRows):
        self.blocks = blocks
        self.shape = blocks.shape
        self.origin = (
            f"stored as {blocks.info.dtype}, which MLX's packing cannot hold: unpacked to float32"
        )

    def read_rows(self, start: int, stop: int) -> mx.array:
        from mlxarch.checkpoint.gguf.reader import dequantize

        return mx.array(dequantize(self.blocks.read(start, stop), self.blocks.info.dtype))


class _Component(LazyTensor):
    """Weight, scales or biases of a repacked matrix."""

    def __init__(self, blocks: _BlockRows, key: str, shape: tuple[int, ...], dtype: mx.Dtype):
        self.blocks = blocks
        self.key = key
        self.shape = shape
        self.dtype = dtype

    def read_rows(self, start: int, stop: int) -> mx.array:
        layout = LOSSLESS_LAYOUTS[self.blocks.info.dtype]
        blocks = self.blocks.read(start, stop).view(layout.block).ravel()
        if self.key == "weight":
            codes = layout.codes(blocks).reshape(stop - start, -1)
            return pack_codes(mx.array(codes), layout.bits)
        values = layout.scales(blocks)[0 if self.key == "scales" else 1]
        return mx.array(values.reshape(stop - start, -1)).astype(self.dtype)


class _Repacked(QuantizedTensor):
    """A matrix in MLX's quantized form, with the same codes and values.

    MLX computes scale * code + bias. For types with signed codes, the bias is the lowest code times
    the
    scale: exact in float16 unless it overflows; then both are float32. In the K types, scale and
    bias are products, which are exact in float32 only.
    """

    def __init__(self, blocks: _BlockRows):
        layout = LOSSLESS_LAYOUTS[blocks.info.dtype]
        quantization = layout.quantization
        dtype = _scale_dtype(blocks, layout)
        weight_shape = quantization.packed_shape(blocks.shape)
        scales_shape = quantization.scales_shape(blocks.shape)
        components: dict[str, LazyTensor] = {
            "weight": _Component(blocks, "weight", weight_shape, mx.uint32),
            "scales": _Component(blocks, "scales", scales_shape, dtype),
        }
        if quantization.mode == "affine":
            components["biases"] = _Component(blocks, "biases", scales_shape, dtype)
        super().__init__(blocks.info.name, components, quantization)
        self.origin = lossless_origin(f"stored as {blocks.info.dtype}", dtype)


def _scale_dtype(blocks: _BlockRows, layout: BlockLayout) -> mx.Dtype:
    """Return the dtype of the scales, after a check that all are finite.

    All scales are read now, so that a damaged file is refused before anything is written.
    """
    if layout.mode != "affine":
        return mx.uint8
    largest = 0.0
    step = max(1, CHUNK_BYTES // blocks.row_bytes)
    for start in range(0, blocks.count, step):
        groups = blocks.read(start, min(start + step, blocks.count)).view(layout.block)
        for name in {"scale", "bias"} & set(layout.block.names or ()):
            found = float(np.abs(groups[name]).max())  # NaN if there is one
            if not found <= FLOAT16_MAX:
                raise CheckpointError(
                    f"{blocks.file.path}: tensor {blocks.info.name!r} has a {name} of {found}; all "
                    "must be finite. "
                    "Download the file again"
                )
            largest = max(largest, found)
    return mx.float16 if layout.exact and largest * layout.factor <= FLOAT16_MAX else mx.float32
