"""What becomes of every parameter, and where its bytes will stand: arithmetic, nothing is read or written."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count, cycle
from math import prod
from typing import Any, Literal

import mlx.core as mx

from mlxarch.blocks import Quantization
from mlxarch.quantize.formats import as_config, fitting, in_words, stored_as
from mlxarch.tensors import DTYPES, FLOATS, Packed, Tensor

SHARD_BYTES = 5 * 10**9  # as large as the shards of mlx-lm and of most published models

NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}  # bytes are U8, not what is also read as bytes
Treatment = Literal["copied", "quantized", "kept packed"]


@dataclass(frozen=True)
class Item:
    """One tensor of an output file; ``dtype`` by its safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the matrix (prod(shape[:-1]), shape[-1])."""
        return prod(self.shape[-1:]) * DTYPES[self.dtype].size

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return prod(self.shape) * DTYPES[self.dtype].size


@dataclass(frozen=True)
class Entry:
    """A parameter, and the tensors that it is stored as: one, or a packed weight with its scales and biases."""

    path: str
    elements: int
    source_bytes: int
    treatment: Treatment
    parts: dict[str, Item]
    quantization: Quantization | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the output."""
        return sum(item.nbytes for item in self.parts.values())


@dataclass(frozen=True)
class Shard:
    """One output file: its header, and the position of each tensor's first byte."""

    file: str
    entries: tuple[Entry, ...]
    header: bytes
    positions: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class Plan:
    """The output, before a byte of it exists."""

    shards: tuple[Shard, ...]
    common: Quantization | None
    notes: tuple[str, ...] = ()
    unquantized: Collection[str] = field(default=())  # matrices that stay floats in a quantized model

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Path -> entry, in the order of the files."""
        return {entry.path: entry for shard in self.shards for entry in shard.entries}

    @property
    def settings(self) -> set[Quantization]:
        """Of what is quantized, and not only kept as it was packed."""
        entries = self.entries.values()
        return {entry.quantization for entry in entries if entry.quantization and entry.treatment == "quantized"}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def elements(self) -> int:
        """Parameters of the model."""
        return sum(entry.elements for entry in self.entries.values())

    @property
    def digest(self) -> str:
        """Changes with any name, dtype, shape or position in the output."""
        return hashlib.sha256(b"".join(shard.file.encode() + shard.header for shard in self.shards)).hexdigest()

    def quantization(self) -> dict[str, Any] | None:
        """The `quantization` of config.json: the common settings and, by path, what differs from them."""
        if self.common is None:
            return None
        section: dict[str, Any] = as_config(self.common)
        for path, entry in self.entries.items():
            if entry.quantization not in (None, self.common):
                section[path.removesuffix(".weight")] = as_config(entry.quantization)
        return section | {path.removesuffix(".weight"): False for path in self.unquantized}

    def index(self) -> dict[str, Any]:
        """Contents of model.safetensors.index.json."""
        files = {item.name: s.file for s in self.shards for e in s.entries for item in e.parts.values()}
        total = {"total_parameters": self.elements, "total_size": self.weight_bytes}
        return {"metadata": total, "weight_map": dict(sorted(files.items()))}


def make_plan(
    parameters: Mapping[str, Tensor],
    matrices: Collection[str],
    wanted: Quantization | None,
    dtype: mx.Dtype | None,
    shard_bytes: int = SHARD_BYTES,
    exact: Collection[str] = (),
    chosen: Mapping[str, Quantization] | None = None,
) -> Plan:
    """Decide for each parameter and lay out the files.

    Args:
        parameters: path -> tensor.
        matrices: the paths among them that may be quantized.
        wanted: settings for them; None changes no number: what is packed stays packed.
        dtype: of what is not quantized, and of affine scales; None keeps the source's.
        shard_bytes: a file ends before the parameter that would make it larger.
        exact: the paths that keep the source's type whatever ``dtype`` is.
        chosen: settings of single matrices, in place of ``wanted``.
    """
    chosen = chosen or {}
    entries = []
    for path in sorted(parameters, key=_natural):
        tensor = parameters[path]
        kind = None if path in exact else dtype
        entries.append(_entry(path, tensor, chosen.get(path, wanted) if path in matrices else None, kind))
    found = Counter(entry.quantization for entry in entries if entry.quantization)
    common = wanted if wanted is None or (wanted in found and not chosen) else None
    if found and common is None:
        common = min(found, key=lambda q: (-found[q], q.bits, q.group_size, q.mode))
    unquantized = [e.path for e in entries if e.path in matrices and e.quantization is None] if common else []
    return Plan(
        _shards(entries, shard_bytes), common, tuple(_notes(parameters, entries, matrices, wanted)), unquantized
    )


def _entry(path: str, tensor: Tensor, wanted: Quantization | None, dtype: mx.Dtype | None) -> Entry:
    make = partial(Entry, path, elements=prod(tensor.shape), source_bytes=_nbytes(tensor))
    if isinstance(tensor, Packed) and _stays(tensor.settings, wanted):
        items = {
            part: Item(_sibling(path, part), NAMES[_cast(stored, dtype)], stored.shape)
            for part, stored in tensor.parts.items()
        }
        return make(treatment="kept packed", parts=items, quantization=tensor.settings)
    fit = fitting(wanted, tensor.shape[-1]) if wanted and len(tensor.shape) > 1 else None
    if fit is None:
        return make(treatment="copied", parts={"weight": Item(path, NAMES[_cast(tensor, dtype)], tensor.shape)})
    scales = tensor.parts["scales"] if isinstance(tensor, Packed) else tensor
    parts = stored_as(fit, tensor.shape, NAMES[_cast(scales if scales.dtype in FLOATS else tensor, dtype)])
    items = {part: Item(_sibling(path, part), kind, shape) for part, (kind, shape) in parts.items()}
    return make(treatment="quantized", parts=items, quantization=fit)


def _stays(packed: Quantization, wanted: Quantization | None) -> bool:
    """Whether a matrix is taken as it is packed.

    The small float formats are what a model was trained in: packed anew without fewer bits, it would only lose.
    """
    return wanted in (None, packed) or (packed.mode != "affine" and wanted is not None and wanted.bits >= packed.bits)


def _cast(tensor: Tensor, dtype: mx.Dtype | None) -> mx.Dtype:
    """Only floats change their type; codes, and scales of eight bits, are integers."""
    return dtype if dtype is not None and tensor.dtype in FLOATS else tensor.dtype


def _sibling(path: str, part: str) -> str:
    return path if part == "weight" else f"{path.removesuffix('.weight')}.{part}"


def _nbytes(tensor: Tensor) -> int:
    if isinstance(tensor, Packed):
        return sum(_nbytes(part) for part in tensor.parts.values())
    return prod(tensor.shape) * tensor.dtype.size


def _shards(entries: Iterable[Entry], limit: int) -> tuple[Shard, ...]:
    groups: list[list[Entry]] = [[]]
    room = limit
    for entry in entries:
        if groups[-1] and entry.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(entry)
        room -= entry.nbytes
    if len(groups) == 1:
        return (_shard("model.safetensors", groups[0]),)
    total = len(groups)
    return tuple(_shard(f"model-{n:05}-of-{total:05}.safetensors", g) for n, g in zip(count(1), groups, strict=False))


def _shard(file: str, entries: list[Entry]) -> Shard:
    """Widest elements first, so that each tensor starts at a multiple of its element size.

    Source: the safetensors format: a 64-bit length, JSON padded with spaces, the data without holes.
    """
    items = [item for entry in entries for item in entry.parts.values()]
    items.sort(key=lambda item: (-DTYPES[item.dtype].size, _natural(item.name)))
    table: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    starts, end = {}, 0
    for item in items:
        starts[item.name] = end
        end += item.nbytes
        table[item.name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": [starts[item.name], end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    positions = {name: len(header) + start for name, start in starts.items()}
    return Shard(file, tuple(entries), header, positions, len(header) + end)


def _notes(
    parameters: Mapping[str, Tensor], entries: list[Entry], matrices: Collection[str], wanted: Quantization | None
) -> Iterable[str]:
    if wanted is None:
        return
    again = [e for e in entries if e.treatment == "quantized" and isinstance(parameters[e.path], Packed)]
    if again:
        yield (
            f"{len(again)} matrices of the source were quantized already, and were unpacked and quantized again, which "
            "cannot bring back what the first time took; the original checkpoint gives a better result"
        )
    kept: dict[Quantization, list[Entry]] = {}
    for entry in entries:
        if entry.treatment == "kept packed" and entry.quantization:
            kept.setdefault(entry.quantization, []).append(entry)
    for found, group in kept.items():
        yield f"already packed as {in_words(found)} in the source and taken as they are: {_some(group)}"
    smaller: dict[Quantization, list[Entry]] = {}
    for entry in entries:
        if entry.treatment == "quantized" and entry.quantization and entry.quantization.group_size < wanted.group_size:
            smaller.setdefault(entry.quantization, []).append(entry)
    for used, group in sorted(smaller.items(), key=lambda pair: -pair[0].group_size):
        yield f"rows that {wanted.group_size} does not divide, in groups of {used.group_size} instead: {_some(group)}"
    plain = [e for e in entries if e.path in matrices and e.treatment == "copied"]
    if plain:
        yield f"rows that no group size divides, left unquantized: {_some(plain)}"


def _some(entries: list[Entry]) -> str:
    names = [entry.path.removesuffix(".weight") for entry in entries]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _natural(name: str) -> list[str | int]:
    """Sorts layer 10 behind layer 9."""
    return [int(part) if odd else part for odd, part in zip(cycle((0, 1)), re.split("([0-9]+)", name), strict=False)]
