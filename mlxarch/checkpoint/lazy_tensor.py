"""Lazily read tensors: shape and dtype come from the header, values are read by rows on demand.

A quantizer reads a tensor in chunks of rows, a loader reads it whole. Where the stored form differs
from the one that a model needs (quantized, split, stacked, transposed, another number format), a
LazyTensor computes its rows from the rows of other tensors.
"""

from abc import ABC, abstractmethod
from math import prod
from typing import cast
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.safetensors_header import TensorInfo
from mlxarch.checkpoint.shards import Shard
from mlxarch.errors import CheckpointError

DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F8_E4M3": mx.uint8,  # MLX has no float8 dtype; ``Fp8BlockTensor`` decodes the bytes
}
"""MLX dtype of each safetensors dtype."""

SAFETENSORS_DTYPES = {dtype: name for name, dtype in reversed(DTYPES.items())}
"""Safetensors dtype of each MLX dtype; uint8 is U8."""

FLOAT_DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_CHUNK_BYTES = 4 << 20  # bytes in memory while columns are read


class LazyTensor(ABC):
    """A tensor whose values are read when its rows are requested.

    Attributes:
        shape: logical shape, as the model uses it.
        dtype: dtype of the rows.
        origin: the quantization format of another program and how it was converted, for messages;
            empty for other tensors.
        local: whether the values are on this machine, so that reading them downloads nothing.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    origin: str = ""
    local: bool = True

    @property
    def row_count(self) -> int:
        """Rows of the tensor seen as a matrix (prod(shape[:-1]), shape[-1]); 1 for a vector."""
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.size

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> mx.array:
        """Read rows ``start`` to ``stop``: (stop - start, shape[-1]).

        Raises:
            CheckpointError: the file cannot be read, or changed since it was validated.
        """

    def load(self) -> mx.array:
        """Read the whole tensor, in its own shape."""
        return self.read_rows(0, self.row_count).reshape(self.shape)

    def read_columns(self, start: int, stop: int) -> mx.array:
        """Read columns ``start`` to ``stop`` of all rows: (row_count, stop - start).

        Whole rows are read a few at a time, so that memory stays small.
        """
        step = max(_CHUNK_BYTES // max(self.shape[-1] * self.dtype.size, 1), 1)
        pieces = []
        for row in range(0, self.row_count, step):
            rows = self.read_rows(row, min(row + step, self.row_count))
            pieces.append(mx.contiguous(rows[:, start:stop]))
            mx.eval(pieces[-1])
        return mx.concatenate(pieces)


class SafetensorsTensor(LazyTensor):
    """A tensor in a safetensors file."""

    def __init__(self, shard: Shard, info: TensorInfo) -> None:
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{shard.path}: tensor {info.name} has dtype {info.dtype}; mlxarch reads "
                f"{', '.join(DTYPES)}. Save the checkpoint in bfloat16 or float32"
            )
        self.shard = shard
        self.info = info
        self.shape = info.shape
        self.dtype = DTYPES[info.dtype]

    def read_rows(self, start: int, stop: int) -> mx.array:
        width = self.shape[-1] if self.shape else 1
        raw = bytearray((stop - start) * width * self.dtype.size)
        self.shard.read_into(self.info, memoryview(raw), start * width * self.dtype.size)
        # through an unsigned integer type of the same width, because NumPy has no bfloat16
        integers = mx.array(np.frombuffer(raw, f"u{self.dtype.size}"))
        return integers.view(self.dtype).reshape(stop - start, width)

    def read_columns(self, start: int, stop: int) -> mx.array:
        if (start, stop) == (0, self.shape[-1]):
            return self.read_rows(0, self.row_count)
        size = self.dtype.size
        row_bytes = self.shape[-1] * size
        piece_bytes = (stop - start) * size
        raw = bytearray(self.row_count * piece_bytes)
        for row, first in enumerate(range(0, len(raw), piece_bytes)):
            piece = memoryview(raw)[first : first + piece_bytes]
            self.shard.read_into(self.info, piece, row * row_bytes + start * size)
        integers = mx.array(np.frombuffer(raw, f"u{size}"))
        return integers.view(self.dtype).reshape(-1, stop - start)

    def load(self) -> mx.array:
        """Return the whole tensor; MLX reads it in parallel on evaluation, without a copy."""
        if self.info.dtype == "F8_E4M3":
            return super().load()
        array = _take_unread(self.shard, self.info.name)
        if array.shape != self.shape or array.dtype != self.dtype:
            self.shard.check_unchanged()
            raise CheckpointError(
                f"{self.shard.path}: tensor {self.info.name} is {self.dtype} {self.shape}, and MLX "
                f"reads it as {array.dtype} {array.shape}; save the checkpoint again"
            )
        return array


_unread: WeakKeyDictionary[Shard, dict[str, mx.array]] = WeakKeyDictionary()


def _take_unread(shard: Shard, name: str) -> mx.array:
    """Take an array that MLX has not read yet.

    Each is handed out once, so that no reference here keeps the values in memory after use.
    """
    if name not in _unread.get(shard, {}):
        shard.check_unchanged()  # MLX opens the file anew, by its path
        try:
            arrays = mx.load(str(shard.path), format="safetensors")
            _unread[shard] = cast(dict[str, mx.array], arrays)
        except (RuntimeError, ValueError) as error:
            shard.check_unchanged()
            raise CheckpointError(
                f"{shard.path}: MLX does not read it ({error}); download it again"
            ) from None
    if name not in _unread[shard]:
        shard.check_unchanged()
        raise CheckpointError(
            f"{shard.path}: MLX does not find tensor {name}; download the file again"
        )
    return _unread[shard].pop(name)


def lossless_origin(origin: str, dtype: mx.Dtype) -> str:
    """Describe a lossless conversion to MLX's format, for ``LazyTensor.origin``.

    ``dtype`` is that of the scales and biases.
    """
    kept = (
        f", scales and biases in {str(dtype).rpartition('.')[2]}" if dtype in FLOAT_DTYPES else ""
    )
    return f"{origin}, which MLX's packing holds without loss{kept}"
