"""Room in memory for some of a layer's experts: arrays that its matrices compute with, whose rows are written over."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import mlx.core as mx
import numpy as np

from mlxarch.blocks import ExpertLinear, Experts
from mlxarch.streaming.records import Part
from mlxarch.tensors import FLOATS, Packed, Tensor

STAGED = 128 << 20  # bytes of records that are in memory outside of the bank at a time
IN_FLIGHT = 32  # records that are read at a time


def held_as(part: Part, dtype: mx.Dtype) -> mx.Dtype:
    """The type in which a bank holds an array: a float has the one that is computed in."""
    return dtype if part.dtype in FLOATS else part.dtype


def slot_bytes(parts: Sequence[Part], dtype: mx.Dtype) -> int:
    """What one expert takes in memory."""
    return sum(prod(part.shape) * held_as(part, dtype).size for part in parts)


@dataclass(frozen=True)
class Place:
    """Where in a bank's arrays a part of a record goes: rows ``start`` to ``stop`` of every slot of ``array``."""

    part: Part
    array: str
    start: int
    stop: int
    dtype: mx.Dtype


class Bank:
    """``slots`` places for experts of one layer.

    How a slot is written depends on the back end. Where the processor and the GPU share memory, threads read straight
    into the arrays. Where a host pointer would move an array out of the GPU's memory, records are read beside it and
    copied in by MLX; so is what is held in another type than it is stored in.

    Args:
        experts: whose matrices get arrays of so many experts.
        parts: what a record consists of.
        dtype: that is computed in.
        in_place: whether the arrays may be written to behind MLX's back, see ``writes_in_place``.
        join: let the two matrices up be one product, where the loader joins them: on a GPU.

    Attributes:
        flight: records that may be read at a time.
    """

    def __init__(
        self, experts: Experts, parts: Sequence[Part], slots: int, dtype: mx.Dtype, in_place: bool, join: bool
    ) -> None:
        self.slots, self.in_place = slots, in_place
        self._arrays: dict[str, mx.array] = {}
        self._places = _lay_out(experts, parts, slots, dtype, join, self._arrays)
        mx.eval(self._arrays)
        # bytes (slots, …) of every array that may be written to directly
        self._memory = {name: _memory(array) for name, array in self._arrays.items()} if in_place else {}
        self._staged = [place for place in self._places if not self._direct(place)]
        self._beside: dict[str, np.ndarray] = {}
        staged = sum(place.part.nbytes for place in self._staged)
        self.flight = min(IN_FLIGHT, max(STAGED // staged, 4)) if staged else IN_FLIGHT

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def _direct(self, place: Place) -> bool:
        return self.in_place and place.dtype == place.part.dtype

    def buffers(self, slots: Sequence[int]) -> list[list[np.ndarray]]:
        """For each of the slots a buffer of bytes for every part, valid until ``commit``."""
        self._beside = {p.part.name: np.empty((len(slots), p.part.nbytes), np.uint8) for p in self._staged}
        return [[self._buffer(place, slot, row) for place in self._places] for row, slot in enumerate(slots)]

    def _buffer(self, place: Place, slot: int, row: int) -> np.ndarray:
        return self._span(place)[slot] if self._direct(place) else self._beside[place.part.name][row]

    def _span(self, place: Place) -> np.ndarray:
        """The bytes (slots, n) of a place in every slot."""
        memory = self._memory[place.array]
        unit = memory.shape[1] // self._arrays[place.array].shape[1]
        return memory[:, place.start * unit : place.stop * unit]

    def commit(self, slots: Sequence[int]) -> None:
        """Take the filled buffers in. Nothing that was computed from the bank may be under way."""
        for place in self._staged:
            part = place.part
            words = self._beside[part.name].view(f"u{part.dtype.size}").reshape(len(slots), *part.shape)
            arrays = mx.array(words).view(part.dtype).astype(place.dtype)
            if self.in_place:
                self._span(place)[np.array(slots)] = _memory(arrays)
            else:
                self._arrays[place.array][mx.array(list(slots)), place.start : place.stop] = arrays
        self._beside = {}
        if not self.in_place:
            mx.eval(self._arrays)


def _lay_out(
    experts: Experts, parts: Sequence[Part], slots: int, dtype: mx.Dtype, join: bool, arrays: dict[str, mx.array]
) -> list[Place]:
    """Give the matrices of ``experts`` arrays of ``slots`` experts, and say where each part goes."""
    up = {name: [p for p in parts if p.name.startswith(f"{name}.")] for name in ("gate_proj", "up_proj")}
    gate, other = ([(_leaf(p), p.dtype, p.shape[1:]) for p in group] for group in up.values())
    joined = join and gate == other and experts.gate_proj.quantization == experts.up_proj.quantization
    places: list[Place] = []
    for part in parts:
        rows, form = part.shape[0], held_as(part, dtype)
        projection: ExpertLinear = getattr(experts, part.name.partition(".")[0])
        is_up = joined and part.name.startswith("up_proj.")
        if joined and projection is not experts.down_proj:
            start = experts.gate_proj["weight"].shape[1] if is_up else 0
            name, total = f"gate_up.{_leaf(part)}", rows + experts.up_proj["weight"].shape[1]
        else:
            start, name, total = 0, part.name, rows
        if name not in arrays:
            arrays[name] = mx.zeros((slots, total, *part.shape[1:]), form)
        places.append(Place(part, name, start, start + rows, form))
        if name == part.name:
            projection[_leaf(part)] = arrays[name]
    if joined:
        leaves = {_leaf(p): arrays[f"gate_up.{_leaf(p)}"] for p in up["gate_proj"]}
        ends = [experts.gate_proj["weight"].shape[1], leaves["weight"].shape[1]]
        for projection in (experts.gate_proj, experts.up_proj):
            for leaf in leaves:
                projection[leaf] = mx.zeros((0,))
        experts.gate_up.adopt(leaves, ends)
    return places


def _leaf(part: Part) -> str:
    return part.name.rpartition(".")[2]


def settle(experts: Experts, path: str, tensors: dict[str, Tensor]) -> None:
    """Tell the matrices how they are packed."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = tensors[f"{path}.{name}.weight"]
        getattr(experts, name).quantization = weight.settings if isinstance(weight, Packed) else None


def _memory(array: mx.array) -> np.ndarray:
    """The bytes of an array as (rows, bytes of a row). Not a copy: writing to them changes the array."""
    mx.eval(array)
    return np.asarray(array.view(mx.uint8)).reshape(array.shape[0], -1)


def writes_in_place(device: mx.Device) -> bool:
    """Whether MLX sees what is written to an array's memory behind its back: tried, not assumed.

    Not with CUDA: MLX would move the array to memory that the host shares, and compute on it from there.
    """
    return device == mx.cpu and _seen("cpu") or mx.metal.is_available() and _seen("metal")


@cache
def _seen(backend: str) -> bool:
    bank, pattern = mx.zeros((3, 4, 64), mx.uint32), np.arange(1, 257, dtype=np.uint32)
    mx.eval(bank)
    memory = _memory(bank)
    for round in range(2):  # the second time something was computed from it already
        memory[1] = (pattern + round).view(np.uint8)
        seen = np.asarray(mx.take(bank, mx.array([1, 2]), axis=0) + 0)
        if not np.array_equal(seen[0].ravel(), pattern + round) or seen[1].any():
            return False
    return True
