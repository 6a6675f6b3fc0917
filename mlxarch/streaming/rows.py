"""The rows of a table as they lie on the disk, and those that are kept in memory. MLX is not called to read them."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx
import numpy as np

from mlxarch.checksums import crc32
from mlxarch.errors import CheckpointError, EmbeddingReadError
from mlxarch.row_files import RowPart
from mlxarch.streaming.files import ReadFailed, RecordFile
from mlxarch.tensors import Columns, Packed, SmallScales, Stored, Tensor

THREADS = 8
ALONE = 8  # so few rows are read without the threads, which take longer to wake up
CACHE = 64 << 20  # bytes of rows that are kept
STEADY = 64  # rows

Runs = tuple[tuple[int, int], ...]
Verify = Literal["first", "always", "never"]


@dataclass(frozen=True)
class Field:
    """One array of a row.

    Attributes:
        name: "weight", "scales" or "biases".
        stored: the tensor in whose rows it lies.
        runs: bytes (start, stop) of such a row, which belong side by side.
        dtype: of its elements.
    """

    name: str
    stored: Stored
    runs: Runs
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Of one row's."""
        return sum(stop - start for start, stop in self.runs)


def fields_of(name: str, tensor: Tensor) -> tuple[Field, ...]:
    """What a row of the table ``name`` consists of.

    Raises:
        CheckpointError: it must be computed from what is stored, and is not only cut out of it.
    """
    parts = tensor.parts if isinstance(tensor, Packed) else {"weight": tensor}
    return tuple(_field(name, part, parts[part]) for part in ("weight", "scales", "biases") if part in parts)


def _field(name: str, part: str, tensor: Tensor) -> Field:
    match tensor:
        case Stored() if len(tensor.shape) == 2:
            return Field(part, tensor, ((0, tensor.shape[1] * tensor.dtype.size),), tensor.dtype)
        case RowPart():
            return Field(part, tensor.records, ((tensor.start, tensor.stop),), tensor.dtype)
        case SmallScales():
            return _field(name, part, tensor.tensor)
        case Columns():
            inner, size = _field(name, part, tensor.tensor), tensor.dtype.size
            runs = [run for start, stop in tensor.runs for run in _cut(inner.runs, start * size, stop * size)]
            return Field(part, inner.stored, tuple(runs), inner.dtype)
    raise CheckpointError(
        f"{name} is stored in a form ({type(tensor).__name__}) that must be computed with before it can be used: its "
        "rows cannot be read one by one. Write the model anew with `mlxarch quantize`, or keep the table in memory"
    )


def checksums_of(tensor: Tensor) -> np.ndarray | None:
    """The CRC-32 of each row's record, where a table brings them."""
    match tensor:
        case RowPart():
            return np.array(tensor.checksums.rows(0, 1)).reshape(-1)
        case Packed():
            return checksums_of(tensor.parts["weight"])
        case Columns():
            return checksums_of(tensor.tensor)
    return None


def _cut(runs: Runs, start: int, stop: int) -> list[tuple[int, int]]:
    """Bytes ``start`` to ``stop`` of runs that stand side by side."""
    found, before = [], 0
    for low, high in runs:
        first, last = max(start - before, 0), min(stop - before, high - low)
        if first < last:
            found.append((low + first, low + last))
        before += high - low
    return found


class RowFile:
    """The rows of one table on the disk. MLX is not called, and several threads may read at once.

    Attributes:
        name: of the table, for messages.
        count: of rows.
        fields: what a row consists of, in the order of its bytes.
        nbytes: of a row.
    """

    def __init__(self, name: str, tensor: Tensor, verify: Verify = "first") -> None:
        """Open the files again: those of the tensor may be closed afterwards.

        ``verify`` "first" checks a row's CRC-32 when it is read for the first time, "always" whenever it is read: in a
        table that brings no checksums against that of the bytes that were read first.
        """
        self.name, self.count, self.fields = name, tensor.shape[0], fields_of(name, tensor)
        self.nbytes = sum(field.nbytes for field in self.fields)
        self._verify, checksums = verify, checksums_of(tensor)
        self._checksums = np.zeros(self.count, np.uint32) if checksums is None else checksums
        self._known = np.full(self.count, checksums is not None)
        self._checked = np.zeros(self.count, bool)
        stored = {id(field.stored): field.stored for field in self.fields}
        files = {shard: RecordFile(shard) for shard in {tensor.shard for tensor in stored.values()}}
        # a tensor whose rows hold several fields is read once for all of them
        self._reads = [(tensor, files[tensor.shard], self._places(tensor)) for tensor in stored.values()]

    def _places(self, stored: Stored) -> list[tuple[int, int, int]]:
        """(start and stop in a row of ``stored``, start in the record) of all runs of its fields."""
        places, at = [], 0
        for part in self.fields:
            for start, stop in part.runs:
                if part.stored is stored:
                    places.append((start, stop, at))
                at += stop - start
        return places

    def read(self, row: int, record: np.ndarray) -> None:
        """Fill ``record``, ``nbytes`` bytes.

        Raises:
            EmbeddingReadError: the row cannot be read, or is not what it was.
        """
        targets: list[np.ndarray] = []
        for stored, file, places in self._reads:
            size = stored.shape[1] * stored.dtype.size
            whole = len(places) == 1 and places[0][1] - places[0][0] == size
            target = record[places[0][2] : places[0][2] + size] if whole else np.empty(size, np.uint8)
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
        self._checksums[row], self._known[row], self._checked[row] = found, True, True

    def _error(self, row: int, stored: Stored, problem: str) -> EmbeddingReadError:
        place = stored.info.start + row * stored.shape[1] * stored.dtype.size
        return EmbeddingReadError(
            f"row {row} of {self.name} could not be read from {stored.shard.path}, byte {place}: {problem}. The answer "
            "is given up; check the disk, and if this comes again download the model again"
        )

    def close(self) -> None:
        """Close the files."""
        for _, file, _ in self._reads:
            file.close()


@dataclass
class RowStats:
    """Counters of one table, from when it was loaded.

    Attributes:
        rows, hits: looked up, and how many of them were kept from before.
        bytes_read: from the disk or the system's cache of it.
        read_seconds: waited for rows.
    """

    rows: int = 0
    hits: int = 0
    bytes_read: int = 0
    read_seconds: float = 0.0
    _latest: deque[bool] = field(default_factory=lambda: deque(maxlen=STEADY))

    def looked_up(self, hits: Sequence[bool], bytes_read: int, seconds: float) -> None:
        """Rows were asked for, each of which was kept from before or not."""
        self.rows, self.hits = self.rows + len(hits), self.hits + sum(hits)
        self.bytes_read, self.read_seconds = self.bytes_read + bytes_read, self.read_seconds + seconds
        self._latest.extend(hits)

    @property
    def hit_rate(self) -> float:
        """Over the whole life of the model."""
        return self.hits / self.rows if self.rows else 1.0

    @property
    def steady_hit_rate(self) -> float:
        """Over the last 64 rows."""
        return sum(self._latest) / len(self._latest) if self._latest else 1.0


class RowCache:
    """Rows of a table, those used last kept in memory up to ``limit`` bytes. Several threads may ask at once."""

    def __init__(self, file: RowFile, limit: int = CACHE) -> None:
        self.file, self.stats = file, RowStats()
        self._room = limit // file.nbytes
        self._held: OrderedDict[int, np.ndarray] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(THREADS, "row-reader")  # they never call MLX

    def rows(self, wanted: Sequence[int]) -> np.ndarray:
        """The records of different rows: (len(wanted), nbytes).

        Raises:
            EmbeddingReadError: one of them cannot be read.
        """
        begin, records, missing = time.perf_counter(), np.empty((len(wanted), self.file.nbytes), np.uint8), []
        with self._lock:
            hits = [row in self._held for row in wanted]
            for place, row in enumerate(wanted):
                if hits[place]:
                    self._held.move_to_end(row)
                    records[place] = self._held[row]
                else:
                    missing.append((row, records[place]))
        self._read(missing)
        with self._lock:
            for row, record in missing[-self._room :] if self._room else ():
                self._held[row] = record.copy()  # on its own: a view would hold them all
                self._held.move_to_end(row)
            while len(self._held) > self._room:
                self._held.popitem(last=False)
            self.stats.looked_up(hits, len(missing) * self.file.nbytes, time.perf_counter() - begin)
        return records

    def _read(self, missing: Sequence[tuple[int, np.ndarray]]) -> None:
        if len(missing) <= ALONE:
            self._read_some(missing)
            return
        step = -(-len(missing) // THREADS)
        parts = [missing[start : start + step] for start in range(0, len(missing), step)]
        futures = [self._readers.submit(self._read_some, part) for part in parts]
        wait(futures)  # all of them, or a buffer would be written to when nobody expects it
        for future in futures:
            future.result()

    def _read_some(self, some: Sequence[tuple[int, np.ndarray]]) -> None:
        for row, record in some:
            self.file.read(row, record)
