"""GGUF through the gguf package (``mlxarch[gguf]``), behind the checks of ``gguf_header``. Imported when needed."""

import os
from typing import Any

import gguf
import numpy as np

from mlxarch.checkpoint import Shard, TensorInfo
from mlxarch.errors import CheckpointError
from mlxarch.quantize.gguf_header import check_header


class GGUFFile(Shard):
    """A GGUF file, validated and held open.

    ``tensors`` has GGUF's names; their dtypes are those of GGML ("Q4_1"), their shapes are row-major, the reverse of
    GGUF's dimensions. ``keys`` is the metadata as plain Python values.

    Raises:
        CheckpointError: the header breaks a rule (see ``check_header``), or the package refuses it for another reason.
    """

    keys: dict[str, Any]

    def _read_header(self, fd: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        with open(os.dup(fd), "rb") as file:
            check_header(file, self.path)
            try:
                reader = _Reader(file)  # pyright: ignore[reportArgumentType]  # numpy.memmap, which it calls, takes files
                self.keys = {key: field.contents() for key, field in reader.fields.items()}
            except (ValueError, KeyError, IndexError, OverflowError) as error:
                raise CheckpointError(f"{self.path}: the gguf package cannot read it: {error}") from error
        return {tensor.name: _info(tensor) for tensor in reader.tensors}, {}


def _info(tensor: gguf.ReaderTensor) -> TensorInfo:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return TensorInfo(tensor.name, tensor.tensor_type.name, shape, int(tensor.data_offset), int(tensor.n_bytes))


def dequantize(blocks: np.ndarray, dtype: str) -> np.ndarray:
    """Rows of blocks as bytes (rows, bytes of a row) -> float32 (rows, values of a row)."""
    with np.errstate(all="ignore"):  # an infinite scale: whoever writes the values looks for NaN and infinity
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType[dtype])


class _Reader(gguf.GGUFReader):
    """The package's reader makes two memory maps for every element of an array: 1 kB and 15 µs each, half a gigabyte
    for the vocabulary of Qwen3. This one makes one numpy array for numbers, and one for each string.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        types = [gguf.GGUFValueType.ARRAY, kind]
        if kind != gguf.GGUFValueType.STRING:
            values = np.asarray(self._get(start, self.gguf_scalar_to_np[kind], count))
            return 12 + values.nbytes, [values], [0], types
        data, end, parts = np.asarray(self.data), start, []
        for _ in range(count):
            length = int.from_bytes(data[end : end + 8].tobytes(), "little")
            parts.append(data[end + 8 : end + 8 + length])
            end += 8 + length
        return end - orig_offs, parts, list(range(count)), types
