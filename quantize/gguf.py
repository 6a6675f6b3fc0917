"""GGUF files as a source of tensors: what MLX packs alike is repacked without loss, the rest is dequantized.

Source: the block formats are those of ggml (ggml-common.h), MLX's packing is that of ``mx.quantize``.
"""

import json
import os
from math import prod
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlxarch.errors import BackendMissing, CheckpointError
from mlxarch.quantize.gguf_blocks import REPACKED, Layout
from mlxarch.quantize.gguf_config import huggingface_name, llama3_scaling, model_config
from mlxarch.quantize.gguf_tokenizer import Vocabulary, tokenizer_files
from mlxarch.quantize.rounding import words_of
from mlxarch.tensors import Packed, Tensor, without_loss
from mlxarch.weights import Source, notes_on

if TYPE_CHECKING:
    from mlxarch.checkpoint import TensorInfo
    from mlxarch.quantize.gguf_reader import GGUFFile

PLAIN = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
FLOAT16_MAX = 65504.0
CHUNK = 4 << 20  # bytes of a piece, where a whole tensor is looked through


def open_gguf(path: str | os.PathLike[str]) -> Source:
    """Open a GGUF file of a Llama or Qwen model. The header is validated; of the tensors, only scales are read.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K and Q5_K become affine Packed tensors in groups of 32, of the same values, MXFP4
    MLX's mxfp4; float32, float16 and bfloat16 stay as they are; every other type is dequantized to float32 as its rows
    are read. Names, shapes and the order of the rows are those of the Hugging Face checkpoint, and so are config and
    tokenizer files.

    Raises:
        CheckpointError: the file breaks a rule of the format, or a scale is NaN or infinite.
        ConfigError, UnsupportedArchitecture: see ``gguf_config.model_config``.
        TokenizerError: see ``gguf_tokenizer.tokenizer_files``.
        BackendMissing: the gguf package is not installed.
    """
    try:
        from mlxarch.quantize.gguf_reader import GGUFFile
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise BackendMissing(
            f"{path}: reading GGUF needs the gguf package; install it with: pip install 'mlxarch[gguf]'"
        ) from error
    file = GGUFFile.open(path)
    try:
        return _source(file)
    except BaseException:
        file.close()
        raise


def _source(file: "GGUFFile") -> Source:
    where, infos = str(file.path), dict(file.tensors)
    config = model_config(file.keys, {name: info.shape for name, info in infos.items()}, where)
    if "rope_freqs.weight" in infos:
        factors = _tensor(file, infos.pop("rope_freqs.weight"))
        config["rope_scaling"] = llama3_scaling(np.array(factors.rows(0, 1).astype(mx.float32))[0], config, where)
    permuted = {}
    if config["model_type"] == "llama":
        permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors: dict[str, Tensor] = {}
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
    sidecars = tokenizer_files(vocabulary) | {"generation_config.json": json.dumps(ids, indent=2).encode()}
    return Source(config | ids, tensors, sidecars, (file,), notes_on(tensors))


def _tensor(file: "GGUFFile", info: "TensorInfo", heads: int = 0) -> Tensor:
    blocks = _Blocks(file, info, heads)
    if info.dtype in PLAIN:
        return _Plain(blocks)
    return _Repacked(blocks) if info.dtype in REPACKED and len(info.shape) > 1 else _Dequantized(blocks)


class _Blocks:
    """The bytes of a tensor by rows, in the order of the rows of the Hugging Face checkpoint.

    llama.cpp turns neighbouring features where transformers turns the two halves of a head, so its converter permutes
    the rows of Llama's q and k. With ``heads``, row (head, half, i) is read from where row (head, i, half) stands.
    The rows of a vector are its elements.
    """

    def __init__(self, file: "GGUFFile", info: "TensorInfo", heads: int = 0):
        self.file, self.info = file, info
        self.shape = info.shape
        self.count = prod(self.shape[: max(1, len(self.shape) - 1)])
        if len(self.shape) == 1 and info.dtype not in PLAIN:
            self.count = 1  # a block holds several elements
        self.row_bytes = info.nbytes // self.count
        self.head = self.count // heads if heads else 1
        if heads and (self.head * heads != self.count or self.head % 2):
            raise CheckpointError(
                f"{file.path}: tensor {info.name!r} has {self.count} rows, which {heads} heads of even size do not fill"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows (stop - start, row_bytes) in uint8."""
        first = start // self.head * self.head
        last = -(-stop // self.head) * self.head
        raw = np.empty((last - first, self.row_bytes), np.uint8)
        self.file.read_into(self.info, raw, first * self.row_bytes)
        if self.head == 1:
            return raw
        heads, pairs = (last - first) // self.head, self.head // 2
        raw = raw.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(last - first, -1)
        return raw[start - first : stop - first]


class _Plain(Tensor):
    """float32, float16 or bfloat16, as stored."""

    def __init__(self, blocks: _Blocks):
        self.blocks, self.shape, self.dtype = blocks, blocks.shape, PLAIN[blocks.info.dtype]

    def rows(self, start: int, stop: int) -> mx.array:
        vector = len(self.shape) == 1
        raw = self.blocks.read(0, self.blocks.count) if vector else self.blocks.read(start, stop)
        words = np.ascontiguousarray(raw).view(f"u{self.dtype.size}")  # NumPy has no bfloat16
        return mx.array(words).view(self.dtype).reshape(-1, self.shape[-1])[: stop - start]


class _Dequantized(Tensor):
    """Any other block type, as float32."""

    dtype = mx.float32

    def __init__(self, blocks: _Blocks):
        self.blocks, self.shape = blocks, blocks.shape
        self.origin = f"stored as {blocks.info.dtype}, which MLX's packing cannot hold: unpacked to float32"

    def rows(self, start: int, stop: int) -> mx.array:
        from mlxarch.quantize.gguf_reader import dequantize

        return mx.array(dequantize(self.blocks.read(start, stop), self.blocks.info.dtype))


class _Part(Tensor):
    """Weight, scales or biases of a repacked matrix."""

    def __init__(self, blocks: _Blocks, part: str, shape: tuple[int, ...], dtype: mx.Dtype):
        self.blocks, self.part, self.shape, self.dtype = blocks, part, shape, dtype

    def rows(self, start: int, stop: int) -> mx.array:
        layout = REPACKED[self.blocks.info.dtype]
        blocks = self.blocks.read(start, stop).view(layout.block).ravel()
        if self.part == "weight":
            return words_of(mx.array(layout.codes(blocks).reshape(stop - start, -1)), layout.bits)
        values = layout.scales(blocks)[self.part == "biases"]
        return mx.array(values.reshape(stop - start, -1)).astype(self.dtype)


class _Repacked(Packed):
    """A matrix as MLX packs it: the same codes, the same values.

    MLX computes scale * code + bias. Where codes stand around zero, which MLX's do not, the bias is so many scales:
    exact in float16 unless it overflows; then float32 holds both. In the types "K" scale and bias are products, which
    only float32 holds.
    """

    def __init__(self, blocks: _Blocks):
        layout = REPACKED[blocks.info.dtype]
        settings, dtype = layout.quantization, _scale_dtype(blocks, layout)
        per_group = settings.scales_shape(blocks.shape)
        parts: dict[str, Tensor] = {"weight": _Part(blocks, "weight", settings.packed_shape(blocks.shape), mx.uint32)}
        for part in ("scales", "biases") if settings.mode == "affine" else ("scales",):
            parts[part] = _Part(blocks, part, per_group, dtype)
        super().__init__(blocks.info.name, parts, settings)
        self.origin = without_loss(f"stored as {blocks.info.dtype}", dtype)


def _scale_dtype(blocks: _Blocks, layout: Layout) -> mx.Dtype:
    """Looks through all scales, so that nothing is written before they are known to be good."""
    if layout.mode != "affine":
        return mx.uint8
    largest = 0.0
    step = max(1, CHUNK // blocks.row_bytes)
    for start in range(0, blocks.count, step):
        groups = blocks.read(start, min(start + step, blocks.count)).view(layout.block)
        for name in {"scale", "bias"} & set(layout.block.names or ()):
            found = float(np.abs(groups[name]).max())  # NaN if there is one
            if not found <= FLOAT16_MAX:
                raise CheckpointError(
                    f"{blocks.file.path}: tensor {blocks.info.name!r} has a {name} of {found}; all must be finite. "
                    "Download the file again"
                )
            largest = max(largest, found)
    return mx.float16 if layout.exact and largest * layout.factor <= FLOAT16_MAX else mx.float32
