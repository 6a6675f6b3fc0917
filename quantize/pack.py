"""A model packed for streaming: what one expert, or a token's row, consists of lies in one run of a file.

No number changes.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mlxarch import receipts
from mlxarch.checkpoint import Checkpoint, child
from mlxarch.checksums import crc32
from mlxarch.errors import DiskSpaceError, InvalidInput, OutputError
from mlxarch.expert_files import MANIFEST, PROJECTIONS, STRIDE, Array, Layer, Manifest, Projection, Settings
from mlxarch.progress import Progress, silent
from mlxarch.quantize.card import origin_of
from mlxarch.quantize.disk import Disk, as_output_error, size
from mlxarch.quantize.journal import Workspace
from mlxarch.quantize.pack_rows import RowPacking
from mlxarch.row_files import FILE as ROWS
from mlxarch.streaming.attach import experts_of
from mlxarch.streaming.embeddings import tables_of
from mlxarch.streaming.records import Records, extents, parts_of
from mlxarch.tensors import DTYPES, Packed
from mlxarch.weights import Resolved, Source, open_source, resolve

CHUNK = 8 << 20  # bytes of a tensor that are in memory at a time
NOTE = (
    "Parts of this model are packed, so that mlxarch can read them one at a time: mlx-lm, transformers and other "
    "programs cannot read this folder. `mlxarch quantize --bits original` makes an ordinary one of it, without loss."
)
NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}


@dataclass(frozen=True)
class PackSummary:
    """What was packed.

    Attributes:
        layers: that have experts.
        experts: in all layers together.
        expert_bytes: of the experts, ``filled_bytes`` more where records are filled up to the next page.
        row_bytes: of a table of per-layer embeddings.
        other_bytes: of all other tensors.
    """

    output: Path
    layers: int
    experts: int
    expert_bytes: int
    filled_bytes: int
    row_bytes: int
    other_bytes: int


@dataclass
class Packing:
    """A folder that is to be packed."""

    source: Source
    resolved: Resolved
    folder: Path
    output: Path
    disk: Disk = field(default_factory=Disk)

    def __post_init__(self) -> None:
        self.records = {
            path: Records(layer, parts_of(path, self.resolved.tensors), "never")
            for layer, (path, _) in experts_of(self.resolved).items()
        }
        published, tensors = self.resolved.architecture.published, self.resolved.tensors
        self.tables = [RowPacking(published(p), tensors[f"{p}.weight"]) for p in tables_of(self.resolved.model)]
        if not self.records and not self.tables:
            raise InvalidInput(
                f"{self.folder}: this model has no experts and no per-layer embeddings; there is nothing to pack"
            )
        places = {
            (place.shard.path, place.start)
            for records in self.records.values()
            for part in records.parts
            for expert in range(records.count)
            for place in extents(part.tensor, expert)
        }
        places |= {place for table in self.tables for place in table.places}
        self.checkpoint = Checkpoint.open(self.folder)
        stored = self.checkpoint.tensors.items()
        self._others = {name: (shard, i) for name, (shard, i) in stored if (shard.path, i.start) not in places}

    @property
    def summary(self) -> PackSummary:
        """The figures, which are known beforehand."""
        records = self.records.values()
        used = sum(r.count * r.nbytes for r in records)
        filled = sum(r.count * (_stride(r) - r.nbytes) for r in records)
        experts, others = sum(r.count for r in records), sum(info.nbytes for _, info in self._others.values())
        rows = sum(table.nbytes for table in self.tables)
        return PackSummary(self.output, len(self.records), experts, used, filled, rows, others)

    @property
    def needed(self) -> int:
        """Bytes of disk, but for small files."""
        summary = self.summary
        return summary.expert_bytes + summary.filled_bytes + summary.row_bytes + summary.other_bytes

    def run(self, *, force: bool = False, progress: Progress = silent) -> PackSummary:
        """Write the folder; see ``pack``."""
        workspace = Workspace(self.output, self.disk)
        try:
            with workspace:
                workspace.check_target(force)
                workspace.resume({"pack": str(self.folder), "process": os.getpid()})
                self._check_space()
                files = self._write(workspace.model, progress)
                self.source.check_unchanged()
                workspace.publish(files)
        except OSError as error:
            raise as_output_error(error, self.output, self.needed, self.disk.free(self.output.parent), False) from error
        return self.summary

    def _check_space(self) -> None:
        free = self.disk.free(self.output.parent)
        if self.needed > free:
            raise DiskSpaceError(
                f"{self.output} needs {size(self.needed)} of disk, and {size(free)} are free; free some space, or name "
                "an output on another disk"
            )

    def _write(self, folder: Path, progress: Progress) -> list[str]:
        done, layers = 0, []
        for path, records in self.records.items():
            layers.append(self._write_layer(folder, path, records))
            done += records.count * _stride(records)
            progress("packing", done, self.needed)
        for table in self.tables:
            with self._new_file(folder / ROWS, table.nbytes) as descriptor:
                table.write(self.disk, descriptor, lambda count: progress("packing", done + count, self.needed))
        self._write_others(folder)
        progress("packing", self.needed, self.needed)
        small = self._small_files()
        if layers:
            small[MANIFEST] = _json(Manifest("mlxarch-experts", 1, NOTE, tuple(layers)))
        for name, data in small.items():
            self.disk.write_file(folder / name, data)
        names = [*(layer.file for layer in layers), *([ROWS] if self.tables else []), "model.safetensors", *small]
        if (receipt := receipts.read(self.folder)) is not None:  # what it says of the tensors still holds
            receipt["files"] = receipts.sha256(folder / name for name in names)
            self.disk.write_file(folder / receipts.RECEIPT, _json(receipt))
            names.append(receipts.RECEIPT)
        return names

    def _write_layer(self, folder: Path, path: str, records: Records) -> Layer:
        stride, checksums = _stride(records), []
        name = f"experts.L{records.layer:02}.bin"
        record = np.zeros(stride, np.uint8)
        ends = np.cumsum([part.nbytes for part in records.parts]).tolist()
        buffers = [record[end - part.nbytes : end] for part, end in zip(records.parts, ends, strict=True)]
        with self._new_file(folder / name, records.count * stride) as descriptor:
            for expert in range(records.count):
                records.read(expert, buffers)
                checksums.append(crc32(record[: records.nbytes]))
                self.disk.write(descriptor, record.data, expert * stride)
        parts = tuple(Array(part.name, NAMES[part.dtype], part.shape) for part in records.parts)
        published = self.resolved.architecture.published(path)
        return Layer(published, name, records.count, stride, parts, self._settings(path), tuple(checksums))

    def _settings(self, path: str) -> dict[Projection, Settings]:
        weights = {name: self.resolved.tensors[f"{path}.{name}.weight"] for name in PROJECTIONS}
        packed = {name: asdict(tensor.settings) for name, tensor in weights.items() if isinstance(tensor, Packed)}
        return msgspec.convert(packed, dict[Projection, Settings])

    def _write_others(self, folder: Path) -> None:
        """All other tensors as they are, by their names, in one file."""
        header, end = dict[str, Any](__metadata__={"format": "mlx"}), 0
        for name, (_, info) in self._others.items():
            place = [end, end := end + info.nbytes]
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": place}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with self._new_file(folder / "model.safetensors", start + end) as descriptor:
            self.disk.write(descriptor, len(text).to_bytes(8, "little") + text, 0)
            for shard, info in self._others.values():
                for offset in range(0, info.nbytes, CHUNK):
                    chunk = bytearray(min(CHUNK, info.nbytes - offset))
                    shard.read_into(info, chunk, offset)
                    self.disk.write(descriptor, memoryview(chunk), start + offset)
                start += info.nbytes

    @contextmanager
    def _new_file(self, path: Path, nbytes: int) -> Iterator[int]:
        """A descriptor of a file of that size, which is on the medium when the block ends."""
        descriptor = self.disk.open(path)
        try:
            os.ftruncate(descriptor, nbytes)
            yield descriptor
            self.disk.sync(descriptor)
        finally:
            os.close(descriptor)

    def _small_files(self) -> dict[str, bytes]:
        """config.json as it is, tokenizer files, licences, and a model card that says what this folder is."""
        beside = {"config.json": child(self.folder, "config.json")}
        beside |= {path.name: path for path in origin_of(self.folder).licences}
        card = child(self.folder, "README.md")
        text = card.read_text("utf-8", "replace") if card.is_file() else f"# {self.output.name}\n"
        front = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
        cut = front.end() if front else 0
        note = f"{text[:cut]}\n> **Packed.** {NOTE}\n\n{text[cut:].lstrip()}".lstrip()
        files = {name: at.read_bytes() for name, at in beside.items()}
        for name, at in self.source.sidecars.items():
            files[name] = child(at.parent, at.name).read_bytes() if isinstance(at, Path) else at
        return files | {"README.md": note.encode()}

    def close(self) -> None:
        """Close the files that are read."""
        for shard in (*self.source.shards, *self.checkpoint.shards):
            shard.close()


def prepare_pack(folder: str | Path, output: str | Path | None = None, *, disk: Disk | None = None) -> Packing:
    """Check all that can be checked without reading weights or writing; arguments and errors as ``pack``."""
    folder = Path(folder)
    if (folder / MANIFEST).exists() or (folder / ROWS).exists():
        raise InvalidInput(f"{folder}: it is packed already")
    source = open_source(folder)
    output = Path(os.path.abspath(Path(output or f"{folder.resolve().name}-packed").expanduser()))
    if folder.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"{output} holds the source; name another output")
    return Packing(source, resolve(source), folder, output, disk or Disk())


def pack(
    folder: str | Path, output: str | Path | None = None, *, force: bool = False, progress: Progress = silent
) -> PackSummary:
    """Write a model folder anew with its experts packed, as docs/experts-format.md says, and per-layer embeddings, as
    docs/rows-format.md does. Every tensor keeps its bytes; a receipt goes along, with the hashes of the new files.

    The output appears under its name complete or not at all. Memory is that of one expert.

    Args:
        folder: a checkpoint with experts or per-layer embeddings, quantized or not.
        output: the folder to make; by default the source's name and "-packed", in the current folder.
        force: replace an output that exists; it is removed when the new one is complete.
        progress: told the bytes written.

    Raises:
        InvalidInput: the model has neither, or is packed already.
        CheckpointError, ConfigError: the source is not a sound checkpoint, has a damaged receipt, or stores experts in
            a number format that has to be computed with first: quantize it.
        DiskSpaceError: the disk has less room than is needed.
        OutputError: the output exists, is being written by another process, or cannot be written.
    """
    packing = prepare_pack(folder, output)
    try:
        return packing.run(force=force, progress=progress)
    finally:
        packing.close()


def _stride(records: Records) -> int:
    return -(-records.nbytes // STRIDE) * STRIDE


def _json(content: Manifest | dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
