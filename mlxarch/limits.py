"""The limits of MLX's memory. MLX has one set of them for the process: that of all models that are loaded, together."""

import ctypes
import sys
import threading
import weakref
from types import TracebackType

import mlx.core as mx

from mlxarch.activations import MAPPED
from mlxarch.memory import Plan

_lock = threading.RLock()  # a garbage collection may free a model at any moment, also while limits are set
_claims: list["Claim"] = []  # the oldest first
_beside = 0  # bytes that MLX held when there was no model
M_MMAP_THRESHOLD = -3  # of malloc.h
_before = 0, 0, 0  # the limits that there were then: of memory, of what is kept, of what is wired


class Claim:
    """What one model may take, until it is freed. In a ``with`` that fails, it is given back.

    Attributes:
        allowed: bytes of arrays that its plan leaves it.
        planned: of these, what it will take.
        kept: bytes that MLX may keep for later arrays.
        wired: bytes that are not to be swapped out.
    """

    def __init__(self, plan: Plan, wire: bool) -> None:
        self.allowed, self.planned = max(plan.memory - plan.process - plan.free, plan.mlx), plan.mlx
        self.kept, self.wired = plan.free, plan.mlx - plan.activations if wire and mx.metal.is_available() else 0

    def belongs_to(self, model: object) -> None:
        """Let it end when ``model`` is freed."""
        weakref.finalize(model, self.release).atexit = False

    def release(self) -> None:
        """Give it back: the limits are those of the models that are left, and without any those of before."""
        with _lock:
            if self in _claims:
                _claims.remove(self)
                _apply()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            self.release()


def set_limits(plan: Plan, *, wire: bool = False) -> Claim:
    """Let MLX take what the plan leaves it, beside what the models loaded before will take, and all else it holds.

    Beyond its limit MLX waits for arrays to be let go of before it begins with more; it fails only where the memory
    does. What it keeps for later arrays is bounded as well.

    Args:
        wire: keep the weights and caches of the plan from being swapped out, on a Mac; else nothing is.
    """
    global _beside, _before
    if plan.machine.backend == "cpu":
        _map_arrays()
    with _lock:
        if not _claims:
            _beside = mx.get_active_memory()
            wired = mx.set_wired_limit(0) if mx.metal.is_available() else 0
            _before = mx.set_memory_limit(2**62), mx.set_cache_limit(plan.free), wired
        _claims.append(claim := Claim(plan, wire))
        _apply()
    return claim


def _map_arrays() -> None:
    """Let arrays from ``MAPPED`` bytes on have pages of their own, which the system gets back when they are let go of.

    Left to itself, glibc takes more and more of them, up to 32 MB each, from one heap, which shrinks from its end only:
    what was let go of stays with the process while anything behind it is in use. That holds until the process ends.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # musl has none
        mallopt(M_MMAP_THRESHOLD, MAPPED)


def _apply() -> None:
    memory, kept, wired = _before
    if _claims:
        *older, newest = _claims
        # the newest was planned with what the others had left
        memory = _beside + sum(claim.planned for claim in older) + newest.allowed
        kept = max(claim.kept for claim in _claims)
    if asked := sum(claim.wired for claim in _claims):
        wired = min(_beside + asked, int(mx.device_info()["max_recommended_working_set_size"]))
    mx.set_memory_limit(memory)
    mx.set_cache_limit(kept)
    if mx.metal.is_available():
        mx.set_wired_limit(wired)
