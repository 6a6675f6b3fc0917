"""Offloaded experts: some experts of a layer are in memory, the others are read from the SSD when chosen."""

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks import Experts
from mlxarch.blocks.moe.moe import MIN_ROWS_TO_SORT
from mlxarch.checkpoint.packed_experts import PROJECTIONS
from mlxarch.checkpoint.shards import Shard
from mlxarch.ssd_streaming.expert_records import ExpertRecords
from mlxarch.ssd_streaming.expert_slots import ExpertSlots
from mlxarch.ssd_streaming.kernel_shapes import Shape, shape_on_cpu, shape_on_gpu
from mlxarch.ssd_streaming.positional_reads import RecordFile
from mlxarch.ssd_streaming.stats import Stats

READER_THREADS = 4  # more gained nothing on any SSD measured


class Shared:
    """State shared by the layers of a network with offloaded experts.

    Attributes:
        stats: counters.
        lock: held while the slots of a layer are in use; threads that generate take turns.
        readers: threads that read records and never call MLX.
        files: open files of the records.
    """

    def __init__(self) -> None:
        self.stats = Stats()
        self.lock = threading.RLock()
        self.readers = ThreadPoolExecutor(READER_THREADS, "expert-reader")
        self.files: dict[Shard, RecordFile] = {}
        self._pending: mx.array | None = None

    def begin(self, result: mx.array) -> None:
        """Start computing a result; it is finished before any slot is overwritten."""
        mx.async_eval(result)
        self._pending = result

    def finish(self) -> None:
        """Wait for the result that ``begin`` started."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            mx.eval(pending)


class ExpertStreaming:
    """Layers of a network whose experts are read from the SSD.

    Attributes:
        layers: offloaded experts by the number of the layer in the decoder.
        parameters: paths of the parameters that are not loaded.
        segment: tokens that pass a layer together in prefill, see ``Execution``.
    """

    def __init__(self) -> None:
        self.shared, self.parameters, self.segment = Shared(), set[str](), cast(int | None, None)
        self.layers: dict[int, StreamedExperts] = {}

    @property
    def stats(self) -> Stats:
        """Counters of all layers."""
        return self.shared.stats

    @property
    def nbytes(self) -> int:
        """Bytes of the slots of all layers."""
        return sum(layer.memory.nbytes for layer in self.layers.values())

    def close(self) -> None:
        """Stop the threads and close the files; the network cannot run afterwards."""
        self.shared.readers.shutdown(cancel_futures=True)
        for file in self.shared.files.values():
            file.close()


@dataclass(frozen=True)
class Call:
    """Call of a layer's experts.

    Attributes:
        x: input (B, L, dim).
        chosen: chosen experts of each token (B, L, k).
    """

    x: mx.array
    chosen: mx.array

    @cached_property
    def ids(self) -> np.ndarray:
        """Chosen experts (B * L * k), read back from the device."""
        return np.asarray(self.chosen).reshape(-1)

    @property
    def size(self) -> int:
        """Number of rows, one for each token and chosen expert."""
        return self.chosen.size


class OffloadedExperts(Experts):
    """Experts of a layer of which only some are in memory; takes the place of ``Experts`` in the network.

    Attributes:
        streaming: the offloaded experts of all layers of the network.
        layer: number of the layer in the decoder.
    """

    def __init__(self, experts: Experts, streaming: "ExpertStreaming", layer: int) -> None:
        nn.Module.__init__(self)  # the matrices are those of ``experts``: none is allocated
        for name in PROJECTIONS:
            if name in experts:
                self[name] = experts[name]
        self.activation = experts.activation
        self.gate_up = experts.gate_up
        self.streaming = streaming
        self.layer = layer

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Compute the chosen experts: x (B, L, dim), chosen (B, L, k) -> (B, L, k, dim)."""
        return self.streaming.layers[self.layer](x, chosen)


def streaming_of(model: nn.Module) -> ExpertStreaming | None:
    """Offloaded experts of a network; None where all experts are in memory."""
    return next((m.streaming for m in model.modules() if isinstance(m, OffloadedExperts)), None)


class StreamedExperts:
    """Product of tokens with the experts of one layer, which are read from the SSD into a few slots.

    The result of a row depends neither on the other rows nor on the slot of its expert, so it is
    bitwise the same with any number of slots. Where MLX would choose another kernel for fewer
    slots, products are shaped so that it does not (see ``kernel_shapes``).

    Args:
        experts: module with the matrices of the slots.
        records: records of the experts on the SSD.
        memory: the slots.
        first: whether this is the first offloaded layer, which counts the tokens.
        gpu: whether MLX runs on a GPU, where kernels depend on row counts.
    """

    def __init__(
        self,
        experts: Experts,
        records: ExpertRecords,
        memory: ExpertSlots,
        shared: Shared,
        first: bool,
        gpu: bool,
    ) -> None:
        # The module refers to this object: a strong reference back would keep the slots until a
        # garbage collection
        self.experts = cast(Experts, weakref.proxy(experts))
        self.records = records
        self.memory = memory
        self.shared = shared
        self._first = first
        self._gpu = gpu
        # expert -> slot, the least recently used expert first
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(memory.slots))
        self._slot_of = np.full(records.count, -1)  # slot of each expert; -1 if it is not in memory
        self.dim = next(part.shape[0] for part in records.parts if part.name == "down_proj.weight")
        self._calls: list[Call] | None = None
        self._results: Iterator[mx.array] | None = None

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Compute the chosen experts: x (B, L, dim), chosen (B, L, k) -> (B, L, k, dim).

        Raises:
            ExpertReadError: an expert cannot be read.
        """
        with self.shared.lock:
            if self._results is not None:
                return next(self._results)
            if self._calls is not None:
                self._calls.append(Call(x, chosen))
                return mx.zeros((*chosen.shape, x.shape[-1]), x.dtype)
            return self.run([Call(x, chosen)], decoding=chosen.shape[1] == 1)[0]

    @contextmanager
    def collecting(self) -> Iterator[list[Call]]:
        """Record calls in the block instead of computing them; they return zeros that must not be used."""
        self._calls = calls = []
        try:
            yield calls
        finally:
            self._calls = None

    @contextmanager
    def replaying(self, results: Sequence[mx.array]) -> Iterator[None]:
        """Return ``results`` from the calls in the block, in the order in which they were recorded."""
        self._results = iter(results)
        try:
            yield
        finally:
            self._results = None

    def run(self, calls: Sequence[Call], decoding: bool = False) -> list[mx.array]:
        """Compute several calls together, reading each needed expert at most once.

        Args:
            decoding: whether the pass is over one new token; for the counters.
        """
        stats = self.shared.stats
        start = time.perf_counter()
        mx.async_eval([call.chosen for call in calls])
        self.shared.finish()
        computed = time.perf_counter()
        ids = np.concatenate([call.ids for call in calls])
        stats.compute_seconds += computed - start
        stats.sync_seconds += time.perf_counter() - computed
        if decoding and self._first:
            stats.count_tokens(calls[0].chosen.shape[0])
        counts = np.bincount(ids, minlength=self.records.count)
        needed = np.flatnonzero(counts)
        missing = int((self._slot_of[needed] < 0).sum())
        stats.count_call(
            len(needed), len(needed) - missing, missing * self.records.nbytes, decoding
        )
        if len(needed) <= self.memory.slots and len(calls) == 1:
            self._admit(needed.tolist(), set())
            y = self._compute_at_once(calls[0])
            self.shared.begin(y)
            return [y]
        return self._split(calls, self._compute_in_waves(calls, ids, counts))

    def _compute_at_once(self, call: Call) -> mx.array:
        """Compute a call whose experts are all in memory, like ``Experts``."""
        k = call.chosen.shape[-1]
        slots = self._slot_of[call.ids]
        order = np.arange(call.size)
        is_sorted = call.size >= MIN_ROWS_TO_SORT
        if is_sorted:
            order = np.argsort(slots, kind="stable")
            slots = slots[order]
        tokens = order // k
        x = call.x.reshape(-1, call.x.shape[-1])
        shape = self._shape(call, call.size)
        ranges = [slice(start, start + shape.most) for start in range(0, call.size, shape.most)]
        pieces = [self._product(x, tokens[rows], slots[rows], shape) for rows in ranges]
        y = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
        if is_sorted:
            y = y[mx.array(np.argsort(order))]
        return y.reshape(*call.chosen.shape, -1)

    def _compute_in_waves(
        self, calls: Sequence[Call], ids: np.ndarray, counts: np.ndarray
    ) -> mx.array:
        """Compute all rows (rows, dim) of all calls, reading the experts of a wave while the one
        before computes.
        """
        inputs = [call.x.reshape(-1, call.x.shape[-1]) for call in calls]
        x = inputs[0] if len(inputs) == 1 else mx.concatenate(inputs)
        k = calls[0].chosen.shape[-1]
        most = max(call.size for call in calls)
        call_shapes = [self._shape(call, most) for call in calls]
        shapes = list(dict.fromkeys(call_shapes))
        row_shapes = np.repeat(
            [shapes.index(shape) for shape in call_shapes], [call.size for call in calls]
        )
        y = mx.zeros((len(ids), x.shape[-1]), x.dtype)
        in_use: set[int] = set()
        for wave in self._waves(counts):
            self._admit(wave, in_use)
            in_wave = np.zeros(len(counts), bool)
            in_wave[wave] = True
            for number, shape in enumerate(shapes):
                rows = np.flatnonzero(in_wave[ids] & (row_shapes == number))
                rows = rows[np.argsort(self._slot_of[ids[rows]], kind="stable")]
                for first in range(0, len(rows), shape.most):
                    some = rows[first : first + shape.most]
                    start = time.perf_counter()
                    self.shared.finish()
                    self.shared.stats.compute_seconds += time.perf_counter() - start
                    y[mx.array(some)] = self._product(x, some // k, self._slot_of[ids[some]], shape)
                    self.shared.begin(y)
            in_use = set(wave)
        return y

    def _waves(self, counts: np.ndarray) -> list[list[int]]:
        """Divide the needed experts into waves, each small enough to leave slots for the next one.

        Experts in memory come first, before they are overwritten. Those that most tokens need come
        last, so that they are in memory for the next tokens.
        """
        needed = np.flatnonzero(counts)
        held = [expert for expert in needed.tolist() if self._slot_of[expert] >= 0]
        missing = needed[self._slot_of[needed] < 0]
        missing = missing[np.argsort(counts[missing], kind="stable")].tolist()
        size = max(self.memory.slots // 2, 1)
        return [held] * bool(held) + [
            missing[start : start + size] for start in range(0, len(missing), size)
        ]

    def _split(self, calls: Sequence[Call], y: mx.array) -> list[mx.array]:
        ends = np.cumsum([call.size for call in calls])[:-1].tolist()
        return [
            part.reshape(*c.chosen.shape, -1)
            for part, c in zip(mx.split(y, ends), calls, strict=True)
        ]

    def _product(
        self, x: mx.array, tokens: np.ndarray, slots: np.ndarray, shape: Shape
    ) -> mx.array:
        """Multiply rows ``tokens`` of x with the experts in ``slots``, as one product (rows, dim)."""
        count = len(tokens)
        missing = max(shape.least - count, 0)
        if missing:  # repeat the last row
            tokens = np.pad(tokens, (0, missing), mode="edge")
            slots = np.pad(slots, (0, missing), mode="edge")
        # Reshaped before the selection: CUDA's gather_mm mistakes the stride 1 of an inserted axis
        # for that of a row
        rows = x.reshape(-1, 1, x.shape[-1])[mx.array(tokens)]
        return self.experts.forward_rows(rows, mx.array(slots), shape.ordered)[:count, 0]

    def _shape(self, call: Call, most: int) -> Shape:
        """Shape of the products of a call; on a CPU, up to ``most`` rows at a time."""
        experts, packed = self.records.count, self.experts.is_quantized
        if self._gpu:
            return shape_on_gpu(call.size, experts, self.memory.slots, packed)
        return shape_on_cpu(call.size, experts, most, packed)

    def _admit(self, wave: Sequence[int], in_use: set[int]) -> None:
        """Give each expert of the wave a slot, and read those that had none.

        No expert of ``in_use`` is overwritten while it may still be computed with.
        """
        missing = [expert for expert in wave if self._slot_of[expert] < 0]
        for expert in wave:
            if self._slot_of[expert] >= 0:
                self._slots.move_to_end(expert)
        if not missing:
            return
        start = time.perf_counter()
        for first in range(0, len(missing), self.memory.flight):
            batch = missing[first : first + self.memory.flight]
            self._read(batch, set(wave), in_use)
        self.shared.stats.read_seconds += time.perf_counter() - start

    def _take_slot(self, wanted: set[int], in_use: set[int]) -> int:
        """Free slot, or else that of the least recently used expert."""
        if self._free:
            return self._free.pop()
        victim = next((e for e in self._slots if e not in wanted and e not in in_use), None)
        if victim is None:
            self.shared.finish()
            victim = next(e for e in self._slots if e not in wanted)
        self._slot_of[victim] = -1
        return self._slots.pop(victim)

    def _read(self, batch: Sequence[int], wanted: set[int], in_use: set[int]) -> None:
        """Read experts into slots; they are entered in the table only when complete and checked."""
        slots: list[int] = []
        futures: list[Future[None]] = []
        try:
            for _ in batch:
                slots.append(self._take_slot(wanted, in_use))
            self.memory.prepare(len(batch))
            for row, (expert, slot) in enumerate(zip(batch, slots, strict=True)):
                read = partial(self.records.read, expert)
                futures.append(self.shared.readers.submit(self.memory.fill, slot, row, read))
            wait(futures)
            for future in futures:
                future.result()
            if not self.memory.in_place:
                self.shared.finish()  # or MLX would copy arrays that are still in use
            self.memory.commit(slots)
            for expert, slot in zip(batch, slots, strict=True):
                self._slots[expert], self._slot_of[expert] = slot, slot
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures)  # no thread may write to a slot that is given away
            self._forget(batch)
            raise

    def _forget(self, batch: Sequence[int]) -> None:
        """Drop the experts of a failed read; all others keep their slots."""
        for expert in batch:
            self._slots.pop(expert, None)
        self._slot_of[:] = -1
        self._slot_of[list(self._slots)] = list(self._slots.values())
        self._free = sorted(set(range(self.memory.slots)) - set(self._slots.values()))
