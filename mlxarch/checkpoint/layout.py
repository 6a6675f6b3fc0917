"""Layout of an output checkpoint: treatment, dtype, shape and byte position of every tensor.

Pure arithmetic on shapes and dtypes: nothing is read or written.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any, Literal

import mlx.core as mx

from mlxarch.checkpoint.lazy_tensor import DTYPES, FLOAT_DTYPES, SAFETENSORS_DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.quantization.config_section import quantization_to_config
from mlxarch.quantization.scheme import (
    Quantization,
    describe_quantization,
    fit_group_size,
    stored_arrays,
)

SHARD_BYTES = 5 * 10**9  # as large as the shards of mlx-lm and of most published models

Treatment = Literal["copied", "quantized", "kept packed"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype and shape of one tensor in an output file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the matrix (prod(shape[:-1]), shape[-1])."""
        return prod(self.shape[-1:]) * DTYPES[self.dtype].size

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPES[self.dtype].size


@dataclass(frozen=True)
class OutputTensor:
    """A parameter and its output tensors: one, or a quantized weight with its scales and biases.

    Attributes:
        path: name of the parameter.
        elements: number of its values.
        source_bytes: its size in the source.
        treatment: copied, quantized, or kept in the quantized form that the source has.
        tensors: "weight", and for a quantized matrix "scales" and "biases" -> output tensor.
        quantization: its quantization in the output, if any.
    """

    path: str
    elements: int
    source_bytes: int
    treatment: Treatment
    tensors: dict[str, TensorSpec]
    quantization: Quantization | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the output."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class OutputShard:
    """An output file: its header, and the byte position of each tensor in the file."""

    file: str
    entries: tuple[OutputTensor, ...]
    header: bytes
    positions: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class OutputLayout:
    """All output files, planned before a byte is written.

    Attributes:
        shards: the files.
        default_quantization: the quantization that config.json gives for all matrices but those
            listed separately; None if nothing is quantized.
        notes: messages for the user.
        unquantized: paths of the matrices that stay floats in a quantized model.
    """

    shards: tuple[OutputShard, ...]
    default_quantization: Quantization | None
    notes: tuple[str, ...] = ()
    unquantized: Collection[str] = field(default=())

    @cached_property
    def entries(self) -> dict[str, OutputTensor]:
        """Path -> entry, in the order of the files."""
        return {entry.path: entry for shard in self.shards for entry in shard.entries}

    @property
    def quantizations(self) -> set[Quantization]:
        """Quantizations of all matrices but those kept as the source has them."""
        return {
            entry.quantization
            for entry in self.entries.values()
            if entry.quantization and entry.treatment == "quantized"
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def elements(self) -> int:
        """Number of parameters of the model."""
        return sum(entry.elements for entry in self.entries.values())

    @property
    def digest(self) -> str:
        """SHA-256 of every name, dtype, shape and position in the output."""
        return hashlib.sha256(
            b"".join(shard.file.encode() + shard.header for shard in self.shards)
        ).hexdigest()

    def quantization_section(self) -> dict[str, Any] | None:
        """Build config.json's ``quantization``: the default, and by path the exceptions."""
        if self.default_quantization is None:
            return None
        section: dict[str, Any] = quantization_to_config(self.default_quantization)
        for path, entry in self.entries.items():
            if entry.quantization not in (None, self.default_quantization):
                section[path.removesuffix(".weight")] = quantization_to_config(entry.quantization)
        return section | {path.removesuffix(".weight"): False for path in self.unquantized}

    def index(self) -> dict[str, Any]:
        """Build the contents of model.safetensors.index.json."""
        files = {
            tensor.name: shard.file
            for shard in self.shards
            for entry in shard.entries
            for tensor in entry.tensors.values()
        }
        total = {"total_parameters": self.elements, "total_size": self.weight_bytes}
        return {"metadata": total, "weight_map": dict(sorted(files.items()))}


def plan_layout(
    parameters: Mapping[str, LazyTensor],
    matrices: Collection[str],
    quantization: Quantization | None,
    dtype: mx.Dtype | None,
    shard_bytes: int = SHARD_BYTES,
    keep_dtype: Collection[str] = (),
    overrides: Mapping[str, Quantization] | None = None,
) -> OutputLayout:
    """Choose the treatment of each parameter and lay out the files.

    Args:
        parameters: path -> tensor.
        matrices: paths of the parameters that may be quantized.
        quantization: their quantization; None changes no value and keeps quantized matrices.
        dtype: dtype of unquantized floats and of affine scales; None keeps the source's.
        shard_bytes: maximum size of a file, unless a single parameter is larger.
        keep_dtype: paths of the parameters that keep the source's dtype whatever ``dtype`` is.
        overrides: path -> quantization of single matrices, instead of ``quantization``.
    """
    overrides = overrides or {}
    entries = []
    for path in sorted(parameters, key=_natural_key):
        wanted = overrides.get(path, quantization) if path in matrices else None
        float_dtype = None if path in keep_dtype else dtype
        entries.append(_plan_tensor(path, parameters[path], wanted, float_dtype))
    default = _default_quantization(entries, quantization, bool(overrides))
    unquantized = []
    if default:
        unquantized = [
            entry.path for entry in entries if entry.path in matrices and entry.quantization is None
        ]
    return OutputLayout(
        _plan_shards(entries, shard_bytes),
        default,
        tuple(_notes(parameters, entries, matrices, quantization)),
        unquantized,
    )


def _default_quantization(
    entries: list[OutputTensor], wanted: Quantization | None, overridden: bool
) -> Quantization | None:
    """Choose config.json's default: ``wanted`` unless overridden, else the most frequent."""
    used = Counter(entry.quantization for entry in entries if entry.quantization)
    if wanted in used and not overridden:
        return wanted
    if not used:
        return None
    return min(used, key=lambda q: (-used[q], q.bits, q.group_size, q.mode))


def _plan_tensor(
    path: str, tensor: LazyTensor, wanted: Quantization | None, dtype: mx.Dtype | None
) -> OutputTensor:
    make = partial(
        OutputTensor, path, elements=prod(tensor.shape), source_bytes=_source_bytes(tensor)
    )
    if isinstance(tensor, QuantizedTensor) and _keeps(tensor.quantization, wanted):
        kept = {
            key: TensorSpec(
                _component_name(path, key),
                SAFETENSORS_DTYPES[_cast(component, dtype)],
                component.shape,
            )
            for key, component in tensor.components.items()
        }
        return make(treatment="kept packed", tensors=kept, quantization=tensor.quantization)
    fitted = fit_group_size(wanted, tensor.shape[-1]) if wanted and len(tensor.shape) > 1 else None
    if fitted is None:
        spec = TensorSpec(path, SAFETENSORS_DTYPES[_cast(tensor, dtype)], tensor.shape)
        return make(treatment="copied", tensors={"weight": spec})
    scales = tensor.components["scales"] if isinstance(tensor, QuantizedTensor) else tensor
    scale_source = scales if scales.dtype in FLOAT_DTYPES else tensor
    arrays = stored_arrays(fitted, tensor.shape, SAFETENSORS_DTYPES[_cast(scale_source, dtype)])
    specs = {
        key: TensorSpec(_component_name(path, key), name, shape)
        for key, (name, shape) in arrays.items()
    }
    return make(treatment="quantized", tensors=specs, quantization=fitted)


def _keeps(stored: Quantization, wanted: Quantization | None) -> bool:
    """Return whether a matrix stays in the quantized form of the source.

    The small float formats (MXFP4, MXFP8, NVFP4) are those that a model was trained in: quantized
    again to as many bits or more, it would only lose precision.
    """
    if wanted is None or wanted == stored:
        return True
    return stored.mode != "affine" and wanted.bits >= stored.bits


def _cast(tensor: LazyTensor, dtype: mx.Dtype | None) -> mx.Dtype:
    """Return the output dtype: floats are cast; codes and scales of eight bits are integers."""
    return dtype if dtype is not None and tensor.dtype in FLOAT_DTYPES else tensor.dtype


def _component_name(path: str, component: str) -> str:
    return path if component == "weight" else f"{path.removesuffix('.weight')}.{component}"


def _source_bytes(tensor: LazyTensor) -> int:
    if isinstance(tensor, QuantizedTensor):
        return sum(_source_bytes(component) for component in tensor.components.values())
    return prod(tensor.shape) * tensor.dtype.size


def _plan_shards(entries: Iterable[OutputTensor], limit: int) -> tuple[OutputShard, ...]:
    groups: list[list[OutputTensor]] = [[]]
    room = limit
    for entry in entries:
        if groups[-1] and entry.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(entry)
        room -= entry.nbytes
    if len(groups) == 1:
        return (_plan_shard("model.safetensors", groups[0]),)
    total = len(groups)
    return tuple(
        _plan_shard(f"model-{number:05}-of-{total:05}.safetensors", group)
        for number, group in enumerate(groups, 1)
    )


def _plan_shard(file: str, entries: list[OutputTensor]) -> OutputShard:
    """Lay out a file, widest elements first, so that tensors are aligned to their element size.

    Source: the safetensors format: a 64-bit length, JSON padded with spaces, the data without
    holes.
    """
    tensors = [tensor for entry in entries for tensor in entry.tensors.values()]
    tensors.sort(key=lambda tensor: (-DTYPES[tensor.dtype].size, _natural_key(tensor.name)))
    fields: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    starts = {}
    end = 0
    for tensor in tensors:
        starts[tensor.name] = end
        end += tensor.nbytes
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [starts[tensor.name], end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    positions = {name: len(header) + start for name, start in starts.items()}
    return OutputShard(file, tuple(entries), header, positions, len(header) + end)


def _notes(
    parameters: Mapping[str, LazyTensor],
    entries: list[OutputTensor],
    matrices: Collection[str],
    wanted: Quantization | None,
) -> Iterable[str]:
    if wanted is None:
        return
    requantized = [
        entry
        for entry in entries
        if entry.treatment == "quantized" and isinstance(parameters[entry.path], QuantizedTensor)
    ]
    if requantized:
        yield (
            f"{len(requantized)} matrices of the source were quantized already, and were unpacked "
            "and quantized again, which "
            "cannot bring back what the first time took; the original checkpoint gives a better "
            "result"
        )
    kept = _by_quantization(entries, lambda entry, _: entry.treatment == "kept packed")
    for found, group in kept.items():
        yield (
            f"already packed as {describe_quantization(found)} in the source and taken as they "
            f"are: {_names(group)}"
        )
    smaller = _by_quantization(
        entries,
        lambda entry, used: entry.treatment == "quantized" and used.group_size < wanted.group_size,
    )
    for used, group in sorted(smaller.items(), key=lambda pair: -pair[0].group_size):
        yield (
            f"rows that {wanted.group_size} does not divide, in groups of {used.group_size} "
            "instead: "
            f"{_names(group)}"
        )
    plain = [entry for entry in entries if entry.path in matrices and entry.treatment == "copied"]
    if plain:
        yield f"rows that no group size divides, left unquantized: {_names(plain)}"


def _by_quantization(
    entries: list[OutputTensor], condition: Callable[[OutputTensor, Quantization], bool]
) -> dict[Quantization, list[OutputTensor]]:
    """Group the quantized entries that meet a condition by their quantization."""
    groups: dict[Quantization, list[OutputTensor]] = {}
    for entry in entries:
        if entry.quantization and condition(entry, entry.quantization):
            groups.setdefault(entry.quantization, []).append(entry)
    return groups


def _names(entries: list[OutputTensor]) -> str:
    names = [entry.path.removesuffix(".weight") for entry in entries]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _natural_key(name: str) -> list[str | int]:
    """Sort key that puts layer 10 after layer 9."""
    pieces = re.split("([0-9]+)", name)
    return [int(piece) if index % 2 else piece for index, piece in enumerate(pieces)]
