"""Packed rows: a table of embeddings in which all that belongs to one token lies in one run of a file.

Such a folder has ``ple.bin`` beside its config.json; docs/rows-format.md specifies it.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np

from mlxarch.checkpoint import Shard, child
from mlxarch.checksums import crc32
from mlxarch.errors import CheckpointError
from mlxarch.expert_files import Settings
from mlxarch.packing import Quantization
from mlxarch.tensors import DTYPES, Packed, Stored, Tensor

FILE = "ple.bin"
FORMAT, VERSION = "mlxarch-rows", "1"
PARTS = ("weight", "scales", "biases")  # in the order of a record
REMEDY = "Pack the model again with `mlxarch pack`, or download it again."


class RowPart(Tensor):
    """One array of all records (V, bytes): their bytes ``start`` to ``stop`` as elements of ``dtype``.

    Attributes:
        checksums: CRC-32 of each record, (V,).
    """

    def __init__(self, records: Stored, checksums: Stored, start: int, stop: int, dtype: mx.Dtype) -> None:
        self.records, self.checksums, self.start, self.stop, self.dtype = records, checksums, start, stop, dtype
        self.shape = (records.shape[0], (stop - start) // dtype.size)

    def rows(self, start: int, stop: int) -> mx.array:
        """See Tensor."""
        return self._of(self.records.rows(start, stop), start)

    def load(self) -> mx.array:
        """See Tensor."""
        return self._of(self.records.load(), 0)

    def _of(self, records: mx.array, first: int) -> mx.array:
        if self.start == 0:  # every part reads whole records: the first one checks them for all
            self._check(np.asarray(records), first)
        return mx.contiguous(records[:, self.start : self.stop]).view(self.dtype)

    def _check(self, records: np.ndarray, first: int) -> None:
        for row, (record, known) in enumerate(zip(records, self._known[first:], strict=False), first):
            if (found := crc32(record)) != known:
                wrong = f"the checksum of row {row} is {found:08x}, and must be {known:08x}"
                raise CheckpointError(f"{self.records.shard.path}: {wrong}. {REMEDY}")

    @cached_property
    def _known(self) -> list[int]:
        return np.asarray(self.checksums.load()).tolist()


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One array of a record: its name, its type as safetensors call it, and how many elements a record has of it."""

    name: str
    dtype: str
    columns: int


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a record is. ``path`` is that of the table as a checkpoint names it, ``quantization`` how it is packed."""

    path: str
    parts: tuple[Part, ...]
    quantization: Settings | None

    @property
    def metadata(self) -> dict[str, str]:
        """For the file's header."""
        return {"format": FORMAT, "version": VERSION, "head": msgspec.json.encode(self).decode()}


def open_rows(folder: Path) -> tuple[dict[str, Tensor], tuple[Shard, ...]]:
    """The packed table of a folder, by the name that a checkpoint gives it, and its file; none where there is none.

    Raises:
        CheckpointError: the file is not as the format wants it.
    """
    path = child(folder, FILE)
    if not path.exists():
        return {}, ()
    file = Shard.open(path)
    try:
        return _tensors(file, _head(path, file.metadata)), (file,)
    except BaseException:
        file.close()
        raise


def _head(path: Path, metadata: Mapping[str, str]) -> Head:
    found = metadata.get("format"), metadata.get("version")
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path}: the header says format {found[0]!r}, version {found[1]!r}; this mlxarch reads {FORMAT!r}, "
            f"version {VERSION!r}. Update it, or pack the model again"
        )
    try:
        return msgspec.json.decode(metadata.get("head", ""), type=Head)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: head: {error}. {REMEDY}") from None


def _tensors(file: Shard, head: Head) -> dict[str, Tensor]:
    """The table, under the name of its weight; a packed one is one Packed."""
    names = {part: f"{head.path}.{part}" for part in ("records", "crc32")}
    sizes = [part.columns * DTYPES[part.dtype].size if part.dtype in DTYPES else -1 for part in head.parts]
    kinds = tuple(part.name for part in head.parts)
    found = {name: (info.dtype, info.shape) for name, info in file.tensors.items()}
    rows = found.get(names["records"], ("", (0,)))[1][0]
    wanted = {names["records"]: ("U8", (rows, sum(sizes))), names["crc32"]: ("U32", (rows,))}
    expected = ("weight",) if head.quantization is None else PARTS[: len(kinds)] if len(kinds) > 1 else None
    if found != wanted or min(sizes, default=-1) < 1 or kinds != expected:
        raise CheckpointError(
            f"{file.path}: its tensors are {found}, and its head makes them {wanted}, of {', '.join(kinds)}. {REMEDY}"
        )
    records, checksums = (Stored(file, file.tensors[name]) for name in names.values())
    parts, start = {}, 0
    for part, size in zip(head.parts, sizes, strict=True):
        parts[part.name] = RowPart(records, checksums, start, start + size, DTYPES[part.dtype])
        start += size
    name, packing = f"{head.path}.weight", head.quantization
    if packing is None:
        return {name: parts["weight"]}
    return {name: Packed(name, parts, Quantization(packing.bits, packing.group_size, packing.mode))}
