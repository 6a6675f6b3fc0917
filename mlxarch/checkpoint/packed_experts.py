"""Packed experts: one file per layer in which all arrays of one expert form one contiguous record.

One read brings a whole expert from the SSD. Such a folder has a manifest, ``experts.json``, beside
its config.json; docs/experts-format.md specifies both.
"""

from math import prod
from pathlib import Path
from typing import Annotated, Literal, Self, cast, get_args

import mlx.core as mx
import msgspec
import numpy as np

from mlxarch.checkpoint.lazy_tensor import DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.safetensors_header import DTYPE_BYTES, TensorInfo
from mlxarch.checkpoint.shards import Shard
from mlxarch.errors import CheckpointError
from mlxarch.quantization.formats import MODES
from mlxarch.quantization.scheme import Quantization
from mlxarch.system.checksums import crc32
from mlxarch.system.untrusted_files import read_json, safe_path

MANIFEST_FILE = "experts.json"
RECORD_ALIGNMENT = 16 << 10  # bytes: the largest page size of a supported system
Projection = Literal["gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
ARRAY_NAMES = ("weight", "scales", "biases", "bias")
RECORD_ORDER = [f"{projection}.{array}" for projection in PROJECTIONS for array in ARRAY_NAMES]
REMEDY = "Pack the model again with `mlxarch pack`, or download it again."

Count = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class RecordArray(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One array of every record; ``shape`` is that of a single expert."""

    name: str
    dtype: str
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=3)]

    @property
    def nbytes(self) -> int:
        """Bytes of a single expert's array."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class RecordQuantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Quantization of the matrices of a projection, one of those in ``quantization.formats``."""

    bits: int
    group_size: int
    mode: str

    def __post_init__(self) -> None:
        bits, group_sizes = MODES.get(self.mode, ((), ()))
        if self.bits not in bits or self.group_size not in group_sizes:
            raise ValueError(
                f"{self.bits} bits in groups of {self.group_size}, mode {self.mode}, is no "
                "quantization that MLX has"
            )

    def to_scheme(self) -> Quantization:
        """Convert to the class that computes with it."""
        return Quantization(self.bits, self.group_size, self.mode)


class ManifestLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's file.

    Attributes:
        path: path of the experts' module in the checkpoint.
        file: name of the file.
        experts: number of experts, one record each.
        stride: bytes from one record to the next.
        parts: the arrays of a record, in order.
        quantization: quantization of each projection that has one.
        crc32: checksum of each record.
    """

    path: str
    file: str
    experts: Count
    stride: Count
    parts: Annotated[tuple[RecordArray, ...], msgspec.Meta(min_length=2, max_length=12)]
    quantization: dict[Projection, RecordQuantization]
    crc32: tuple[Annotated[int, msgspec.Meta(ge=0, lt=2**32)], ...]

    @property
    def record_bytes(self) -> int:
        """Bytes of one record without the padding up to the stride."""
        return sum(array.nbytes for array in self.parts)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Contents of ``experts.json``; ``note`` is a text for the reader."""

    format: Literal["mlxarch-experts"]
    version: Literal[1]
    note: str
    layers: tuple[ManifestLayer, ...]


class ExpertFile(Shard):
    """The file of one layer, kept open. It has no header: the manifest gives the positions."""

    layer: ManifestLayer
    _checked: set[int]

    @classmethod
    def open_layer(cls, layer: ManifestLayer, folder: Path) -> Self:
        """Open the file of a layer in a folder."""
        file = cls.open(safe_path(folder, layer.file))
        file.layer = layer
        file._checked = set()
        return file

    def check(self, expert: int) -> None:
        """Check the CRC-32 of an expert's record, at the first call for this expert.

        Raises:
            CheckpointError: it differs from the manifest's.
        """
        if expert in self._checked:
            return
        size = self.layer.record_bytes
        expected = self.layer.crc32[expert]
        record = np.empty(size, np.uint8)
        info = TensorInfo(f"expert {expert}", "U8", (size,), expert * self.layer.stride, size)
        self.read_into(info, record)
        if (found := crc32(record)) != expected:
            raise CheckpointError(
                f"{self.path}: the checksum of expert {expert} is {found:08x}, and must be "
                f"{expected:08x}. {REMEDY}"
            )
        self._checked.add(expert)

    def _read_header(self, fd: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        return {}, {}


class RecordTensor(LazyTensor):
    """One array of all records of a file, stacked: (E, …)."""

    def __init__(
        self, shard: ExpertFile, layer: ManifestLayer, array: RecordArray, start: int
    ) -> None:
        self.shard = shard
        self.start = start
        self.stride = layer.stride
        self.shape = (layer.experts, *array.shape)
        self.dtype = DTYPES[array.dtype]
        self._array = array

    def info(self, expert: int) -> TensorInfo:
        """Return name, dtype, shape and position of one expert's array."""
        array = self._array
        start = self.start + expert * self.stride
        name = f"{array.name} of expert {expert}"
        return TensorInfo(name, array.dtype, array.shape, start, array.nbytes)

    def read_rows(self, start: int, stop: int) -> mx.array:
        """Read rows, see ``LazyTensor``; the records' checksums are checked first."""
        height = prod(self.shape[1:-1])
        row_bytes = self.shape[-1] * self.dtype.size
        raw = np.empty((stop - start, row_bytes), np.uint8)
        for expert in range(start // height, -(-stop // height)):
            self.shard.check(expert)
            low = max(start - expert * height, 0)
            high = min(stop - expert * height, height)
            piece = raw[expert * height + low - start : expert * height + high - start]
            self.shard.read_into(self.info(expert), piece, low * row_bytes)
        return mx.array(raw.view(f"u{self.dtype.size}")).view(self.dtype)


def open_packed_experts(folder: Path) -> tuple[dict[str, LazyTensor], tuple[ExpertFile, ...]]:
    """Open the packed experts of a folder: tensors by their checkpoint names, and their files.

    Both are empty if the folder has no manifest.

    Raises:
        CheckpointError: the manifest or a file breaks a rule of the format.
    """
    path = safe_path(folder, MANIFEST_FILE)
    if not path.exists():
        return {}, ()
    manifest = read_manifest(path)
    tensors: dict[str, LazyTensor] = {}
    files: list[ExpertFile] = []
    try:
        for layer in manifest.layers:
            files.append(ExpertFile.open_layer(layer, folder))
            _check_size(layer, files[-1], path)
            tensors |= _layer_tensors(layer, files[-1])
    except BaseException:
        for file in files:
            file.close()
        raise
    return tensors, tuple(files)


def read_manifest(path: Path) -> Manifest:
    """Parse a manifest and check all that can be checked without its files.

    Raises:
        CheckpointError: it is malformed, or of an unknown version.
    """
    found = read_json(path, limit=64 << 20, depth=8, values=4_000_000, error=CheckpointError)
    if found.get("format") == "mlxarch-experts" and found.get("version") != 1:
        raise CheckpointError(
            f"{path}: version {found.get('version')!r} of the format; this mlxarch reads version "
            "1. Update it"
        )
    try:
        manifest = msgspec.convert(found, Manifest)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}. {REMEDY}") from None
    for layer in manifest.layers:
        if problem := _layer_problem(layer):
            raise CheckpointError(f"{path}: {layer.path}: {problem}. {REMEDY}")
    return manifest


def _layer_problem(layer: ManifestLayer) -> str | None:
    """Describe the first rule that a layer of a manifest breaks; None if it breaks none."""
    names = [array.name for array in layer.parts]
    if names != [name for name in RECORD_ORDER if name in names]:
        return (
            f"its parts are {', '.join(names)}, and must be from {', '.join(RECORD_ORDER)}, "
            "in this order"
        )
    if unknown := [array.dtype for array in layer.parts if array.dtype not in DTYPES]:
        return f"dtype {unknown[0]!r} is unknown"
    if len(layer.crc32) != layer.experts:
        return f"it has {len(layer.crc32)} checksums for {layer.experts} experts"
    if layer.record_bytes > layer.stride:
        return f"a record of {layer.record_bytes} bytes is longer than the stride of {layer.stride}"
    return None


def _check_size(layer: ManifestLayer, file: ExpertFile, manifest: Path) -> None:
    expected = layer.experts * layer.stride
    if file.size != expected:
        raise CheckpointError(
            f"{file.path}: the file has {file.size} bytes, and {manifest.name} makes it "
            f"{expected}: "
            f"{layer.experts} records of {layer.stride}. {REMEDY}"
        )


def _layer_tensors(layer: ManifestLayer, file: ExpertFile) -> dict[str, LazyTensor]:
    """Build the tensors of one layer; a quantized matrix is one tensor named as its weight."""
    projections: dict[str, dict[str, LazyTensor]] = {}
    start = 0
    for array in layer.parts:
        projection, _, key = array.name.partition(".")
        projections.setdefault(projection, {})[key] = RecordTensor(file, layer, array, start)
        start += array.nbytes
    tensors: dict[str, LazyTensor] = {}
    for projection, arrays in projections.items():
        name = f"{layer.path}.{projection}"
        if (bias := arrays.pop("bias", None)) is not None:
            tensors[f"{name}.bias"] = bias
        quantization = layer.quantization.get(cast(Projection, projection))
        if quantization is not None and "weight" in arrays:
            weight = f"{name}.weight"
            tensors[weight] = QuantizedTensor(weight, arrays, quantization.to_scheme())
        else:
            tensors |= {f"{name}.{key}": tensor for key, tensor in arrays.items()}
    return tensors
