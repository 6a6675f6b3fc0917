"""Packed rows: an embedding table in which all arrays of one token form one contiguous record.

One read brings the row of a token from the SSD. Such a folder has ``ple.bin`` beside its
config.json; docs/rows-format.md specifies it.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np

from mlxarch.checkpoint.lazy_tensor import DTYPES, LazyTensor, SafetensorsTensor
from mlxarch.checkpoint.packed_experts import REMEDY, RecordQuantization
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.shards import Shard
from mlxarch.errors import CheckpointError
from mlxarch.system.checksums import crc32
from mlxarch.system.untrusted_files import safe_path

ROWS_FILE = "ple.bin"
FORMAT = "mlxarch-rows"
VERSION = "1"
RECORD_ORDER = ("weight", "scales", "biases")


class RowTensor(LazyTensor):
    """One array of all records: their bytes ``start`` to ``stop`` as elements of ``dtype``.

    Attributes:
        records: the records, (V, bytes) in uint8.
        checksums: CRC-32 of each record, (V,).
    """

    def __init__(
        self,
        records: SafetensorsTensor,
        checksums: SafetensorsTensor,
        start: int,
        stop: int,
        dtype: mx.Dtype,
    ) -> None:
        self.records = records
        self.checksums = checksums
        self.start = start
        self.stop = stop
        self.dtype = dtype
        self.shape = (records.shape[0], (stop - start) // dtype.size)

    def read_rows(self, start: int, stop: int) -> mx.array:
        """Read rows, see ``LazyTensor``."""
        return self._extract(self.records.read_rows(start, stop), start)

    def load(self) -> mx.array:
        """Read the whole array, see ``LazyTensor``."""
        return self._extract(self.records.load(), 0)

    def _extract(self, records: mx.array, first: int) -> mx.array:
        if self.start == 0:  # every array reads whole records: the first checks them for all
            self._check(np.asarray(records), first)
        return mx.contiguous(records[:, self.start : self.stop]).view(self.dtype)

    def _check(self, records: np.ndarray, first: int) -> None:
        expected = self._expected_checksums[first:]
        for row, (record, checksum) in enumerate(zip(records, expected, strict=False), first):
            if (found := crc32(record)) != checksum:
                raise CheckpointError(
                    f"{self.records.shard.path}: the checksum of row {row} is {found:08x}, and "
                    "must "
                    f"be {checksum:08x}. {REMEDY}"
                )

    @cached_property
    def _expected_checksums(self) -> list[int]:
        return np.asarray(self.checksums.load()).tolist()


class RowArray(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One array of a record: name, safetensors dtype, and elements per record."""

    name: str
    dtype: str
    columns: int


class TableHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ``head`` in the file's metadata: path of the table, and layout of its records."""

    path: str
    parts: tuple[RowArray, ...]
    quantization: RecordQuantization | None

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the file's safetensors header."""
        return {"format": FORMAT, "version": VERSION, "head": msgspec.json.encode(self).decode()}


def open_packed_rows(folder: Path) -> tuple[dict[str, LazyTensor], tuple[Shard, ...]]:
    """Open the packed table of a folder: its tensor by checkpoint name, and its file.

    Both are empty if there is no such file.

    Raises:
        CheckpointError: the file breaks a rule of the format.
    """
    path = safe_path(folder, ROWS_FILE)
    if not path.exists():
        return {}, ()
    file = Shard.open(path)
    try:
        return _table_tensors(file, _parse_header(path, file.metadata)), (file,)
    except BaseException:
        file.close()
        raise


def _parse_header(path: Path, metadata: Mapping[str, str]) -> TableHeader:
    found = (metadata.get("format"), metadata.get("version"))
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path}: the header says format {found[0]!r}, version {found[1]!r}; this mlxarch "
            "reads "
            f"{FORMAT!r}, version {VERSION!r}. Update it, or pack the model again"
        )
    try:
        return msgspec.json.decode(metadata.get("head", ""), type=TableHeader)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: head: {error}. {REMEDY}") from None


def _table_tensors(file: Shard, header: TableHeader) -> dict[str, LazyTensor]:
    """Build the tensor of the table under the name of its weight, quantized or not."""
    records_name = f"{header.path}.records"
    checksums_name = f"{header.path}.crc32"
    sizes = [
        array.columns * DTYPES[array.dtype].size if array.dtype in DTYPES else -1
        for array in header.parts
    ]
    names = tuple(array.name for array in header.parts)
    found = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
    rows = found.get(records_name, ("", (0,)))[1][0]
    required = {records_name: ("U8", (rows, sum(sizes))), checksums_name: ("U32", (rows,))}
    required_names = None
    if header.quantization is None:
        required_names = ("weight",)
    elif len(names) > 1:
        required_names = RECORD_ORDER[: len(names)]
    if found != required or min(sizes, default=-1) < 1 or names != required_names:
        raise CheckpointError(
            f"{file.path}: its tensors are {found}, and its head makes them {required}, of "
            f"{', '.join(names)}. {REMEDY}"
        )
    records = SafetensorsTensor(file, file.tensors[records_name])
    checksums = SafetensorsTensor(file, file.tensors[checksums_name])
    arrays = {}
    start = 0
    for array, size in zip(header.parts, sizes, strict=True):
        dtype = DTYPES[array.dtype]
        arrays[array.name] = RowTensor(records, checksums, start, start + size, dtype)
        start += size
    name = f"{header.path}.weight"
    if header.quantization is None:
        return {name: arrays["weight"]}
    return {name: QuantizedTensor(name, arrays, header.quantization.to_scheme())}
