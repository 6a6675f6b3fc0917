"""Writer of safetensors files of a known layout, whose rows may arrive in any order."""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.layout import OutputLayout, OutputShard, TensorSpec
from mlxarch.checkpoint.lazy_tensor import DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.system.durable_files import Disk


class SafetensorsWriter:
    """Writes the files of an output layout into a folder. Its methods raise OSError.

    Args:
        layout: parameters, headers and positions in the files.
        folder: destination of the files.
        disk: file operations that write them.
    """

    def __init__(self, layout: OutputLayout, folder: Path, disk: Disk) -> None:
        self.folder = folder
        self.disk = disk
        self._entries = layout.entries
        self._shards = {entry.path: shard for shard in layout.shards for entry in shard.entries}
        self._open: dict[str, int] = {}  # file name -> descriptor
        self._unsynced: set[str] = set()

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def write_rows(self, path: str, item: TensorSpec, first_row: int, rows: mx.array) -> None:
        """Write rows of one of the tensors that a parameter is stored as.

        Args:
            path: path of the parameter.
            item: its tensor: the weight, the scales or the biases.
            first_row: position of the first of ``rows`` in the tensor.
            rows: (R, columns) of the tensor's dtype.
        """
        shard = self._shards[path]
        descriptor = self._descriptor(shard)
        # as bytes, because Python's buffers have no bfloat16; NumPy makes no copy here
        data = np.asarray(mx.contiguous(rows).reshape(-1).view(mx.uint8)).data
        position = shard.positions[item.name] + first_row * item.row_bytes
        self.disk.write(descriptor, data, position)
        self._unsynced.add(shard.file)

    def sync(self) -> None:
        """Return once everything written so far has reached the medium."""
        for file in sorted(self._unsynced):
            self.disk.sync(self._open[file])
        if self._unsynced:
            self.disk.sync_folder(self.folder)
        self._unsynced.clear()

    def file_covers(self, path: str) -> bool:
        """True if a parameter's file exists and is long enough; its bytes are not checked."""
        shard = self._shards[path]
        file = self.folder / shard.file
        items = self._entries[path].tensors.values()
        end = max(shard.positions[item.name] + item.nbytes for item in items)
        return file.is_file() and file.stat().st_size >= end

    def written_tensor(self, path: str) -> LazyTensor | None:
        """A written parameter, read back from its file; None if it is not quantized."""
        entry = self._entries[path]
        shard = self._shards[path]
        if entry.treatment != "quantized" or entry.quantization is None:
            return None
        file = self.folder / shard.file
        parts = {
            part: _WrittenTensor(file, item, shard.positions[item.name])
            for part, item in entry.tensors.items()
        }
        return QuantizedTensor(path, parts, entry.quantization)

    def _descriptor(self, shard: OutputShard) -> int:
        if shard.file not in self._open:
            self._open[shard.file] = self.disk.open(self.folder / shard.file)
            # a resumed run writes the same bytes again
            self.disk.write(self._open[shard.file], shard.header, 0)
        return self._open[shard.file]


class _WrittenTensor(LazyTensor):
    """A tensor in a file that is still being written."""

    def __init__(self, file: Path, item: TensorSpec, position: int) -> None:
        self._file = file
        self._item = item
        self._position = position
        self.shape = item.shape
        self.dtype = DTYPES[item.dtype]

    def read_rows(self, start: int, stop: int) -> mx.array:
        """Read rows ``start`` to ``stop`` of a tensor that was written before.

        Raises:
            OSError: the file cannot be read.
        """
        row_bytes = self._item.row_bytes
        with self._file.open("rb", buffering=0) as file:
            data = os.pread(
                file.fileno(), (stop - start) * row_bytes, self._position + start * row_bytes
            )
        integers = mx.array(np.frombuffer(data, f"u{self.dtype.size}"))
        return integers.view(self.dtype).reshape(stop - start, -1)
