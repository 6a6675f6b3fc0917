"""Expert slots: arrays in memory that hold some experts of a layer and are overwritten with others."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Experts
from mlxarch.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor
from mlxarch.checkpoint.packed_experts import PROJECTIONS
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.ssd_streaming.expert_records import ExpertArray

STAGING_BYTES = 128 << 20  # memory for records outside of the slots, but at least four records
MAX_READS = 32  # records that are read at the same time


def slot_dtype(part: ExpertArray, dtype: mx.Dtype) -> mx.Dtype:
    """Dtype of an array in the slots: floats are held in the compute dtype."""
    return dtype if part.dtype in FLOAT_DTYPES else part.dtype


def slot_bytes(parts: Sequence[ExpertArray], dtype: mx.Dtype) -> int:
    """Bytes of one expert in memory."""
    return sum(prod(part.shape) * slot_dtype(part, dtype).size for part in parts)


@dataclass(frozen=True)
class Target:
    """Destination of an array of a record: rows ``start`` to ``stop`` of every slot of ``array``."""

    part: ExpertArray
    array: str
    start: int
    stop: int
    dtype: mx.Dtype

    @property
    def is_lossless(self) -> bool:
        """Whether the slots hold the values as stored, or in a wider dtype."""
        return self.dtype == self.part.dtype or (
            self.dtype == mx.float32 and self.part.dtype.size == 2
        )


def concurrent_reads(staged: int) -> int:
    """Number of records read at the same time, with ``staged`` bytes of each outside of the slots."""
    return min(MAX_READS, max(STAGING_BYTES // staged, 4)) if staged else MAX_READS


class ExpertSlots:
    """Memory for ``slots`` experts of one layer.

    The way to write a slot depends on the back end. Where CPU and GPU share memory, threads read
    straight into the arrays. Where a host pointer would move an array out of the GPU's memory,
    records are read into staging buffers and copied by MLX; so are arrays whose dtype in memory is
    narrower than on disk.

    Args:
        experts: module whose matrices get the arrays.
        parts: arrays of a record.
        dtype: compute dtype.
        in_place: whether the memory of arrays may be written directly, see ``writes_in_place``.
        join: fuse gate and up projection into one product, as the loader does on a GPU.

    Attributes:
        flight: number of records that may be read at the same time.
    """

    def __init__(
        self,
        experts: Experts,
        parts: Sequence[ExpertArray],
        slots: int,
        dtype: mx.Dtype,
        in_place: bool,
        join: bool,
    ) -> None:
        self.slots = slots
        self.in_place = in_place
        self._targets = _targets(experts, parts, dtype, join)
        rows = {target.array: target.stop for target in self._targets}
        shapes = {
            target.array: (slots, rows[target.array], *target.part.shape[1:])
            for target in self._targets
        }
        self._arrays = {
            target.array: mx.zeros(shapes[target.array], target.dtype) for target in self._targets
        }
        mx.eval(self._arrays)
        _assign(experts, self._targets, self._arrays)
        # Bytes (slots, …) of every array that may be written directly
        self._memory = (
            {name: _memory(array) for name, array in self._arrays.items()} if in_place else {}
        )
        self._staged = [target for target in self._targets if not (in_place and target.is_lossless)]
        self._staging: dict[str, np.ndarray] = {}
        self.flight = concurrent_reads(sum(target.part.nbytes for target in self._staged))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def prepare(self, count: int) -> None:
        """Allocate staging buffers for the parts of ``count`` records that cannot be read in place."""
        self._staging = {
            p.part.name: np.empty((count, p.part.nbytes), np.uint8) for p in self._staged
        }

    def fill(self, slot: int, row: int, read: Callable[[Sequence[np.ndarray]], None]) -> None:
        """Fill a slot with ``read``, as record number ``row`` since ``prepare``. Any thread may
        call it: MLX is not used.
        """
        buffers: list[np.ndarray] = []
        widened: list[tuple[np.ndarray, np.ndarray, Target]] = []
        for target in self._targets:
            if target.part.name in self._staging:
                buffers.append(self._staging[target.part.name][row])
            elif target.dtype == target.part.dtype:
                buffers.append(self._span(target)[slot])
            else:
                buffers.append(np.empty(target.part.nbytes, np.uint8))
                widened.append((buffers[-1], self._span(target)[slot], target))
        read(buffers)
        for narrow, wide, target in widened:
            if target.part.dtype == mx.float16:
                wide.view(np.float32)[:] = narrow.view(np.float16)
            else:  # bfloat16 is the upper half of float32
                words = wide.view(np.uint32)
                words[:] = narrow.view(np.uint16)
                words <<= 16

    def _span(self, target: Target) -> np.ndarray:
        """Memory (slots, n) of a target in every slot."""
        memory = self._memory[target.array]
        unit = memory.shape[1] // self._arrays[target.array].shape[1]
        return memory[:, target.start * unit : target.stop * unit]

    def commit(self, slots: Sequence[int]) -> None:
        """Copy the staging buffers into the slots. No computation with the slots may be running."""
        for target in self._staged:
            part = target.part
            words = (
                self._staging[part.name]
                .view(f"u{part.dtype.size}")
                .reshape(len(slots), *part.shape)
            )
            arrays = mx.array(words).view(part.dtype).astype(target.dtype)
            if self.in_place:
                self._span(target)[np.array(slots)] = _memory(arrays)
            else:
                self._arrays[target.array][mx.array(list(slots)), target.start : target.stop] = (
                    arrays
                )
        self._staging = {}
        if not self.in_place:
            mx.eval(self._arrays)


def _targets(
    experts: Experts, parts: Sequence[ExpertArray], dtype: mx.Dtype, join: bool
) -> list[Target]:
    """Destination of each array: its own, or one for gate and up projection, the rows of the gate first."""
    gate, up = (
        [p for p in parts if p.name.startswith(name)] for name in ("gate_proj.", "up_proj.")
    )
    alike = [(_leaf(p), p.dtype) for p in gate] == [(_leaf(p), p.dtype) for p in up]
    join = join and alike and experts["gate_proj"].quantization == experts.up_proj.quantization
    targets: list[Target] = []
    rows = Counter[str]()
    for part in parts:
        array = f"gate_up.{_leaf(part)}" if join and part in [*gate, *up] else part.name
        targets.append(
            Target(part, array, rows[array], rows[array] + part.shape[0], slot_dtype(part, dtype))
        )
        rows[array] += part.shape[0]
    return targets


def _assign(experts: Experts, targets: Sequence[Target], arrays: dict[str, mx.array]) -> None:
    """Assign the arrays to the matrices of the experts."""
    joined: dict[str, mx.array] = {}
    ends: list[int] = []
    for target in targets:
        projection, _, leaf = target.part.name.partition(".")
        own = target.array == target.part.name
        getattr(experts, projection)[leaf] = arrays[target.array] if own else mx.zeros((0,))
        if not own:
            joined[leaf] = arrays[target.array]
            ends += [target.stop] if leaf == "weight" else []
    if joined:
        experts.gate_up.use_fused(joined, ends)


def _leaf(part: ExpertArray) -> str:
    return part.name.rpartition(".")[2]


def set_quantization(experts: Experts, path: str, tensors: Mapping[str, LazyTensor]) -> None:
    """Set the quantization of the matrices."""
    for name in filter(experts.__contains__, PROJECTIONS):
        weight = tensors[f"{path}.{name}.weight"]
        getattr(experts, name).quantization = (
            weight.quantization if isinstance(weight, QuantizedTensor) else None
        )


def _memory(array: mx.array) -> np.ndarray:
    """Memory of an array as bytes (rows, bytes of a row), not a copy: writing to it changes the array."""
    mx.eval(array)
    return np.asarray(array.view(mx.uint8)).reshape(array.shape[0], -1)


def writes_in_place(device: mx.Device) -> bool:
    """Whether MLX computes with values written directly to the memory of an array; determined by a test.

    Never on CUDA: MLX would move the array to memory shared with the host and compute with it
    there.
    """
    return (
        device == mx.cpu
        and _test_direct_write("cpu")
        or mx.metal.is_available()
        and _test_direct_write("metal")
    )


@cache
def _test_direct_write(backend: str) -> bool:
    """Write to the memory of an array, and check that MLX reads what was written."""
    array = mx.zeros((3, 4, 64), mx.uint32)
    pattern = np.arange(1, 257, dtype=np.uint32)
    mx.eval(array)
    memory = _memory(array)
    for round in range(2):  # the second time, the array has been computed with already
        memory[1] = (pattern + round).view(np.uint8)
        seen = np.asarray(mx.take(array, mx.array([1, 2]), axis=0) + 0)
        if not np.array_equal(seen[0].ravel(), pattern + round) or seen[1].any():
            return False
    return True
