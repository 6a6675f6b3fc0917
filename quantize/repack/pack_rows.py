"""Packing of an embedding table for SSD streaming: all arrays of one row become contiguous.

A quantized row consists of codes, scales and biases, which lie far apart in a checkpoint. Packed,
they form one record that takes one read. docs/rows-format.md specifies the file.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mlxarch.checkpoint.lazy_tensor import SAFETENSORS_DTYPES, LazyTensor
from mlxarch.checkpoint.packed_experts import RecordQuantization
from mlxarch.checkpoint.packed_rows import RowArray, TableHeader
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.ssd_streaming.row_cache import RowFile
from mlxarch.system.checksums import crc32
from mlxarch.system.durable_files import Disk

BLOCK_BYTES = 8 << 20  # of records in memory at a time


class RowTableWriter:
    """Writes an embedding table as a file of records, one per row.

    Args:
        path: path of the table in the checkpoint.
        tensor: its weight.

    Attributes:
        file: the rows where they are stored now.
        nbytes: size of the file to write.
    """

    def __init__(self, path: str, tensor: LazyTensor) -> None:
        """Raise CheckpointError if the table is stored in a form that has to be converted first."""
        self.path = path
        self.file = RowFile(path, tensor, "never")
        quantization = asdict(tensor.quantization) if isinstance(tensor, QuantizedTensor) else None
        self._quantization = msgspec.convert(quantization, RecordQuantization | None)
        self._header = self._make_header()
        self.nbytes = len(self._header) + self.file.count * (self.file.nbytes + 4)

    def _make_header(self) -> bytes:
        """Make the safetensors header; checksums come first, to be aligned to four bytes."""
        count = self.file.count
        row_bytes = self.file.nbytes
        arrays = tuple(
            RowArray(field.name, SAFETENSORS_DTYPES[field.dtype], field.nbytes // field.dtype.size)
            for field in self.file.fields
        )
        table: dict[str, Any] = {
            "__metadata__": TableHeader(self.path, arrays, self._quantization).metadata,
            f"{self.path}.crc32": {
                "dtype": "U32",
                "shape": [count],
                "data_offsets": [0, 4 * count],
            },
            f"{self.path}.records": {
                "dtype": "U8",
                "shape": [count, row_bytes],
                "data_offsets": [4 * count, 4 * count + count * row_bytes],
            },
        }
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def tensor_positions(self) -> set[tuple[Path, int]]:
        """Place of each tensor that holds the embedding table before repacking.

        Returns:
            (file, offset of the first byte in the file) of the weight and, if the table is quantized,
            of its scales and biases.
        """
        return {(field.stored.shard.path, field.stored.info.start) for field in self.file.fields}

    def write(self, disk: Disk, descriptor: int, progress: Callable[[int], None]) -> None:
        """Write the whole file.

        Args:
            disk: file operations that write it.
            descriptor: descriptor of the file, open for writing.
            progress: called with the bytes of records written so far.

        Raises:
            OSError: it cannot be written.
            EmbeddingReadError: a row cannot be read.
        """
        count = self.file.count
        row_bytes = self.file.nbytes
        checksums = np.empty(count, np.uint32)
        step = max(BLOCK_BYTES // row_bytes, 1)
        start = len(self._header) + checksums.nbytes
        for first in range(0, count, step):
            records = np.empty((min(step, count - first), row_bytes), np.uint8)
            for row, record in enumerate(records, first):
                self.file.read(row, record)
                checksums[row] = crc32(record)
            disk.write(descriptor, records.reshape(-1).data, start + first * row_bytes)
            progress((first + len(records)) * row_bytes)
        disk.write(descriptor, self._header + checksums.astype("<u4").tobytes(), 0)
