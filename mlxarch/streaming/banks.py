"""Room in memory for some of a layer's experts: arrays that its matrices compute with, whose rows are written over."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Experts
from mlxarch.streaming.records import Part
from mlxarch.tensors import FLOATS, Packed, Tensor

STAGED = 128 << 20  # bytes of records that are in memory outside of the bank at a time, unless four are more
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

    @property
    def kept_or_widened(self) -> bool:
        """Whether the bank holds the numbers as they are stored, or in a type that has room for all of them."""
        return self.dtype == self.part.dtype or (self.dtype == mx.float32 and self.part.dtype.size == 2)


def in_flight(staged: int) -> int:
    """How many records are read at a time, of which so many bytes of each are held outside of the bank."""
    return min(IN_FLIGHT, max(STAGED // staged, 4)) if staged else IN_FLIGHT


class Bank:
    """``slots`` places for experts of one layer.

    How a slot is written depends on the back end. Where the processor and the GPU share memory, threads read straight
    into the arrays. Where a host pointer would move an array out of the GPU's memory, records are read beside it and
    copied in by MLX; so is what is held in a narrower type than it is stored in.

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
        self._places = _places(experts, parts, dtype, join)
        rows = {place.array: place.stop for place in self._places}
        shapes = {place.array: (slots, rows[place.array], *place.part.shape[1:]) for place in self._places}
        self._arrays = {place.array: mx.zeros(shapes[place.array], place.dtype) for place in self._places}
        mx.eval(self._arrays)
        _give(experts, self._places, self._arrays)
        # bytes (slots, …) of every array that may be written to directly
        self._memory = {name: _memory(array) for name, array in self._arrays.items()} if in_place else {}
        self._staged = [place for place in self._places if not (in_place and place.kept_or_widened)]
        self._beside: dict[str, np.ndarray] = {}
        self.flight = in_flight(sum(place.part.nbytes for place in self._staged))

    @property
    def nbytes(self) -> int:
        """Of its arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def prepare(self, count: int) -> None:
        """Make room beside the bank for what of so many records is not read straight into it."""
        self._beside = {p.part.name: np.empty((count, p.part.nbytes), np.uint8) for p in self._staged}

    def fill(self, slot: int, row: int, read: Callable[[Sequence[np.ndarray]], None]) -> None:
        """Let ``read`` fill a slot, as the ``row``-th record since ``prepare``. Any thread may: MLX is not called."""
        buffers, widened = list[np.ndarray](), list[tuple[np.ndarray, np.ndarray, Place]]()
        for place in self._places:
            if place.part.name in self._beside:
                buffers.append(self._beside[place.part.name][row])
            elif place.dtype == place.part.dtype:
                buffers.append(self._span(place)[slot])
            else:
                buffers.append(np.empty(place.part.nbytes, np.uint8))
                widened.append((buffers[-1], self._span(place)[slot], place))
        read(buffers)
        for narrow, wide, place in widened:
            if place.part.dtype == mx.float16:
                wide.view(np.float32)[:] = narrow.view(np.float16)
            else:  # bfloat16 is the upper half of float32
                words = wide.view(np.uint32)
                words[:] = narrow.view(np.uint16)
                words <<= 16

    def _span(self, place: Place) -> np.ndarray:
        """The bytes (slots, n) of a place in every slot."""
        memory = self._memory[place.array]
        unit = memory.shape[1] // self._arrays[place.array].shape[1]
        return memory[:, place.start * unit : place.stop * unit]

    def commit(self, slots: Sequence[int]) -> None:
        """Take in what was read beside. Nothing that was computed from the bank may be under way."""
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


def _places(experts: Experts, parts: Sequence[Part], dtype: mx.Dtype, join: bool) -> list[Place]:
    """Where each part goes: in an array of its own, or both matrices up in one, the gate's rows first."""
    gate, up = ([p for p in parts if p.name.startswith(name)] for name in ("gate_proj.", "up_proj."))
    alike = [(_leaf(p), p.dtype) for p in gate] == [(_leaf(p), p.dtype) for p in up]
    join = join and alike and experts.gate_proj.quantization == experts.up_proj.quantization
    places, rows = list[Place](), Counter[str]()
    for part in parts:
        array = f"gate_up.{_leaf(part)}" if join and part in [*gate, *up] else part.name
        places.append(Place(part, array, rows[array], rows[array] + part.shape[0], held_as(part, dtype)))
        rows[array] += part.shape[0]
    return places


def _give(experts: Experts, places: Sequence[Place], arrays: dict[str, mx.array]) -> None:
    """Let the matrices compute with the arrays."""
    joined: dict[str, mx.array] = {}
    ends: list[int] = []
    for place in places:
        projection, _, leaf = place.part.name.partition(".")
        own = place.array == place.part.name
        getattr(experts, projection)[leaf] = arrays[place.array] if own else mx.zeros((0,))
        if not own:
            joined[leaf] = arrays[place.array]
            ends += [place.stop] if leaf == "weight" else []
    if joined:
        experts.gate_up.adopt(joined, ends)


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
