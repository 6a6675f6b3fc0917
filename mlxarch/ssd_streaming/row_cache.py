"""Rows of an embedding table on the SSD, and a least-recently-used cache of them in memory.

Reading does not call MLX, so any thread may read.
"""

import threading
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.lazy_tensor import LazyTensor, SafetensorsTensor
from mlxarch.checkpoint.packed_rows import RowTensor
from mlxarch.checkpoint.quantized_tensor import Float8Scales, QuantizedTensor
from mlxarch.checkpoint.tensor_views import Concatenated, SelectedColumns
from mlxarch.errors import CheckpointError, EmbeddingReadError
from mlxarch.ssd_streaming.positional_reads import ReadFailed, RecordFile
from mlxarch.system.checksums import crc32

THREADS = 8
DIRECT_READS = 8  # up to so many rows are read without the threads, which take longer to wake up
CACHE_BYTES = 64 << 20  # rows kept in memory
RECENT = 64  # rows

ByteRanges = tuple[tuple[int, int], ...]
Verify = Literal["first", "always", "never"]


@dataclass(frozen=True)
class Field:
    """One array of a row: its weight, scales or biases.

    Attributes:
        name: "weight", "scales" or "biases".
        stored: tensor whose rows contain the array.
        ranges: bytes (start, stop) of such a row that form the array, in order.
        dtype: dtype of its elements.
    """

    name: str
    stored: SafetensorsTensor
    ranges: ByteRanges
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array in one row."""
        return sum(stop - start for start, stop in self.ranges)


def row_fields(name: str, tensor: LazyTensor) -> tuple[Field, ...]:
    """Arrays that form a row of the table ``name``.

    Raises:
        CheckpointError: a row must be computed from the stored bytes, not only cut out of them.
    """
    arrays = tensor.components if isinstance(tensor, QuantizedTensor) else {"weight": tensor}
    return tuple(
        _field(name, part, arrays[part])
        for part in ("weight", "scales", "biases")
        if part in arrays
    )


def _field(name: str, part: str, tensor: LazyTensor) -> Field:
    match tensor:
        case SafetensorsTensor() if len(tensor.shape) == 2:
            return Field(part, tensor, ((0, tensor.shape[1] * tensor.dtype.size),), tensor.dtype)
        case RowTensor():
            return Field(part, tensor.records, ((tensor.start, tensor.stop),), tensor.dtype)
        case Float8Scales():
            return _field(name, part, tensor.tensor)
        case SelectedColumns():
            inner = _field(name, part, tensor.tensor)
            size = tensor.dtype.size
            ranges: list[tuple[int, int]] = []
            for start, stop in tensor.ranges:
                ranges += _slice_ranges(inner.ranges, start * size, stop * size)
            return Field(part, inner.stored, tuple(ranges), inner.dtype)
    raise CheckpointError(
        f"{name} is stored in a form ({type(tensor).__name__}) that must be computed with before it can be used: its "
        "rows cannot be read one by one. Write the model anew with `mlxarch quantize`, or keep the table in memory"
    )


def checksums_of(tensor: LazyTensor) -> np.ndarray | None:
    """CRC-32 of each row, if the file has them; otherwise None."""
    match tensor:
        case RowTensor():
            return np.array(tensor.checksums.read_rows(0, 1)).reshape(-1)
        case QuantizedTensor():
            return checksums_of(tensor.components["weight"])
        case SelectedColumns():
            return checksums_of(tensor.tensor)
    return None


def _slice_ranges(ranges: ByteRanges, start: int, stop: int) -> list[tuple[int, int]]:
    """Bytes ``start`` to ``stop`` of the concatenated ranges."""
    found = []
    before = 0
    for low, high in ranges:
        first, last = max(start - before, 0), min(stop - before, high - low)
        if first < last:
            found.append((low + first, low + last))
        before += high - low
    return found


class RowFile:
    """Rows of one table on the SSD. Several threads may read at once.

    Attributes:
        name: name of the table, for messages.
        count: number of rows.
        fields: arrays of a row, in the order of its bytes.
        nbytes: bytes of a row.
    """

    def __init__(self, name: str, tensor: LazyTensor, verify: Verify = "first") -> None:
        """Open the files of the table once more; those of ``tensor`` may be closed afterwards.

        Args:
            verify: "first" checks the CRC-32 of a row at its first read, "always" at every read. In
                a table without checksums, later reads are compared with the first.
        """
        self.name = name
        self.count = tensor.shape[0]
        self.fields = row_fields(name, tensor)
        self.nbytes = sum(field.nbytes for field in self.fields)
        self._verify = verify
        checksums = checksums_of(tensor)
        self._checksums = np.zeros(self.count, np.uint32) if checksums is None else checksums
        # zeros take no memory before they are written to: a table may have 10^8 rows
        known = np.zeros if checksums is None else np.ones
        self._known = known(self.count, bool)
        self._checked = np.zeros(self.count, bool)
        stored = {id(field.stored): field.stored for field in self.fields}
        files = {shard: RecordFile(shard) for shard in {tensor.shard for tensor in stored.values()}}
        # A tensor whose rows contain several fields is read once for all of them
        self._reads = [
            (tensor, files[tensor.shard], self._places(tensor)) for tensor in stored.values()
        ]

    def _places(self, stored: SafetensorsTensor) -> list[tuple[int, int, int]]:
        """Byte ranges of all fields in ``stored``: start and stop in its row, start in the record."""
        places = []
        at = 0
        for part in self.fields:
            for start, stop in part.ranges:
                if part.stored is stored:
                    places.append((start, stop, at))
                at += stop - start
        return places

    def read(self, row: int, record: np.ndarray) -> None:
        """Fill ``record`` with the ``nbytes`` bytes of a row.

        Raises:
            EmbeddingReadError: the row cannot be read, or its checksum is wrong.
        """
        targets: list[np.ndarray] = []
        for stored, file, places in self._reads:
            size = stored.shape[1] * stored.dtype.size
            whole = len(places) == 1 and places[0][1] - places[0][0] == size
            target = (
                record[places[0][2] : places[0][2] + size] if whole else np.empty(size, np.uint8)
            )
            try:
                file.read([target], stored.info.start + row * size)
            except ReadFailed as problem:
                raise self._error(row, stored, str(problem)) from problem.__cause__
            if not whole:
                for start, stop, at in places:
                    record[at : at + stop - start] = target[start:stop]
            targets.append(target)
        unchecked = self._known[row] and not self._checked[row]
        if self._verify == "always" or (self._verify == "first" and unchecked):
            self._check(row, crc32(*targets))

    def _check(self, row: int, found: int) -> None:
        if self._known[row] and found != (wanted := int(self._checksums[row])):
            stored = self._reads[0][0]
            raise self._error(row, stored, f"its checksum is {found:08x}, and must be {wanted:08x}")
        self._checksums[row] = found
        self._known[row] = True
        self._checked[row] = True

    def _error(self, row: int, stored: SafetensorsTensor, problem: str) -> EmbeddingReadError:
        place = stored.info.start + row * stored.shape[1] * stored.dtype.size
        return EmbeddingReadError(
            f"row {row} of {self.name} could not be read from {stored.shard.path}, byte {place}: {problem}. The answer "
            "is given up; check the disk, and if this comes again download the model again"
        )

    def close(self) -> None:
        """Close the files."""
        for _, file, _ in self._reads:
            file.close()


class JoinedRowFile:
    """Rows of one table that is stored in several tensors, one after the other; like ``RowFile``."""

    def __init__(self, files: Sequence[RowFile]) -> None:
        self.fields = files[0].fields
        self.nbytes = files[0].nbytes
        self.count = sum(file.count for file in files)
        self._files = files
        self._starts = list(accumulate((file.count for file in files[:-1]), initial=0))

    def read(self, row: int, record: np.ndarray) -> None:
        """Fill ``record`` with the ``nbytes`` bytes of a row; raises as ``RowFile.read`` does."""
        part = bisect_right(self._starts, row) - 1
        self._files[part].read(row - self._starts[part], record)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def open_rows(name: str, tensor: LazyTensor, verify: Verify = "first") -> RowFile | JoinedRowFile:
    """Open the rows of a table; arguments as of ``RowFile``."""
    if isinstance(tensor, Concatenated) and tensor.axis == -2:
        parts = enumerate(tensor.tensors)
        return JoinedRowFile([RowFile(f"{name} {index}", part, verify) for index, part in parts])
    return RowFile(name, tensor, verify)


@dataclass
class RowStats:
    """Counters of one table since it was loaded.

    Attributes:
        rows: rows looked up.
        hits: rows found in the cache.
        bytes_read: bytes read from the SSD or the system's page cache.
        read_seconds: time spent waiting for rows.
    """

    rows: int = 0
    hits: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))

    def count_lookup(self, hits: Sequence[bool], bytes_read: int, seconds: float) -> None:
        """Count one lookup of rows, each a hit or a miss."""
        self.rows += len(hits)
        self.hits += sum(hits)
        self.bytes_read += bytes_read
        self.read_seconds += seconds
        self._recent.extend(hits)

    @property
    def hit_rate(self) -> float:
        """Share of rows found in the cache, since the model was loaded."""
        return self.hits / self.rows if self.rows else 1.0

    @property
    def steady_hit_rate(self) -> float:
        """Share of rows found in the cache, over the last 64 rows."""
        return sum(self._recent) / len(self._recent) if self._recent else 1.0


class RowCache:
    """Cache of up to ``limit`` bytes of rows, the least recently used dropped first. Safe for
    several threads.
    """

    def __init__(self, file: RowFile | JoinedRowFile, limit: int = CACHE_BYTES) -> None:
        self.file = file
        self.stats = RowStats()
        self._capacity = limit // file.nbytes  # rows
        self._cached: OrderedDict[int, np.ndarray] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(THREADS, "row-reader")  # they never call MLX

    def rows(self, wanted: Sequence[int]) -> np.ndarray:
        """Read different rows as bytes (len(wanted), nbytes).

        Raises:
            EmbeddingReadError: one of them cannot be read.
        """
        start = time.perf_counter()
        records = np.empty((len(wanted), self.file.nbytes), np.uint8)
        missing: list[tuple[int, np.ndarray]] = []
        with self._lock:
            hits = [row in self._cached for row in wanted]
            for place, row in enumerate(wanted):
                if hits[place]:
                    self._cached.move_to_end(row)
                    records[place] = self._cached[row]
                else:
                    missing.append((row, records[place]))
        self._read(missing)
        with self._lock:
            for row, record in missing[-self._capacity :] if self._capacity else ():
                self._cached[row] = record.copy()  # a view would keep all records alive
                self._cached.move_to_end(row)
            while len(self._cached) > self._capacity:
                self._cached.popitem(last=False)
            self.stats.count_lookup(
                hits, len(missing) * self.file.nbytes, time.perf_counter() - start
            )
        return records

    def _read(self, missing: Sequence[tuple[int, np.ndarray]]) -> None:
        """Read rows into their records, many of them with several threads."""
        if len(missing) <= DIRECT_READS:
            self._read_some(missing)
            return
        step = -(-len(missing) // THREADS)
        parts = [missing[start : start + step] for start in range(0, len(missing), step)]
        futures = [self._readers.submit(self._read_some, part) for part in parts]
        wait(futures)  # even after an error: no thread may write to a buffer later
        for future in futures:
            future.result()

    def _read_some(self, some: Sequence[tuple[int, np.ndarray]]) -> None:
        for row, record in some:
            self.file.read(row, record)
