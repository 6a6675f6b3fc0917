"""The cache of windows and chunks: what it returns, what it holds, and how far it goes back."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxarch.kv_cache import SlidingCache
from mlxarch.quantization.scheme import Quantization

ONE = 2 * 4 * 4  # bytes of a token's key and value


def entries(first: int, length: int) -> mx.array:
    """Each token's vector holds its slot."""
    return mx.broadcast_to(
        mx.arange(first, first + length, dtype=mx.float32)[:, None], (1, 1, length, 4)
    )


def append(cache: SlidingCache, length: int) -> list[int]:
    """Slots of the keys that come back."""
    new = entries(cache.length, length)
    said = cache.slots(length).tolist()
    oldest = cache.oldest_slot(length)
    keys, values = cache.append(new, -new)
    assert (
        isinstance(keys, mx.array)
        and isinstance(values, mx.array)
        and mx.array_equal(keys, -values)
    )
    found = [int(slot) for slot in keys[0, 0, :, 0].tolist()]  # pyright: ignore
    assert found == said and min(found) == oldest
    assert length == 1 or found == sorted(found)
    return found


@settings(deadline=None, max_examples=150)
@given(
    window=st.integers(1, 12),
    capacity=st.sampled_from([None, 1, 5, 40]),
    steps=st.lists(st.one_of(st.just(1), st.integers(1, 30), st.integers(-20, -1)), max_size=12),
)
def test_every_query_finds_its_window_whatever_came_before(
    window: int, capacity: int | None, steps: list[int]
) -> None:
    """A negative step goes back by so many tokens, where the cache can."""
    cache = SlidingCache(window, capacity)
    for step in steps:
        if step < 0:
            before, length = cache.length, max(0, cache.length + step)
            gone = cache.truncate(length)
            assert cache.length == (length if gone else before)
            continue
        first = cache.length
        found = set(append(cache, step))
        for query in range(first, first + step):
            assert set(range(max(0, query - window + 1), query + 1)) <= found
        assert len(found) <= max(window, window - 1 + step)
        assert cache.nbytes <= window * ONE


@pytest.mark.parametrize(
    "kv", [None, Quantization(8, 32), Quantization(4, 32)], ids=["16", "8", "4"]
)
def test_it_holds_its_window_and_no_more_whatever_passes(kv: Quantization | None) -> None:
    sizes = set()
    for steps in ([5000], [1] * 300, [100, 1, 1000, 1]):
        cache = SlidingCache(128, kv=kv)
        for length in steps:
            cache.append(mx.zeros((1, 2, length, 32)), mx.zeros((1, 2, length, 32)))
        sizes.add(cache.nbytes)
    assert sizes == {128 * 2 * 2 * (128 if kv is None else 8 + 4 * kv.bits)}


def test_it_takes_no_more_than_is_planned_for_and_grows_where_nothing_is() -> None:
    planned, growing = SlidingCache(4096, 100), SlidingCache(4096)
    append(planned, 60)
    append(growing, 60)
    assert planned.nbytes == 100 * ONE
    assert growing.nbytes == 256 * ONE
    append(planned, 1000)  # more than was planned for is no error
    assert planned.nbytes < 4096 * ONE and len(append(planned, 1)) == 1061


def test_it_goes_back_as_far_as_a_whole_window_is_left() -> None:
    cache = SlidingCache(8)
    append(cache, 8)
    assert cache.truncate(3)  # nothing was lost yet
    append(cache, 20)
    assert not cache.truncate(21) and cache.length == 23
    assert cache.truncate(22)  # the seven before the next are there
    assert sorted(append(cache, 1)) == list(range(15, 23))
