"""The experts of a layer, of which some are in memory: the others are read into their places when tokens need them."""

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
import numpy as np

from mlxarch.blocks import Experts
from mlxarch.blocks.moe import SORT_FROM
from mlxarch.checkpoint import Shard
from mlxarch.streaming.banks import Bank
from mlxarch.streaming.files import RecordFile
from mlxarch.streaming.records import Records
from mlxarch.streaming.shapes import Shape, shape_on_cpu, shape_on_gpu
from mlxarch.streaming.stats import Stats

THREADS = 4  # more gain nothing on any disk that was measured


class Shared:
    """What the streamed layers of a model share.

    Attributes:
        stats: counters.
        lock: held while a layer's bank is in use; two threads may generate, and take turns.
        readers: threads that read, and never call MLX.
        files: that the experts are read from.
    """

    def __init__(self) -> None:
        self.stats, self.lock = Stats(), threading.RLock()
        self.readers = ThreadPoolExecutor(THREADS, "expert-reader")
        self.files: dict[Shard, RecordFile] = {}
        self._pending: mx.array | None = None

    def begin(self, result: mx.array) -> None:
        """Start computing a result from a bank; it is finished before any bank is written to again."""
        mx.async_eval(result)
        self._pending = result

    def finish(self) -> None:
        """Wait for what ``begin`` began."""
        pending, self._pending = self._pending, None
        if pending is not None:
            mx.eval(pending)


class Streaming:
    """The layers of a model whose experts are read from the disk, by their number in the decoder.

    Attributes:
        parameters: paths of the model's parameters that are not loaded.
        segment: see ``Execution``.
    """

    def __init__(self) -> None:
        self.shared, self.parameters, self.segment = Shared(), set[str](), cast(int | None, None)
        self.layers: dict[int, StreamedExperts] = {}

    @property
    def stats(self) -> Stats:
        """What it costs."""
        return self.shared.stats

    @property
    def nbytes(self) -> int:
        """Of all banks."""
        return sum(layer.bank.nbytes for layer in self.layers.values())

    def close(self) -> None:
        """Stop the threads and close the files. The model cannot run afterwards."""
        self.shared.readers.shutdown(cancel_futures=True)
        for file in self.shared.files.values():
            file.close()


@dataclass(frozen=True)
class Call:
    """One use of a layer's experts: x (B, L, dim), chosen (B, L, k)."""

    x: mx.array
    chosen: mx.array

    @cached_property
    def ids(self) -> np.ndarray:
        """The chosen experts (B * L * k), read back from the device."""
        return np.asarray(self.chosen).reshape(-1)

    @property
    def size(self) -> int:
        """Rows that go through an expert."""
        return self.chosen.size


class StreamedExperts:
    """Stands in for ``Experts.__call__`` where a bank holds fewer experts than there are.

    A row's result does not depend on which other rows are computed with it nor on the slot that its expert is in, so
    that it is the same, bit for bit, whatever the number of slots; where MLX chooses another kernel by these numbers,
    the choice is made as if all experts were in memory (see ``shapes``).

    Args:
        first: of the model's streamed layers: it counts the tokens.
        gpu: whether the numbers of rows matter.
    """

    def __init__(self, experts: Experts, records: Records, bank: Bank, shared: Shared, first: bool, gpu: bool) -> None:
        # the experts hold this object: a reference back would keep both, and the bank, until a garbage collection
        self.experts = cast(Experts, weakref.proxy(experts))
        self.records, self.bank, self.shared, self._first = records, bank, shared, first
        self._gpu = gpu
        self._slots: OrderedDict[int, int] = OrderedDict()  # expert -> slot, the least recently used first
        self._free = list(range(bank.slots))
        self._place = np.full(records.count, -1)  # slot of an expert
        self.dim = next(part.shape[0] for part in records.parts if part.name == "down_proj.weight")
        self._calls: list[Call] | None = None
        self._results: Iterator[mx.array] | None = None

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """As ``Experts``.

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

    # Several calls as one ---------------------------------------------------------------------------------------------

    @contextmanager
    def collecting(self) -> Iterator[list[Call]]:
        """Within, calls are noted and not carried out: each returns zeros, which nobody may use."""
        self._calls = calls = []
        try:
            yield calls
        finally:
            self._calls = None

    @contextmanager
    def replaying(self, results: Sequence[mx.array]) -> Iterator[None]:
        """Within, the calls that were noted return their results, in the same order."""
        self._results = iter(results)
        try:
            yield
        finally:
            self._results = None

    def run(self, calls: Sequence[Call], decoding: bool = False) -> list[mx.array]:
        """Carry out calls together: each expert that any of them needs is read at most once.

        ``decoding`` only counts: whether the pass is over one new token.
        """
        stats, begin = self.shared.stats, time.perf_counter()
        mx.async_eval([call.chosen for call in calls])
        self.shared.finish()
        computed = time.perf_counter()
        ids = np.concatenate([call.ids for call in calls])
        stats.compute_seconds += computed - begin
        stats.sync_seconds += time.perf_counter() - computed
        if decoding and self._first:
            stats.token(calls[0].chosen.shape[0])
        counts = np.bincount(ids, minlength=self.records.count)
        needed = np.flatnonzero(counts)
        missing = int((self._place[needed] < 0).sum())
        stats.call(len(needed), len(needed) - missing, missing * self.records.nbytes, decoding)
        if len(needed) <= self.bank.slots and len(calls) == 1:
            self._admit(needed.tolist(), set())
            y = self._at_once(calls[0])
            self.shared.begin(y)
            return [y]
        return self._split(calls, self._in_waves(calls, ids, counts))

    def _at_once(self, call: Call) -> mx.array:
        """All experts of the call have their places: as in ``Experts``."""
        k, places = call.chosen.shape[-1], self._place[call.ids]
        order = np.argsort(places, kind="stable") if call.size >= SORT_FROM else None
        places = places if order is None else places[order]
        tokens = (np.arange(call.size) if order is None else order) // k
        x, shape = call.x.reshape(-1, call.x.shape[-1]), self._shape(call, call.size)
        parts = [slice(start, start + shape.most) for start in range(0, call.size, shape.most)]
        pieces = [self._rows(x, tokens[part], places[part], shape) for part in parts]
        y = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
        y = y if order is None else y[mx.array(np.argsort(order))]
        return y.reshape(*call.chosen.shape, -1)

    def _in_waves(self, calls: Sequence[Call], ids: np.ndarray, counts: np.ndarray) -> mx.array:
        """The results of all rows of all calls: (rows, dim). While a wave computes, the next one's experts are read."""
        x = [call.x.reshape(-1, call.x.shape[-1]) for call in calls]
        x, k = x[0] if len(x) == 1 else mx.concatenate(x), calls[0].chosen.shape[-1]
        most = max(call.size for call in calls)
        of_calls = [self._shape(call, most) for call in calls]
        shapes = list(dict.fromkeys(of_calls))
        which = np.repeat([shapes.index(shape) for shape in of_calls], [call.size for call in calls])
        y, flying = mx.zeros((len(ids), x.shape[-1]), x.dtype), set[int]()
        for wave in self._waves(counts):
            self._admit(wave, flying)
            members = np.zeros(len(counts), bool)
            members[wave] = True
            for number, shape in enumerate(shapes):
                rows = np.flatnonzero(members[ids] & (which == number))
                rows = rows[np.argsort(self._place[ids[rows]], kind="stable")]
                for start in range(0, len(rows), shape.most):
                    some, begin = rows[start : start + shape.most], time.perf_counter()
                    self.shared.finish()
                    self.shared.stats.compute_seconds += time.perf_counter() - begin
                    y[mx.array(some)] = self._rows(x, some // k, self._place[ids[some]], shape)
                    self.shared.begin(y)
            flying = set(wave)
        return y

    def _waves(self, counts: np.ndarray) -> list[list[int]]:
        """The needed experts, so many at a time that the next wave's have room beside them.

        Those in memory come first, before they are written over; those that most tokens need last, and stay there for
        the tokens to come.
        """
        needed = np.flatnonzero(counts)
        held = [expert for expert in needed.tolist() if self._place[expert] >= 0]
        missing = needed[self._place[needed] < 0]
        missing = missing[np.argsort(counts[missing], kind="stable")].tolist()
        size = max(self.bank.slots // 2, 1)
        return [held] * bool(held) + [missing[start : start + size] for start in range(0, len(missing), size)]

    def _split(self, calls: Sequence[Call], y: mx.array) -> list[mx.array]:
        ends = np.cumsum([call.size for call in calls])[:-1].tolist()
        return [part.reshape(*c.chosen.shape, -1) for part, c in zip(mx.split(y, ends), calls, strict=True)]

    def _rows(self, x: mx.array, tokens: np.ndarray, places: np.ndarray, shape: Shape) -> mx.array:
        """(rows, dim) of the results for rows ``tokens`` of x by the experts at ``places``, in one product."""
        count, missing = len(tokens), max(shape.least - len(tokens), 0)
        if missing:  # the last row again
            tokens, places = (np.pad(a, (0, missing), mode="edge") for a in (tokens, places))
        # reshaped before they are picked: CUDA's gather_mm takes the stride of an axis that was put in, 1, for a row's
        rows = x.reshape(-1, 1, x.shape[-1])[mx.array(tokens)]
        return self.experts.rows(rows, mx.array(places), shape.ordered)[:count, 0]

    def _shape(self, call: Call, most: int) -> Shape:
        """Of the products that the call is carried out in; ``most`` rows at a time on a CPU."""
        experts, packed = self.records.count, self.experts.packed
        if self._gpu:
            return shape_on_gpu(call.size, experts, self.bank.slots, packed)
        return shape_on_cpu(call.size, experts, most, packed)

    # What is in memory ------------------------------------------------------------------------------------------------

    def _admit(self, wave: Sequence[int], flying: set[int]) -> None:
        """Give each expert of the wave a slot, and read those that had none. No expert of ``flying`` is written over
        while it may still be computed with.
        """
        missing = [expert for expert in wave if self._place[expert] < 0]
        for expert in wave:
            if self._place[expert] >= 0:
                self._slots.move_to_end(expert)
        if not missing:
            return
        begin = time.perf_counter()
        for start in range(0, len(missing), self.bank.flight):
            batch = missing[start : start + self.bank.flight]
            self._read(batch, set(wave), flying)
        self.shared.stats.read_seconds += time.perf_counter() - begin

    def _take_slot(self, wanted: set[int], flying: set[int]) -> int:
        """A free slot, else that of the expert that was not used for longest."""
        if self._free:
            return self._free.pop()
        victim = next((e for e in self._slots if e not in wanted and e not in flying), None)
        if victim is None:
            self.shared.finish()
            victim = next(e for e in self._slots if e not in wanted)
        self._place[victim] = -1
        return self._slots.pop(victim)

    def _read(self, batch: Sequence[int], wanted: set[int], flying: set[int]) -> None:
        """Fill a slot for each; an expert is found in its slot only when all of it is there and was checked."""
        slots: list[int] = []
        futures: list[Future[None]] = []
        try:
            for _ in batch:
                slots.append(self._take_slot(wanted, flying))
            self.bank.prepare(len(batch))
            for row, (expert, slot) in enumerate(zip(batch, slots, strict=True)):
                read = partial(self.records.read, expert)
                futures.append(self.shared.readers.submit(self.bank.fill, slot, row, read))
            wait(futures)
            for future in futures:
                future.result()
            if not self.bank.in_place:
                self.shared.finish()  # or MLX would copy the bank that is still in use
            self.bank.commit(slots)
            for expert, slot in zip(batch, slots, strict=True):
                self._slots[expert], self._place[expert] = slot, slot
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures)  # nobody may write to a slot that is given away
            self._forget(batch)
            raise

    def _forget(self, batch: Sequence[int]) -> None:
        """After an error or an interruption: these experts have no slots, and all others are where they were."""
        for expert in batch:
            self._slots.pop(expert, None)
        self._place[:] = -1
        self._place[list(self._slots)] = list(self._slots.values())
        self._free = sorted(set(range(self.bank.slots)) - set(self._slots.values()))
