"""MLX's limits are those of the models that there are."""

import gc
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import mlxarch
from mlxarch import LanguageModel, language_model
from mlxarch.errors import CheckpointError
from mlxarch.planner.mlx_limits import set_limits
from mlxarch.planner.plan import Plan

MB = 10**6


def limits() -> tuple[int, int]:
    """Present limits of MLX's memory and of its buffer cache."""
    memory, kept = mx.set_memory_limit(10**9), mx.set_cache_limit(MB)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(kept)
    return memory, kept


@pytest.fixture(autouse=True)
def own() -> Iterator[tuple[int, int]]:
    """Limits that no model of another test has set."""
    gc.collect()
    before = mx.set_memory_limit(7_000_000_000), mx.set_cache_limit(77 * MB)
    yield limits()
    gc.collect()
    mx.set_memory_limit(before[0])
    mx.set_cache_limit(before[1])


def loaded(folder: Path, memory: int) -> LanguageModel:
    return mlxarch.load(folder, memory=memory, context=64)


def baseline(before: int, model: LanguageModel, memory: int) -> int:
    """Bytes that MLX held when the limits for the first model were set: its network was built."""
    plan = plan_of(model)
    found = limits()[0] - (memory - plan.process - plan.mlx_cache)
    assert 0 <= found - before < 1000, "a network without weights has a few constants"
    return found


def plan_of(model: LanguageModel) -> Plan:
    assert model.plan is not None
    return model.plan


def test_two_models_have_their_plans_together_and_the_last_one_leaves_no_limits(
    talker: Path, own: tuple[int, int]
) -> None:
    held = mx.get_active_memory()
    first = loaded(talker, 300 * MB)
    plan = plan_of(first)
    alone = 300 * MB - plan.process - plan.mlx_cache
    held = baseline(held, first, 300 * MB)
    assert limits() == (held + alone, plan.mlx_cache) != own
    second = loaded(talker, 500 * MB)
    both = plan.mlx_peak + 500 * MB - plan_of(second).process - plan.mlx_cache
    assert limits() == (held + both, plan.mlx_cache)
    answer = first.generate("hello", max_tokens=3).tokens
    del second
    assert limits()[0] == held + alone, "what was the second model's is nobody's"
    assert first.generate("hello", max_tokens=3).tokens == answer
    del first
    assert limits() == own


def test_the_first_model_may_go_first(talker: Path, own: tuple[int, int]) -> None:
    held = mx.get_active_memory()
    first = loaded(talker, 300 * MB)
    held = baseline(held, first, 300 * MB)
    second = loaded(talker, 500 * MB)
    plan, session = plan_of(second), first.session()
    both, left = limits()[0], held + 500 * MB - plan.process - plan.mlx_cache
    del first
    assert limits()[0] == both > left, "the session needs its model"
    del session
    assert limits()[0] == left
    del second
    assert limits() == own


def test_what_cannot_be_loaded_takes_nothing(
    talker: Path, own: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        assert limits() != own
        raise CheckpointError("a weight file is damaged")

    monkeypatch.setattr(language_model, "load_weights", broken)
    with pytest.raises(CheckpointError):
        loaded(talker, 300 * MB)
    assert limits() == own


def test_the_larger_of_what_may_be_kept_counts_and_a_plan_is_never_too_small(
    talker: Path, own: tuple[int, int]
) -> None:
    model = loaded(talker, 300 * MB)
    held, plan = (
        limits()[0] - (300 * MB - plan_of(model).process - plan_of(model).mlx_cache),
        plan_of(model),
    )
    reservation = set_limits(replace(plan, mlx_cache=plan.mlx_cache * 2, memory=MB))
    assert limits() == (held + 2 * plan.mlx_peak, plan.mlx_cache * 2), (
        "less memory than planned for would only be slow"
    )
    reservation.release()
    reservation.release()
    assert limits()[1] == plan.mlx_cache
    del model
    assert limits() == own


ARRAYS = """
import ctypes
import numpy as np

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "b", "c", "d", "hblkhd", "f", "g", "h", "i", "j")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

def mapped():
    before = mallinfo().hblkhd
    array = np.empty(4 << 20, np.uint8)
    return mallinfo().hblkhd - before >= array.nbytes

np.empty(31 << 20, np.uint8)  # whatever is as large was given pages of its own, and let go of
print(mapped())
import mlx.core
from mlxarch.planner.mlx_limits import _map_large_arrays
_map_large_arrays()
print(mapped())
np.empty(31 << 20, np.uint8)
print(mapped())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is let go of")
def test_arrays_that_are_let_go_of_are_given_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ARRAYS], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False", "True", "True"], done.stderr
