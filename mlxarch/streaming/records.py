"""Where the experts of a layer lie on the disk, and how one of them is read whole.

An expert's *record* is the bytes of its arrays as they are stored, in the order of the layer's parts. In a folder of
packed experts it is one run of a file; in any other folder it is gathered from wherever its arrays lie.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint import Shard
from mlxarch.checksums import crc32
from mlxarch.encodings import Words
from mlxarch.errors import CheckpointError, ExpertReadError
from mlxarch.expert_files import LEAVES, PROJECTIONS, ExpertFile, Strided
from mlxarch.streaming.files import ReadFailed, RecordFile
from mlxarch.tensors import Joined, Packed, Rows, SmallScales, Stacked, Stored, Tensor, Transposed

Verify = Literal["first", "always", "never"]


@dataclass(frozen=True)
class Part:
    """One array of an expert.

    Attributes:
        name: within the layer's experts, such as ``gate_proj.scales``.
        tensor: that of all experts, (E, …).
    """

    name: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one expert's."""
        return self.tensor.shape[1:]

    @property
    def dtype(self) -> mx.Dtype:
        """As stored."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Of one expert's, as stored."""
        return prod(self.shape) * self.dtype.size


def parts_of(path: str, tensors: Mapping[str, Tensor]) -> tuple[Part, ...]:
    """What each of the experts at ``path`` of a model consists of, in the order of a record."""
    parts: list[Part] = []
    for projection in PROJECTIONS:
        weight = tensors[f"{path}.{projection}.weight"]
        arrays = dict(weight.parts) if isinstance(weight, Packed) else {"weight": weight}
        if (bias := tensors.get(f"{path}.{projection}.bias")) is not None:
            arrays["bias"] = bias
        parts += [Part(f"{projection}.{leaf}", arrays[leaf]) for leaf in LEAVES if leaf in arrays]
    return tuple(parts)


@dataclass(frozen=True)
class Extent:
    """A run of bytes of a file."""

    shard: Shard
    start: int
    nbytes: int


def extent(tensor: Tensor, expert: int | None) -> Extent | None:
    """Where the bytes of one expert's array lie, all of the tensor's for None; None where they lie in several runs."""
    match tensor:
        case Stored():
            count = tensor.shape[0] if expert is not None else 1
            size = tensor.info.nbytes // count
            return Extent(tensor.shard, tensor.info.start + (expert or 0) * size, size)
        case Strided() if expert is not None:
            info = tensor.info(expert)
            return Extent(tensor.shard, info.start, info.nbytes)
        case Words() | SmallScales():
            return extent(tensor.tensor, expert)
        case Stacked() if expert is not None:
            return extent(tensor.parts[expert], None)
    return None


def extents(tensor: Tensor, expert: int | None) -> Iterator[Extent]:
    """The runs of bytes that one expert's array is made of, all of the tensor's for None.

    Raises:
        CheckpointError: it is computed from what is stored, and not only moved.
    """
    if (found := extent(tensor, expert)) is not None:
        yield found
        return
    match tensor:
        case Stacked() if expert is not None:
            yield from extents(tensor.parts[expert], None)
        case Rows() | Transposed() | Words() | SmallScales():
            yield from extents(tensor.tensor, expert)
        case Joined():
            for part in tensor.parts:
                yield from extents(part, expert)
        case _:
            raise CheckpointError(
                f"its experts are stored in a form ({type(tensor).__name__}) that must be computed with before it can "
                "be used: they cannot be read one by one. Write the model anew with `mlxarch quantize`, and stream that"
            )


def values(tensor: Tensor, expert: int | None, fetch: Callable[[Extent], np.ndarray]) -> np.ndarray:
    """One expert's array, put together from its extents, as unsigned integers of its elements' width."""
    if (found := extent(tensor, expert)) is not None:
        shape = tensor.shape if expert is None else tensor.shape[1:]
        return fetch(found).view(f"u{tensor.dtype.size}").reshape(shape)
    match tensor:
        case Stacked() if expert is not None:
            return values(tensor.parts[expert], None, fetch)
        case Rows():
            return np.take(values(tensor.tensor, expert, fetch), tensor.pick, axis=-1 if tensor.vector else -2)
        case Transposed():
            return values(tensor.tensor, expert, fetch).swapaxes(-1, -2)
        case Joined():
            return np.concatenate([values(part, expert, fetch) for part in tensor.parts], axis=tensor.axis)
        case SmallScales():
            return values(tensor.tensor, expert, fetch)
        case Words():
            inner = np.ascontiguousarray(values(tensor.tensor, expert, fetch))
            return inner.reshape(*inner.shape[:-2], -1).view("u4")
    raise NotImplementedError(type(tensor))  # extents() has refused it


@dataclass
class Records:
    """The records of one layer's experts. Several threads may read at once.

    Attributes:
        layer: its number, for messages.
        parts: what a record consists of.
        verify: "first" checks an expert's checksum when it is read for the first time, "always" whenever it is read:
            in a folder that brings no checksums against that of the bytes that were read first.
        files: open ones, which the layers of a model share.
    """

    layer: int
    parts: tuple[Part, ...]
    verify: Verify = "first"
    files: dict[Shard, RecordFile] = field(default_factory=dict)
    _checked: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.count = self.parts[0].tensor.shape[0]
        self.nbytes = sum(part.nbytes for part in self.parts)
        self.checksums: list[int | None] = [None] * self.count  # CRC-32 of each record, where it is known
        # every file is opened now, and a form that cannot be read found now, not in the midst of an answer
        shards = {e.shard for part in self.parts for n in range(self.count) for e in extents(part.tensor, n)}
        self.files.update({shard: RecordFile(shard) for shard in shards - self.files.keys()})
        if len(shards) == 1 and isinstance(file := next(iter(shards)), ExpertFile):
            self.checksums = list(file.layer.crc32)

    def read(self, expert: int, buffers: Sequence[Any]) -> None:
        """Fill one writable buffer for each part. MLX is not called.

        Raises:
            ExpertReadError: the expert cannot be read, or is not what it was.
        """
        place: Extent | None = None
        try:
            place = self._read(expert, buffers)
        except ReadFailed as problem:
            raise self._error(expert, problem.args[0], problem.args[1:]) from None
        known = self.checksums[expert] is not None
        if self.verify == "always" or (self.verify == "first" and known and expert not in self._checked):
            self._check(expert, buffers, place)

    def _read(self, expert: int, buffers: Sequence[Any]) -> Extent:
        runs: list[tuple[Extent, list[Any]]] = []
        made: list[tuple[Part, Any]] = []
        for part, buffer in zip(self.parts, buffers, strict=True):
            place = extent(part.tensor, expert)
            if place is None:
                made.append((part, buffer))
            elif runs and _adjoin(runs[-1][0], place):
                last, filled = runs[-1]
                runs[-1] = Extent(last.shard, last.start, last.nbytes + place.nbytes), [*filled, buffer]
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
        for part, buffer in made:
            target = np.frombuffer(buffer, f"u{part.dtype.size}").reshape(part.shape)
            target[...] = values(part.tensor, expert, fetch)
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
            raise self._error(expert, f"its checksum is {found:08x}, and must be {known:08x}", (place,))
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
