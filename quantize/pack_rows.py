"""The rows of a table of embeddings, written so that one read brings all of a token's."""

import json
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mlxarch.checksums import crc32
from mlxarch.expert_files import Settings
from mlxarch.quantize.disk import Disk
from mlxarch.row_files import Head, Part
from mlxarch.streaming.rows import RowFile
from mlxarch.tensors import DTYPES, Packed, Tensor

BLOCK = 8 << 20  # bytes of records in memory at a time
NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}


class RowPacking:
    """A table that is to be packed.

    Attributes:
        path: of the table, as a checkpoint names it.
        file: its rows where they are now.
        nbytes: of the file to write.
    """

    def __init__(self, path: str, tensor: Tensor) -> None:
        """Raise CheckpointError where it is stored in a form that must be computed with first."""
        self.path, self.file = path, RowFile(path, tensor, "never")
        settings = asdict(tensor.settings) if isinstance(tensor, Packed) else None
        self._quantization = msgspec.convert(settings, Settings | None)
        self._header = self._make_header()
        self.nbytes = len(self._header) + self.file.count * (self.file.nbytes + 4)

    def _make_header(self) -> bytes:
        """A safetensors header; the checksums come first, so that they stand at a multiple of four bytes."""
        count, nbytes = self.file.count, self.file.nbytes
        fields = self.file.fields
        parts = tuple(Part(f.name, NAMES[f.dtype], f.nbytes // f.dtype.size) for f in fields)
        table: dict[str, Any] = {
            "__metadata__": Head(self.path, parts, self._quantization).metadata,
            f"{self.path}.crc32": {"dtype": "U32", "shape": [count], "data_offsets": [0, 4 * count]},
            f"{self.path}.records": {
                **{"dtype": "U8", "shape": [count, nbytes]},
                "data_offsets": [4 * count, 4 * count + prod((count, nbytes))],
            },
        }
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def places(self) -> set[tuple[Path, int]]:
        """File and byte at which each of its tensors begins."""
        return {(field.stored.shard.path, field.stored.info.start) for field in self.file.fields}

    def write(self, disk: Disk, descriptor: int, done: Callable[[int], None]) -> None:
        """Write the whole file; ``done`` is told the bytes so far. Raises OSError and EmbeddingReadError."""
        count, nbytes = self.file.count, self.file.nbytes
        checksums, step = np.empty(count, np.uint32), max(BLOCK // nbytes, 1)
        start = len(self._header) + checksums.nbytes
        for first in range(0, count, step):
            records = np.empty((min(step, count - first), nbytes), np.uint8)
            for place, record in enumerate(records):
                self.file.read(first + place, record)
                checksums[first + place] = crc32(record)
            disk.write(descriptor, records.reshape(-1).data, start + first * nbytes)
            done((first + len(records)) * nbytes)
        disk.write(descriptor, self._header + checksums.astype("<u4").tobytes(), 0)
