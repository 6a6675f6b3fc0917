"""GGUF files, validated by ``header.check_header`` and then read by the gguf package.

The package is the extra ``mlxarch[gguf]``, so this module is imported on demand.
"""

import os
from typing import Any

import gguf
import numpy as np

from mlxarch.checkpoint.gguf.header import check_header
from mlxarch.checkpoint.safetensors_header import TensorInfo
from mlxarch.checkpoint.shards import Shard
from mlxarch.errors import CheckpointError


class GGUFFile(Shard):
    """A GGUF file, validated and kept open.

    Attributes:
        tensors: by GGUF name; dtypes are ggml's ("Q4_1"), shapes are row-major, the reverse of
            GGUF's dimensions.
        keys: the metadata as plain Python values.

    Raises:
        CheckpointError: the header breaks a rule (see ``check_header``), or the package refuses it
            for another reason.
    """

    keys: dict[str, Any]

    def _read_header(self, fd: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        with open(os.dup(fd), "rb") as file:
            check_header(file, self.path)
            try:
                # the reader passes it to numpy.memmap, which accepts file objects
                reader = _Reader(file)  # pyright: ignore[reportArgumentType]
                self.keys = {key: field.contents() for key, field in reader.fields.items()}
            except (ValueError, KeyError, IndexError, OverflowError) as error:
                raise CheckpointError(
                    f"{self.path}: the gguf package cannot read it: {error}"
                ) from error
        return {tensor.name: _info(tensor) for tensor in reader.tensors}, {}


def _info(tensor: gguf.ReaderTensor) -> TensorInfo:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    return TensorInfo(
        tensor.name, tensor.tensor_type.name, shape, int(tensor.data_offset), int(tensor.n_bytes)
    )


def dequantize(blocks: np.ndarray, dtype: str) -> np.ndarray:
    """Dequantize rows of blocks: uint8 (rows, bytes per row) -> float32 (rows, values per row)."""
    # A scale may be infinite: the code that writes the values checks for NaN and infinity.
    with np.errstate(all="ignore"):
        return gguf.dequantize(blocks, gguf.GGMLQuantizationType[dtype])


class _Reader(gguf.GGUFReader):
    """The gguf package's reader with cheaper arrays: one for all numbers, one per string.

    The original makes two memory maps for every element: 1 kB and 15 µs each, half a gigabyte for
    the vocabulary of Qwen3.
    """

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        types = [gguf.GGUFValueType.ARRAY, kind]
        if kind != gguf.GGUFValueType.STRING:
            values = np.asarray(self._get(start, self.gguf_scalar_to_np[kind], count))
            return 12 + values.nbytes, [values], [0], types
        data = np.asarray(self.data)
        end = start
        parts = []
        for _ in range(count):
            length = int.from_bytes(data[end : end + 8].tobytes(), "little")
            parts.append(data[end + 8 : end + 8 + length])
            end += 8 + length
        return end - orig_offs, parts, list(range(count)), types
