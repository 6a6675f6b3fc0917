"""States of caches: exported, cut in parts, restored; and the bytes that they will take."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.kv_cache import Cache, FullCache, LatentCache, SlidingCache
from mlxarch.quantization.scheme import Quantization

STATES = {
    "full": lambda kv: FullCache(kv=kv),
    "latent": lambda kv: LatentCache(kv=kv),
    "sliding": lambda kv: SlidingCache(8, kv=kv),
}


def append_random(cache: Cache, length: int, seed: int) -> list[np.ndarray]:
    """States that the queries of ``length`` new tokens see."""
    keys = mx.random.normal((1, 2, length, 64), key=mx.random.key(seed))
    visible = cache.append(keys, keys[..., :32])
    dense = [v if isinstance(v, mx.array) else v.dequantize() for v in visible]
    return [np.asarray(array) for array in dense]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("length", [5, 30])
def test_an_exported_state_goes_on_like_the_cache(kind: str, bits: int | None, length: int) -> None:
    kv = None if bits is None else Quantization(bits, 32)
    cache, other = STATES[kind](kv), STATES[kind](kv)
    append_random(cache, length, 0)
    exported = cache.export()
    mx.eval(exported)
    for step in range(12):  # writes must not reach what was exported
        append_random(cache, 1, 100 + step)
    other.restore(length, [exported])
    third = STATES[kind](kv)
    third.restore(length, [exported])
    fresh = STATES[kind](kv)
    append_random(fresh, length, 0)
    for step in range(12):
        wanted = append_random(fresh, 1, step)
        for copy in (other, third):
            assert all(map(np.array_equal, append_random(copy, 1, step), wanted))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["full", "latent"])
def test_cut_parts_join_to_the_cache(kind: str, bits: int | None) -> None:
    kv = None if bits is None else Quantization(bits, 32)
    cache, other = STATES[kind](kv), STATES[kind](kv)
    append_random(cache, 40, 0)
    parts = [cache.cut(start, stop) for start, stop in ((0, 7), (7, 8), (8, 33))]
    sizes = [sum(array.nbytes for array in part) for part in parts]
    assert sizes[0] == 7 * sizes[1] and sizes[2] == 25 * sizes[1]
    other.restore(33, parts)
    cache.truncate(33)
    assert all(map(np.array_equal, append_random(other, 3, 1), append_random(cache, 3, 1)))
    assert not SlidingCache(8).stores_all


@pytest.mark.parametrize("kind", STATES)
def test_planned_bytes_are_those_that_are_allocated(kind: str) -> None:
    probe = STATES[kind](None)
    append_random(probe, 1, 0)
    for length in (1, 6, 300, 900):
        cache = STATES[kind](None)
        for _ in range(length):
            append_random(cache, 1, 0)
        assert cache.nbytes <= probe.bytes_at(length) <= 1.3 * cache.nbytes
