"""Packing of a model for SSD streaming: one read for an expert or for an embedding row.

The arrays of an expert, and of a row of per-layer embeddings, are stored contiguously. Packing
changes no number. docs/experts-format.md specifies the files of experts, docs/rows-format.md that
of rows.
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

from mlxarch.checkpoint.lazy_tensor import SAFETENSORS_DTYPES
from mlxarch.checkpoint.packed_experts import (
    MANIFEST_FILE,
    PROJECTIONS,
    RECORD_ALIGNMENT,
    Manifest,
    ManifestLayer,
    Projection,
    RecordArray,
    RecordQuantization,
)
from mlxarch.checkpoint.packed_rows import ROWS_FILE
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.receipt import RECEIPT_FILE, read_receipt
from mlxarch.checkpoint.shards import Checkpoint
from mlxarch.checkpoint.source import CheckpointSource, open_checkpoint
from mlxarch.errors import DiskSpaceError, InvalidInput, OutputError
from mlxarch.loading.resolve import Resolved, resolve
from mlxarch.progress import Progress, silent
from mlxarch.quantize.output.model_card import origin_from_folder
from mlxarch.quantize.output.workspace import Workspace
from mlxarch.quantize.repack.pack_rows import RowTableWriter
from mlxarch.ssd_streaming.attach import experts_of
from mlxarch.ssd_streaming.embeddings import packable_tables_of
from mlxarch.ssd_streaming.expert_records import ExpertRecords, expert_arrays, read_extents
from mlxarch.system.checksums import crc32, sha256_files
from mlxarch.system.durable_files import Disk, format_bytes, to_output_error
from mlxarch.system.untrusted_files import safe_path

CHUNK_BYTES = 8 << 20  # of a tensor in memory at a time
NOTE = (
    "Parts of this model are packed, so that mlxarch can read them one at a time: mlx-lm, "
    "transformers and other programs cannot read this folder. `mlxarch quantize --bits original` "
    "makes an ordinary one of it, without loss."
)


@dataclass(frozen=True)
class PackSummary:
    """Sizes of a packed model.

    Attributes:
        output: output folder.
        layers: number of layers with experts.
        experts: number of experts in all layers together.
        expert_bytes: size of the experts' arrays.
        filled_bytes: padding that extends each expert's record to whole pages.
        row_bytes: size of the file of per-layer embeddings.
        other_bytes: size of all other tensors.
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
    """A checked but not yet started packing of a model folder.

    Attributes:
        source: the opened folder.
        resolved: the same, resolved to a model.
        folder: folder to pack.
        output: folder to make.
        disk: file operations that write the output.
    """

    source: CheckpointSource
    resolved: Resolved
    folder: Path
    output: Path
    disk: Disk = field(default_factory=Disk)

    def __post_init__(self) -> None:
        published = self.resolved.architecture.published_name
        tensors = self.resolved.tensors
        self.records = {
            path: ExpertRecords(layer, expert_arrays(path, tensors), "never")
            for layer, (path, _) in experts_of(self.resolved.model).items()
        }
        self.tables = [
            RowTableWriter(published(path), tensors[f"{path}.weight"])
            for path in packable_tables_of(self.resolved.model)
        ]
        if not self.records and not self.tables:
            raise InvalidInput(
                f"{self.folder}: this model has no experts and no per-layer embeddings; there is "
                "nothing to pack"
            )
        packed_positions = {
            (extent.shard.path, extent.start)
            for records in self.records.values()
            for part in records.parts
            for expert in range(records.count)
            for extent in read_extents(part.tensor, expert)
        }
        for table in self.tables:
            packed_positions |= table.tensor_positions
        self.checkpoint = Checkpoint.open(self.folder)
        self._others = {
            name: (shard, info)
            for name, (shard, info) in self.checkpoint.tensors.items()
            if (shard.path, info.start) not in packed_positions
        }

    @property
    def summary(self) -> PackSummary:
        """Sizes of the output, known before the run."""
        records = self.records.values()
        return PackSummary(
            output=self.output,
            layers=len(self.records),
            experts=sum(each.count for each in records),
            expert_bytes=sum(each.count * each.nbytes for each in records),
            filled_bytes=sum(each.count * (_stride(each) - each.nbytes) for each in records),
            row_bytes=sum(table.nbytes for table in self.tables),
            other_bytes=sum(info.nbytes for _, info in self._others.values()),
        )

    @property
    def disk_bytes(self) -> int:
        """Disk space of the output in bytes, without its small files."""
        summary = self.summary
        return summary.expert_bytes + summary.filled_bytes + summary.row_bytes + summary.other_bytes

    def run(self, *, force: bool = False, progress: Progress = silent) -> PackSummary:
        """Write the output; arguments and errors as ``pack``."""
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
            free = self.disk.free(self.output.parent)
            raise to_output_error(error, self.output, self.disk_bytes, free, False) from error
        return self.summary

    def _check_space(self) -> None:
        free = self.disk.free(self.output.parent)
        if self.disk_bytes > free:
            raise DiskSpaceError(
                f"{self.output} needs {format_bytes(self.disk_bytes)} of disk, and "
                f"{format_bytes(free)} are free; free some space, or name an output on another disk"
            )

    def _write(self, folder: Path, progress: Progress) -> list[str]:
        """Write all files to ``folder`` and return their names."""
        done = 0
        layers = []
        for path, records in self.records.items():
            layers.append(self._write_layer(folder, path, records))
            done += records.count * _stride(records)
            progress("packing", done, self.disk_bytes)
        for table in self.tables:
            with self._new_file(folder / ROWS_FILE, table.nbytes) as descriptor:
                table.write(
                    self.disk,
                    descriptor,
                    lambda count: progress("packing", done + count, self.disk_bytes),
                )
        self._write_others(folder)
        progress("packing", self.disk_bytes, self.disk_bytes)
        small = self._small_files()
        if layers:
            small[MANIFEST_FILE] = _to_json(Manifest("mlxarch-experts", 1, NOTE, tuple(layers)))
        for name, data in small.items():
            self.disk.write_file(folder / name, data)
        names = [layer.file for layer in layers]
        if self.tables:
            names.append(ROWS_FILE)
        names += ["model.safetensors", *small]
        receipt = read_receipt(self.folder)
        if receipt is not None:  # what it states about the tensors still holds
            receipt["files"] = sha256_files(folder / name for name in names)
            self.disk.write_file(folder / RECEIPT_FILE, _to_json(receipt))
            names.append(RECEIPT_FILE)
        return names

    def _write_layer(self, folder: Path, path: str, records: ExpertRecords) -> ManifestLayer:
        """Write the file of one layer's experts and return its entry of the manifest."""
        stride = _stride(records)
        name = f"experts.L{records.layer:02}.bin"
        record = np.zeros(stride, np.uint8)
        ends = np.cumsum([part.nbytes for part in records.parts]).tolist()
        buffers = [
            record[end - part.nbytes : end] for part, end in zip(records.parts, ends, strict=True)
        ]
        checksums = []
        with self._new_file(folder / name, records.count * stride) as descriptor:
            for expert in range(records.count):
                records.read(expert, buffers)
                checksums.append(crc32(record[: records.nbytes]))
                self.disk.write(descriptor, record.data, expert * stride)
        return ManifestLayer(
            path=self.resolved.architecture.published_name(path),
            file=name,
            experts=records.count,
            stride=stride,
            parts=tuple(
                RecordArray(part.name, SAFETENSORS_DTYPES[part.dtype], part.shape)
                for part in records.parts
            ),
            quantization=self._quantization_of_experts(path),
            crc32=tuple(checksums),
        )

    def _quantization_of_experts(self, path: str) -> dict[Projection, RecordQuantization]:
        """The quantization of each projection of the experts at ``path`` that is quantized."""
        found = {name: self.resolved.tensors.get(f"{path}.{name}.weight") for name in PROJECTIONS}
        weights = {name: tensor for name, tensor in found.items() if tensor is not None}
        quantizations = {
            name: asdict(tensor.quantization)
            for name, tensor in weights.items()
            if isinstance(tensor, QuantizedTensor)
        }
        return msgspec.convert(quantizations, dict[Projection, RecordQuantization])

    def _write_others(self, folder: Path) -> None:
        """Copy all other tensors, under their names, to one safetensors file."""
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for name, (_, info) in self._others.items():
            start = end
            end += info.nbytes
            header[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        position = 8 + len(text)
        with self._new_file(folder / "model.safetensors", position + end) as descriptor:
            self.disk.write(descriptor, len(text).to_bytes(8, "little") + text, 0)
            for shard, info in self._others.values():
                for offset in range(0, info.nbytes, CHUNK_BYTES):
                    chunk = bytearray(min(CHUNK_BYTES, info.nbytes - offset))
                    shard.read_into(info, chunk, offset)
                    self.disk.write(descriptor, memoryview(chunk), position + offset)
                position += info.nbytes

    @contextmanager
    def _new_file(self, path: Path, nbytes: int) -> Iterator[int]:
        """Create a file of that size and open it; it has reached the medium when the block ends."""
        descriptor = self.disk.open(path)
        try:
            os.ftruncate(descriptor, nbytes)
            yield descriptor
            self.disk.sync(descriptor)
        finally:
            os.close(descriptor)

    def _small_files(self) -> dict[str, bytes]:
        """Name -> contents of config.json, tokenizer files, licences and model card."""
        copied = {"config.json": safe_path(self.folder, "config.json")}
        copied |= {path.name: path for path in origin_from_folder(self.folder).licences}
        files = {name: path.read_bytes() for name, path in copied.items()}
        for name, file in self.source.sidecars.items():
            if isinstance(file, Path):
                file = safe_path(file.parent, file.name).read_bytes()
            files[name] = file
        card = safe_path(self.folder, "README.md")
        text = card.read_text("utf-8", "replace") if card.is_file() else f"# {self.output.name}\n"
        front_matter = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
        cut = front_matter.end() if front_matter else 0
        text = f"{text[:cut]}\n> **Packed.** {NOTE}\n\n{text[cut:].lstrip()}".lstrip()
        return files | {"README.md": text.encode()}

    def close(self) -> None:
        """Close the source's files."""
        for shard in (*self.source.shards, *self.checkpoint.shards):
            shard.close()


def prepare_pack(
    folder: str | Path, output: str | Path | None = None, *, disk: Disk | None = None
) -> Packing:
    """Check a packing without reading weights or writing; arguments and errors as ``pack``."""
    folder = Path(folder)
    if (folder / MANIFEST_FILE).exists() or (folder / ROWS_FILE).exists():
        raise InvalidInput(f"{folder}: it is packed already")
    source = open_checkpoint(folder)
    output = Path(os.path.abspath(Path(output or f"{folder.resolve().name}-packed").expanduser()))
    if folder.resolve().is_relative_to(output.resolve()):
        raise OutputError(f"{output} holds the source; name another output")
    return Packing(source, resolve(source), folder, output, disk or Disk())


def pack(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    force: bool = False,
    progress: Progress = silent,
) -> PackSummary:
    """Write a model folder whose experts and per-layer embeddings take one read each.

    The format of experts is specified in docs/experts-format.md, that of embeddings in
    docs/rows-format.md. Every tensor keeps its bytes. A receipt is copied and updated with the
    hashes of the new files. The output appears under its name when it is complete, never in part.
    Peak memory is that of one expert.

    Args:
        folder: a checkpoint with experts or per-layer embeddings, quantized or not.
        output: folder to make; None takes the source's name and "-packed", in the current folder.
        force: replace an existing output, once the new one is complete.
        progress: called with the bytes written so far.

    Returns:
        Sizes of the output.

    Raises:
        InvalidInput: the model has neither experts nor per-layer embeddings, or is packed already.
        CheckpointError, ConfigError: the source is not a sound checkpoint, has a damaged receipt,
            or stores experts in a number format that has to be converted first: quantize it.
        DiskSpaceError: the disk has less room than needed.
        OutputError: the output exists, is being written by another process, or cannot be written.
    """
    packing = prepare_pack(folder, output)
    try:
        return packing.run(force=force, progress=progress)
    finally:
        packing.close()


def _stride(records: ExpertRecords) -> int:
    """Bytes from one expert's record to the next: its size rounded up to whole pages."""
    return -(-records.nbytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


def _to_json(content: Manifest | dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n"
