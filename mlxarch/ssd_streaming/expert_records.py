"""Records of experts on the SSD: the bytes of all arrays of one expert, read together.

In a folder of packed experts a record is one contiguous run of a file; in any other folder it is
gathered from wherever the arrays of the expert are stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.formats.fp8_mxfp4 import BytesAsWords
from mlxarch.checkpoint.lazy_tensor import LazyTensor, SafetensorsTensor
from mlxarch.checkpoint.packed_experts import ARRAY_NAMES, PROJECTIONS, ExpertFile, RecordTensor
from mlxarch.checkpoint.quantized_tensor import Float8Scales, QuantizedTensor
from mlxarch.checkpoint.shards import Shard
from mlxarch.checkpoint.tensor_views import Concatenated, SelectedRows, Stacked, Transposed
from mlxarch.errors import CheckpointError, ExpertReadError
from mlxarch.ssd_streaming.positional_reads import ReadFailed, RecordFile
from mlxarch.system.checksums import crc32

Verify = Literal["first", "always", "never"]


@dataclass(frozen=True)
class ExpertArray:
    """One array of an expert, such as the scales of its gate projection.

    Attributes:
        name: name within the layer's experts, e.g. ``gate_proj.scales``.
        tensor: array of all experts, (E, …).
    """

    name: str
    tensor: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one expert's array."""
        return self.tensor.shape[1:]

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype as stored."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's array as stored."""
        return prod(self.shape) * self.dtype.size


def expert_arrays(path: str, tensors: Mapping[str, LazyTensor]) -> tuple[ExpertArray, ...]:
    """Arrays of the experts at ``path`` of a network, in the order of a record."""
    found: list[ExpertArray] = []
    for projection in PROJECTIONS:
        weight = tensors.get(f"{path}.{projection}.weight")
        if weight is None:  # experts without gate
            continue
        arrays = (
            dict(weight.components) if isinstance(weight, QuantizedTensor) else {"weight": weight}
        )
        if (bias := tensors.get(f"{path}.{projection}.bias")) is not None:
            arrays["bias"] = bias
        found += [
            ExpertArray(f"{projection}.{leaf}", arrays[leaf])
            for leaf in ARRAY_NAMES
            if leaf in arrays
        ]
    return tuple(found)


@dataclass(frozen=True)
class Extent:
    """Contiguous run of bytes of a file."""

    shard: Shard
    start: int
    nbytes: int


def contiguous_extent(tensor: LazyTensor, expert: int | None) -> Extent | None:
    """Extent of one expert's array, or of the whole tensor for None; None if it is not contiguous."""
    match tensor:
        case SafetensorsTensor():
            count = tensor.shape[0] if expert is not None else 1
            size = tensor.info.nbytes // count
            return Extent(tensor.shard, tensor.info.start + (expert or 0) * size, size)
        case RecordTensor() if expert is not None:
            info = tensor.info(expert)
            return Extent(tensor.shard, info.start, info.nbytes)
        case BytesAsWords() | Float8Scales():
            return contiguous_extent(tensor.tensor, expert)
        case Stacked() if expert is not None:
            return contiguous_extent(tensor.tensors[expert], None)
    return None


def read_extents(tensor: LazyTensor, expert: int | None) -> Iterator[Extent]:
    """Extents from which one expert's array, or the whole tensor for None, is assembled.

    Raises:
        CheckpointError: the array must be computed from the stored bytes, not only moved.
    """
    if (found := contiguous_extent(tensor, expert)) is not None:
        yield found
        return
    match tensor:
        case Stacked() if expert is not None:
            yield from read_extents(tensor.tensors[expert], None)
        case SelectedRows() | Transposed() | BytesAsWords() | Float8Scales():
            yield from read_extents(tensor.tensor, expert)
        case Concatenated():
            for part in tensor.tensors:
                yield from read_extents(part, expert)
        case _:
            raise CheckpointError(
                f"its experts are stored in a form ({type(tensor).__name__}) that must be computed with before it can "
                "be used: they cannot be read one by one. Write the model anew with `mlxarch quantize`, and stream that"
            )


def assemble(
    tensor: LazyTensor, expert: int | None, fetch: Callable[[Extent], np.ndarray]
) -> np.ndarray:
    """Assemble one expert's array from its extents, as unsigned integers of its elements' width."""
    if (found := contiguous_extent(tensor, expert)) is not None:
        shape = tensor.shape if expert is None else tensor.shape[1:]
        return fetch(found).view(f"u{tensor.dtype.size}").reshape(shape)
    match tensor:
        case Stacked() if expert is not None:
            return assemble(tensor.tensors[expert], None, fetch)
        case SelectedRows():
            return np.take(
                assemble(tensor.tensor, expert, fetch),
                tensor.indices,
                axis=-1 if tensor.vector else -2,
            )
        case Transposed():
            return assemble(tensor.tensor, expert, fetch).swapaxes(-1, -2)
        case Concatenated():
            return np.concatenate(
                [assemble(part, expert, fetch) for part in tensor.tensors], axis=tensor.axis
            )
        case Float8Scales():
            return assemble(tensor.tensor, expert, fetch)
        case BytesAsWords():
            inner = np.ascontiguousarray(assemble(tensor.tensor, expert, fetch))
            return inner.reshape(*inner.shape[:-2], -1).view("u4")
    raise NotImplementedError(type(tensor))  # extents() has refused it


@dataclass
class ExpertRecords:
    """Records of one layer's experts. Several threads may read at once.

    Attributes:
        layer: number of the layer, for messages.
        parts: arrays of a record.
        verify: "first" checks the checksum of an expert at its first read, "always" at every read.
            In a folder without checksums, later reads are compared with the first.
        files: open files, shared by the layers of a network.
    """

    layer: int
    parts: tuple[ExpertArray, ...]
    verify: Verify = "first"
    files: dict[Shard, RecordFile] = field(default_factory=dict)
    _checked: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.count = self.parts[0].tensor.shape[0]
        self.nbytes = sum(part.nbytes for part in self.parts)
        # CRC-32 of each record, once it is known
        self.checksums: list[int | None] = [None] * self.count
        # All files are opened now, so that an unreadable format is found now and not in the middle
        # of an answer
        shards = {
            e.shard
            for part in self.parts
            for n in range(self.count)
            for e in read_extents(part.tensor, n)
        }
        self.files.update({shard: RecordFile(shard) for shard in shards - self.files.keys()})
        if len(shards) == 1 and isinstance(file := next(iter(shards)), ExpertFile):
            self.checksums = list(file.layer.crc32)

    def read(self, expert: int, buffers: Sequence[Any]) -> None:
        """Fill one writable buffer for each array of an expert, without calling MLX.

        Raises:
            ExpertReadError: the expert cannot be read, or its checksum is wrong.
        """
        place: Extent | None = None
        try:
            place = self._read(expert, buffers)
        except ReadFailed as problem:
            raise self._error(expert, problem.args[0], problem.args[1:]) from None
        known = self.checksums[expert] is not None
        if self.verify == "always" or (
            self.verify == "first" and known and expert not in self._checked
        ):
            self._check(expert, buffers, place)

    def _read(self, expert: int, buffers: Sequence[Any]) -> Extent:
        runs: list[tuple[Extent, list[Any]]] = []
        assembled: list[tuple[ExpertArray, Any]] = []
        for part, buffer in zip(self.parts, buffers, strict=True):
            place = contiguous_extent(part.tensor, expert)
            if place is None:
                assembled.append((part, buffer))
            elif runs and _adjoin(runs[-1][0], place):
                last, filled = runs[-1]
                runs[-1] = (
                    Extent(last.shard, last.start, last.nbytes + place.nbytes),
                    [*filled, buffer],
                )
            else:
                runs.append((place, [buffer]))
        fetched: dict[Extent, np.ndarray] = {}

        def fetch(place: Extent) -> np.ndarray:
            if place not in fetched:
                fetched[place] = np.empty(place.nbytes, np.uint8)
                self._fill(place, [fetched[place]])
            return fetched[place]

        for place, filled in runs:
            self._fill(place, filled)
        for part, buffer in assembled:
            target = np.frombuffer(buffer, f"u{part.dtype.size}").reshape(part.shape)
            target[...] = assemble(part.tensor, expert, fetch)
        return runs[0][0] if runs else next(iter(fetched))

    def _fill(self, place: Extent, buffers: Sequence[Any]) -> None:
        try:
            self.files[place.shard].read(buffers, place.start)
        except ReadFailed as problem:
            raise ReadFailed(problem.args[0], place) from problem.__cause__

    def _check(self, expert: int, buffers: Sequence[Any], place: Extent) -> None:
        found = crc32(*buffers)
        known = self.checksums[expert]
        if known is not None and found != known:
            raise self._error(
                expert, f"its checksum is {found:08x}, and must be {known:08x}", (place,)
            )
        self.checksums[expert] = found
        self._checked.add(expert)

    def _error(self, expert: int, problem: str, places: Sequence[Extent]) -> ExpertReadError:
        where = f"{places[0].shard.path}, byte {places[0].start}" if places else "unknown place"
        return ExpertReadError(
            f"expert {expert} of layer {self.layer} could not be read from {where}: {problem}. The answer is given "
            "up; check the disk, and if this comes again download the model again"
        )


def _adjoin(first: Extent, second: Extent) -> bool:
    return first.shard is second.shard and first.start + first.nbytes == second.start
