"""The engine: a thread that owns a model, and runs the requests of other threads on it.

Unevaluated arrays of MLX belong to the thread that made them. The model, the caches and the
samplers are therefore touched by the engine's thread only; other threads submit requests and
receive tokens.
"""

import itertools
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from mlxarch.blocks import Cache, CausalLM
from mlxarch.engine.admission import MemoryRoom, one_token_caches
from mlxarch.engine.device_turns import DEVICE_TURNS
from mlxarch.engine.prefix.files import DiskLimits, PrefixFiles
from mlxarch.engine.prefix.tree import PrefixCache
from mlxarch.engine.prefix.use import PrefixUse
from mlxarch.engine.request import (
    EngineStatus,
    GenerationRequest,
    RequestHandle,
    RowOutput,
)
from mlxarch.engine.row import Deliver, Row
from mlxarch.engine.scheduler import Scheduler
from mlxarch.engine.steps import PromptReader
from mlxarch.errors import EngineStopped, InvalidInput, QueueFull
from mlxarch.generation.decode import check_tokens, remaining_tokens
from mlxarch.quantization.scheme import Quantization
from mlxarch.system.backend import claim_process

logger = logging.getLogger(__name__)


class _Worker:
    """Loop of the engine's thread; it does not refer to the ``Engine``, which may be collected."""

    def __init__(self, scheduler: Scheduler, deterministic: bool, probe: bool) -> None:
        self.scheduler = scheduler
        self._deterministic = deterministic
        self._probe = probe or deterministic
        self.wake = threading.Condition()
        self.ready = threading.Event()  # the probe has ended, or the thread
        self.arrivals: deque[Row] = deque()
        self.accepts = True
        self.deadline: float | None = None  # from then on, requests are cancelled
        self.error: BaseException | None = None
        self.on_death: Callable[[BaseException], None] | None = None

    def notify(self) -> None:
        """Wake the thread if it waits for work."""
        with self.wake:
            self.wake.notify()

    def stop(self, timeout: float | None) -> None:
        """Accept nothing more, and end when no request is left, or after ``timeout`` seconds."""
        with self.wake:
            self.accepts = False
            deadline = time.monotonic() + (timeout or 0)
            self.deadline = min(self.deadline or deadline, deadline)
            self.wake.notify()

    def run(self) -> None:
        """Run requests until ``stop``."""
        try:
            if self._probe:
                with DEVICE_TURNS:
                    self.scheduler.probe(self._deterministic)
            self.ready.set()
            while self._take_arrivals():
                with DEVICE_TURNS as turns:
                    self.scheduler.turn()
                    if turns.wanted:  # what is queued still computes
                        self.scheduler.settle()
            self.scheduler.finish_all("cancelled")
            self.scheduler.prefixes.close()
        except BaseException as error:
            logger.exception("the engine failed")
            self._die(error)
        finally:
            self.ready.set()

    def _take_arrivals(self) -> bool:
        """Move new requests to the scheduler, and wait where there is none; False ends the thread."""
        scheduler = self.scheduler
        with self.wake:
            while True:
                scheduler.waiting.extend(self.arrivals)
                self.arrivals.clear()
                if not self.accepts:
                    late = self.deadline is not None and time.monotonic() >= self.deadline
                    if not (scheduler.is_idle or late or scheduler.has_work):
                        self.wake.wait(0.05)  # for readers that are behind
                    return not (scheduler.is_idle or late)
                if scheduler.has_work:
                    return True
                # rows that are paused go on when their reader wakes this thread
                self.wake.wait()

    def _die(self, error: BaseException) -> None:
        with self.wake:
            self.accepts = False
            self.error = error
            self.scheduler.waiting.extend(self.arrivals)
            self.arrivals.clear()
        self.scheduler.finish_all("error", EngineStopped(f"the engine failed: {error!r}"))
        self.scheduler.prefixes.close()
        if self.on_death is not None:
            self.on_death(error)


def _stop_and_join(worker: _Worker, thread: threading.Thread) -> None:
    worker.stop(None)
    if thread is not threading.current_thread():
        thread.join()


class Engine:
    """Many requests at once on one model.

    Rows join and leave between steps, and each has its own sampling parameters, random stream and
    limit. Submitting and cancelling are safe from every thread.

    Args:
        model: network with weights.
        context_length: tokens of a prompt and its answer together; None takes the model's.
        room_bytes: memory for the caches of all requests; None without a limit.
        max_rows: requests that run at the same time.
        max_waiting: further requests that may wait.
        prefix_cache_bytes: most memory for the caches of earlier prompts and answers, which later ones
            that begin alike reuse; it is part of ``room_bytes``. 0 keeps none.
        prefix_cache_dir: folder where these are stored too, so that they outlive the process; None
            keeps them in memory only.
        prefix_key: text that identifies the weights; files with another one are not used.
        disk_limits: limits of that folder.
        kv: quantization of keys and values; None keeps them as they are.
        chunk: tokens of a prompt per pass; None takes the default of the machine.
        deterministic: make the bits of a row independent of other rows and of earlier requests, even
            if that costs time.
        probe: whether to find out at the start if the bits of a row depend on other rows.
        spill_dir: folder for the caches of requests that are set aside, to make room for older ones;
            None keeps them in the host's memory.
        share_arrays: whether rows that decode together have their caches in arrays that they share,
            which saves operations and takes memory for padding; None decides by the device.
        on_death: called on the engine's thread after a failure that ended it.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        context_length: int | None = None,
        room_bytes: int | None = None,
        max_rows: int = 16,
        max_waiting: int = 64,
        prefix_cache_bytes: int = 2**30,
        prefix_cache_dir: Path | None = None,
        prefix_key: str = "",
        disk_limits: DiskLimits | None = None,
        kv: Quantization | None = None,
        chunk: int | None = None,
        deterministic: bool = False,
        probe: bool = True,
        spill_dir: Path | None = None,
        share_arrays: bool | None = None,
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        def make_caches() -> list[Cache | None]:
            return model.make_caches(kv=kv)

        self.vocab_size = model.vocab_size
        self.context_length = context_length or model.context_length
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        reader = PromptReader(model, chunk)
        sample = one_token_caches(model, make_caches)
        self._room = MemoryRoom(room_bytes, sample)
        cache = PrefixCache(prefix_cache_bytes, reader.chunk if deterministic else 1)
        files = None
        if prefix_cache_dir is not None and prefix_cache_bytes:
            files = PrefixFiles(prefix_cache_dir, prefix_key, sample, self.vocab_size, disk_limits)
        prefixes = PrefixUse(cache, sample, not deterministic, files)
        # On a CPU, operations cost little beside their arithmetic, which padding adds to. The shapes
        # of shared arrays depend on other rows, and the order of additions may follow them.
        if share_arrays is None:
            share_arrays = mx.default_device() != mx.cpu
        shares = share_arrays and not deterministic
        scheduler = Scheduler(
            model, make_caches, reader, self._room, prefixes, max_rows, spill_dir, shares
        )
        self._worker = _Worker(scheduler, deterministic, probe)
        self._worker.on_death = on_death
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._worker.run, name="mlxarch-engine", daemon=True)
        self._thread.start()
        weakref.finalize(self, _stop_and_join, self._worker, self._thread)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> RequestHandle:
        """Queue a request.

        Args:
            deliver: called on the engine's thread with each output; it must not block.

        Raises:
            InvalidInput: a token or a parameter is out of range.
            ForkedProcess: this process was forked from the one with the engine.
            DoesNotFit: prompt and answer take more than ``room_bytes``.
            ContextLengthError: prompt and answer do not fit into the context.
            QueueFull: too many requests wait.
            EngineStopped: the engine was closed or has failed.
        """
        claim_process()
        check_tokens(request.prompt, self.vocab_size)
        remaining_tokens(len(request.prompt), request.max_tokens or None, self.context_length)
        if bias := [t for t in request.sampling.logit_bias if t >= self.vocab_size]:
            raise InvalidInput(
                f"logit_bias names token {bias[0]}; the vocabulary ends at {self.vocab_size - 1}"
            )
        self._room.check(len(request.prompt), request.max_tokens)
        worker = self._worker
        with worker.wake:
            if not worker.accepts:
                reason = f"it failed: {worker.error!r}" if worker.error else "it was closed"
                raise EngineStopped(f"the engine does not run: {reason}")
            scheduler = worker.scheduler
            queued = len(worker.arrivals) + len(scheduler.waiting)
            free = self.max_rows - len(scheduler.rows) - len(scheduler.aside)
            if queued >= self.max_waiting + max(free, 0):
                raise QueueFull(
                    f"{queued} requests wait already, the most that this engine lets wait; try "
                    "again later",
                    max(1.0, scheduler.seconds_per_request / self.max_rows),
                )
            handle = RequestHandle(f"request-{next(self._numbers)}", worker.notify)
            worker.arrivals.append(Row(request, handle, deliver))
            worker.wake.notify()
        return handle

    def stream(self, request: GenerationRequest) -> Iterator[RowOutput]:
        """Run a request and yield its outputs; closing the iterator cancels it.

        Raises:
            MlxArchError: as for ``submit``, or the error that ended the request.
        """
        outputs: queue.SimpleQueue[RowOutput] = queue.SimpleQueue()
        handle = self.submit(request, outputs.put)
        try:
            while True:
                output = outputs.get()
                if output.error is not None:
                    raise output.error
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            handle.cancel()

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Wait until the engine has found out which batch sizes it uses; gives whether it has."""
        return self._worker.ready.wait(timeout)

    def status(self) -> EngineStatus:
        """State of the engine; may be called from any thread."""
        worker = self._worker
        scheduler = worker.scheduler
        return EngineStatus(
            alive=worker.accepts and self._thread.is_alive(),
            running=len(scheduler.running),
            reading=len(scheduler.reading),
            waiting=len(scheduler.waiting) + len(scheduler.aside) + len(worker.arrivals),
            row_bytes=scheduler.shared.nbytes
            + sum(row.nbytes for row in scheduler.rows if not row.finished),
            room_bytes=self._room.total,
            prefix_bytes=scheduler.prefixes.cache.nbytes,
            rows_independent=scheduler.batch_sizes.independent,
            counters=dict(scheduler.counters),
        )

    def close(self, timeout: float | None = None) -> None:
        """Accept no more requests, and wait until the engine's thread has ended.

        Args:
            timeout: seconds that running requests get to finish; then, or at once with None, they
                are cancelled.
        """
        self._worker.stop(timeout)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
