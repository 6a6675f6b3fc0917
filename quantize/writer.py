"""safetensors files whose header is known first and whose tensors arrive by rows, in any order."""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxarch.quantize.disk import Disk
from mlxarch.quantize.plan import Item, Plan, Shard
from mlxarch.tensors import DTYPES, Packed, Tensor


class Writer:
    """Writes the shards of a plan into ``folder``. Methods raise OSError."""

    def __init__(self, plan: Plan, folder: Path, disk: Disk) -> None:
        self.folder, self.disk = folder, disk
        self._entries = plan.entries
        self._shards = {entry.path: shard for shard in plan.shards for entry in shard.entries}
        self._open: dict[str, int] = {}
        self._unsynced: set[str] = set()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def put(self, path: str, item: Item, row: int, rows: mx.array) -> None:
        """Store ``rows``, of the item's dtype, as the rows from ``row`` on of a tensor that parameter ``path`` has."""
        shard = self._shards[path]
        descriptor = self._descriptor(shard)
        # as bytes, for Python's buffers know no bfloat16; NumPy makes no copy here
        octets = np.asarray(mx.contiguous(rows).reshape(-1).view(mx.uint8)).data
        self.disk.write(descriptor, octets, shard.positions[item.name] + row * item.row_bytes)
        self._unsynced.add(shard.file)

    def sync(self) -> None:
        """Return once all that was put is on the medium."""
        for file in sorted(self._unsynced):
            self.disk.sync(self._open[file])
        if self._unsynced:
            self.disk.sync_folder(self.folder)
        self._unsynced.clear()

    def holds(self, path: str) -> bool:
        """Whether the file that ``path`` belongs to is there and reaches beyond it; its bytes are not looked at."""
        shard = self._shards[path]
        file = self.folder / shard.file
        ends = [shard.positions[item.name] + item.nbytes for item in self._entries[path].parts.values()]
        return file.is_file() and file.stat().st_size >= max(ends)

    def stored(self, path: str) -> Tensor | None:
        """A parameter as it was put, if it was quantized."""
        entry, shard = self._entries[path], self._shards[path]
        if entry.treatment != "quantized" or entry.quantization is None:
            return None
        file = self.folder / shard.file
        parts = {part: _Put(file, item, shard.positions[item.name]) for part, item in entry.parts.items()}
        return Packed(path, parts, entry.quantization)

    def _descriptor(self, shard: Shard) -> int:
        if shard.file not in self._open:
            self._open[shard.file] = self.disk.open(self.folder / shard.file)
            self.disk.write(self._open[shard.file], shard.header, 0)  # after a resume the same bytes once more
        return self._open[shard.file]


class _Put(Tensor):
    """A tensor in a file that is still being written."""

    def __init__(self, file: Path, item: Item, position: int) -> None:
        self._file, self._item, self._position = file, item, position
        self.shape, self.dtype = item.shape, DTYPES[item.dtype]

    def rows(self, start: int, stop: int) -> mx.array:
        """See Tensor. Raises OSError."""
        with self._file.open("rb", buffering=0) as file:
            octets = os.pread(
                file.fileno(), (stop - start) * self._item.row_bytes, self._position + start * self._item.row_bytes
            )
        words = mx.array(np.frombuffer(octets, f"u{self.dtype.size}"))
        return words.view(self.dtype).reshape(stop - start, -1)
