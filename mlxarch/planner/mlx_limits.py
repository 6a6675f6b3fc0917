"""Memory limits of MLX: one set for the process, shared by all loaded models."""

import ctypes
import sys
import threading
import weakref
from types import TracebackType

import mlx.core as mx

from mlxarch.planner.activation_memory import MMAP_THRESHOLD
from mlxarch.planner.plan import Plan

# Reentrant: a garbage collection may free a model at any moment, also while limits are being set
_lock = threading.RLock()
_reservations: list["MemoryReservation"] = []  # the oldest first
_baseline_bytes = 0  # bytes that MLX held before the first model
_previous_limits = (0, 0, 0)  # memory, cache and wired limit before the first model
M_MMAP_THRESHOLD = -3  # from malloc.h


class MemoryReservation:
    """Memory reservation of one model; released when the model is collected or loading fails.

    Used in a ``with`` block around loading, it is released if the block raises.

    Attributes:
        allowed: bytes of arrays that the memory budget of the plan allows.
        planned: bytes of arrays that the plan predicts.
        cache_limit: bytes of freed buffers that MLX may keep for later arrays.
        wired: bytes that must not be swapped out.
    """

    def __init__(self, plan: Plan, wire: bool) -> None:
        self.allowed = max(plan.memory - plan.process - plan.mlx_cache, plan.mlx_peak)
        self.planned = plan.mlx_peak
        self.cache_limit = plan.mlx_cache
        can_wire = wire and mx.metal.is_available()
        self.wired = plan.mlx_peak - plan.activations if can_wire else 0

    def release_with(self, model: object) -> None:
        """Release the reservation when ``model`` is collected."""
        weakref.finalize(model, self.release).atexit = False

    def release(self) -> None:
        """Release the reservation.

        The limits become those of the remaining models, and without any those of before.
        """
        with _lock:
            if self in _reservations:
                _reservations.remove(self)
                _apply_limits()

    def __enter__(self) -> "MemoryReservation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.release()


def set_limits(plan: Plan, *, wire: bool = False) -> MemoryReservation:
    """Reserve memory for a plan and set MLX's limits to the sum of all reservations.

    The limits also cover what MLX held before the first model. Beyond its memory limit MLX waits
    for arrays to be freed before it starts more work; it fails only if memory really runs out. The
    buffers that MLX keeps for later arrays are limited as well.

    Args:
        wire: wire weights and caches on a Mac, so that they are never swapped out.
    """
    global _baseline_bytes, _previous_limits
    if plan.machine.backend == "cpu":
        _map_large_arrays()
    reservation = MemoryReservation(plan, wire)
    with _lock:
        if not _reservations:
            _baseline_bytes = mx.get_active_memory()
            wired = mx.set_wired_limit(0) if mx.metal.is_available() else 0
            memory = mx.set_memory_limit(2**62)
            _previous_limits = (memory, mx.set_cache_limit(plan.mlx_cache), wired)
        _reservations.append(reservation)
        _apply_limits()
    return reservation


def _map_large_arrays() -> None:
    """Make glibc allocate arrays of at least ``MMAP_THRESHOLD`` bytes with mmap from now on.

    Such pages return to the system when an array is freed. By default, glibc raises the threshold
    up to 32 MB and takes smaller arrays from a heap that shrinks only at its end: freed memory
    stays with the process while anything behind it is in use. The setting lasts until the process
    ends.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def _apply_limits() -> None:
    memory, cache_limit, wired = _previous_limits
    if _reservations:
        *older, newest = _reservations
        # the newest was planned with what the others had left
        planned = sum(reservation.planned for reservation in older)
        memory = _baseline_bytes + planned + newest.allowed
        cache_limit = max(reservation.cache_limit for reservation in _reservations)
    if requested := sum(reservation.wired for reservation in _reservations):
        recommended = int(mx.device_info()["max_recommended_working_set_size"])
        wired = min(_baseline_bytes + requested, recommended)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache_limit)
    if mx.metal.is_available():
        mx.set_wired_limit(wired)
