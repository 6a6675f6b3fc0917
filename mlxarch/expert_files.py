"""Packed experts: one file for each layer, in which all that one expert consists of lies in one run.

Such a folder has ``experts.json``, a manifest, beside its config.json; docs/experts-format.md specifies both.
"""

from math import prod
from pathlib import Path
from typing import Annotated, Literal, Self, cast, get_args

import mlx.core as mx
import msgspec
import numpy as np

from mlxarch.checkpoint import DTYPE_BYTES, Shard, TensorInfo, child, read_json
from mlxarch.checksums import crc32
from mlxarch.errors import CheckpointError
from mlxarch.packing import Quantization
from mlxarch.tensors import DTYPES, Packed, Tensor

MANIFEST = "experts.json"
STRIDE = 16 << 10  # records begin at multiples of it: the largest page that a supported system has
Projection = Literal["gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
LEAVES = ("weight", "scales", "biases", "bias")
ORDER = [f"{projection}.{leaf}" for projection in PROJECTIONS for leaf in LEAVES]  # of a record's parts
REMEDY = "Pack the model again with `mlxarch pack`, or download it again."

Count = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of every record: ``shape`` is that of one expert's array."""

    name: str
    dtype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=3)]

    @property
    def nbytes(self) -> int:
        """Of one expert's."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the matrices of a projection are packed."""

    bits: Literal[2, 3, 4, 5, 6, 8]
    group_size: Literal[16, 32, 64, 128]
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"]


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file. ``path`` is that of the experts' module as a checkpoint names it, ``crc32`` has one for each record."""

    path: str
    file: str
    experts: Count
    stride: Count
    parts: Annotated[tuple[Array, ...], msgspec.Meta(min_length=3, max_length=12)]
    quantization: dict[Projection, Settings]
    crc32: tuple[Annotated[int, msgspec.Meta(ge=0, lt=2**32)], ...]

    @property
    def record_bytes(self) -> int:
        """Of one expert, without what fills up the stride."""
        return sum(part.nbytes for part in self.parts)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``experts.json`` holds; ``note`` is for people."""

    format: Literal["mlxarch-experts"]
    version: Literal[1]
    note: str
    layers: tuple[Layer, ...]


class ExpertFile(Shard):
    """The file of one layer, held open. It has no header: the manifest says what is where."""

    layer: Layer
    _checked: set[int]

    @classmethod
    def of(cls, layer: Layer, folder: Path) -> Self:
        """The file of a layer in a folder."""
        file = cls.open(child(folder, layer.file))
        file.layer, file._checked = layer, set()
        return file

    def check(self, expert: int) -> None:
        """Compare the checksum of a record, once.

        Raises:
            CheckpointError: it is another than the manifest's.
        """
        if expert in self._checked:
            return
        size, known = self.layer.record_bytes, self.layer.crc32[expert]
        record = np.empty(size, np.uint8)
        self.read_into(TensorInfo(f"expert {expert}", "U8", (size,), expert * self.layer.stride, size), record)
        if (found := crc32(record)) != known:
            raise CheckpointError(
                f"{self.path}: the checksum of expert {expert} is {found:08x}, and must be {known:08x}. {REMEDY}"
            )
        self._checked.add(expert)

    def _read_header(self, fd: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        return {}, {}


class Strided(Tensor):
    """One part of all records of a file: (E, …)."""

    def __init__(self, shard: ExpertFile, layer: Layer, part: Array, start: int) -> None:
        self.shard, self.start, self.stride = shard, start, layer.stride
        self.shape, self.dtype = (layer.experts, *part.shape), DTYPES[part.dtype]
        self._part = part

    def info(self, expert: int) -> TensorInfo:
        """Where one expert's array lies."""
        part, start = self._part, self.start + expert * self.stride
        return TensorInfo(f"{part.name} of expert {expert}", part.dtype, part.shape, start, part.nbytes)

    def rows(self, start: int, stop: int) -> mx.array:
        """See Tensor."""
        each, width = prod(self.shape[1:-1]), self.shape[-1] * self.dtype.size
        raw = np.empty((stop - start, width), np.uint8)
        for expert in range(start // each, -(-stop // each)):
            self.shard.check(expert)
            low, high = max(start - expert * each, 0), min(stop - expert * each, each)
            piece = raw[expert * each + low - start : expert * each + high - start]
            self.shard.read_into(self.info(expert), piece, low * width)
        return mx.array(raw.view(f"u{self.dtype.size}")).view(self.dtype)


def open_experts(folder: Path) -> tuple[dict[str, Tensor], tuple[ExpertFile, ...]]:
    """The packed experts of a folder, by the names that a checkpoint gives them, and their files; none without a
    manifest.

    Raises:
        CheckpointError: manifest or files are not as the format wants them.
    """
    path = child(folder, MANIFEST)
    if not path.exists():
        return {}, ()
    manifest = read_manifest(path)
    tensors: dict[str, Tensor] = {}
    files: list[ExpertFile] = []
    try:
        for layer in manifest.layers:
            files.append(ExpertFile.of(layer, folder))
            _check(layer, files[-1], path)
            tensors |= _tensors(layer, files[-1])
    except BaseException:
        for file in files:
            file.close()
        raise
    return tensors, tuple(files)


def read_manifest(path: Path) -> Manifest:
    """Parse and check a manifest, as far as that goes without its files."""
    found = read_json(path, limit=64 << 20, depth=8, values=4_000_000, error=CheckpointError)
    if found.get("format") == "mlxarch-experts" and found.get("version") != 1:
        raise CheckpointError(
            f"{path}: version {found.get('version')!r} of the format; this mlxarch reads version 1. Update it"
        )
    try:
        manifest = msgspec.convert(found, Manifest)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}. {REMEDY}") from None
    for layer in manifest.layers:
        names = [part.name for part in layer.parts]
        wrong = (
            f"its parts are {', '.join(names)}, and must be from {', '.join(ORDER)}, in this order"
            if names != [name for name in ORDER if name in names]
            else f"dtype {unknown[0]!r} is unknown"
            if (unknown := [part.dtype for part in layer.parts if part.dtype not in DTYPES])
            else f"it has {len(layer.crc32)} checksums for {layer.experts} experts"
            if len(layer.crc32) != layer.experts
            else f"a record of {layer.record_bytes} bytes is longer than the stride of {layer.stride}"
            if layer.record_bytes > layer.stride
            else None
        )
        if wrong:
            raise CheckpointError(f"{path}: {layer.path}: {wrong}. {REMEDY}")
    return manifest


def _check(layer: Layer, file: ExpertFile, path: Path) -> None:
    if file.size != layer.experts * layer.stride:
        raise CheckpointError(
            f"{file.path}: the file has {file.size} bytes, and {path.name} makes it {layer.experts * layer.stride}: "
            f"{layer.experts} records of {layer.stride}. {REMEDY}"
        )


def _tensors(layer: Layer, file: ExpertFile) -> dict[str, Tensor]:
    """Of one layer; the arrays of a packed matrix are one Packed under the name of its weight."""
    arrays: dict[str, dict[str, Tensor]] = {}
    start = 0
    for part in layer.parts:
        projection, _, leaf = part.name.partition(".")
        arrays.setdefault(projection, {})[leaf] = Strided(file, layer, part, start)
        start += part.nbytes
    tensors: dict[str, Tensor] = {}
    for projection, found in arrays.items():
        name = f"{layer.path}.{projection}"
        if (bias := found.pop("bias", None)) is not None:
            tensors[f"{name}.bias"] = bias
        settings = layer.quantization.get(cast(Projection, projection))
        if settings is not None and "weight" in found:
            packing = Quantization(settings.bits, settings.group_size, settings.mode)
            tensors[f"{name}.weight"] = Packed(f"{name}.weight", found, packing)
        else:
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in found.items()}
    return tensors
