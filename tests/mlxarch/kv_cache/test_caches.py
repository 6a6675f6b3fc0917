"""The cache that keeps every token."""

import mlx.core as mx
import pytest

from mlxarch.kv_cache import FullCache
from mlxarch.kv_cache.full import GROWTH


def entries(length: int, seed: int) -> mx.array:
    return mx.random.normal((2, 3, length, 4), key=mx.random.key(seed))


@pytest.mark.parametrize("capacity", [None, 40, 10_000])
def test_returns_all_keys_and_values_in_order(capacity: int | None) -> None:
    cache = FullCache(capacity)
    keys, values = [], []
    for step, length in enumerate([1, 30, 1, 300, 1, 1, 700]):
        keys.append(entries(length, step))
        values.append(entries(length, step + 50))
        assert cache.slots(length).tolist() == list(range(cache.length + length))
        all_keys, all_values = cache.append(keys[-1], values[-1])
        assert isinstance(all_keys, mx.array) and isinstance(all_values, mx.array)
        assert mx.array_equal(all_keys, mx.concatenate(keys, axis=2))
        assert mx.array_equal(all_values, mx.concatenate(values, axis=2))
    assert cache.length == 1034


def test_what_was_truncated_is_written_over() -> None:
    cache = FullCache()
    first, second = entries(20, 1), entries(5, 2)
    cache.append(first, first)
    assert cache.truncate(12)
    keys, _ = cache.append(second, second)
    assert isinstance(keys, mx.array)
    assert mx.array_equal(keys, mx.concatenate([first[..., :12, :], second], axis=2))
    assert cache.truncate(100)  # longer than it is: nothing to forget
    assert cache.length == 17


def test_a_planned_capacity_is_allocated_once() -> None:
    cache = FullCache(1000)
    cache.append(entries(1, 1), entries(1, 1))
    one = 2 * 3 * 4 * 4 * 2  # bytes of a token's keys and values
    assert cache.nbytes == 1000 * one
    cache.append(entries(999, 2), entries(999, 2))
    assert cache.nbytes == 1000 * one
    cache.append(entries(1, 3), entries(1, 3))
    assert cache.nbytes > 1000 * one


def test_growth_copies_seldom_and_wastes_little() -> None:
    cache, sizes = FullCache(), []
    for step in range(0, 20_000, 100):
        cache.append(entries(100, step), entries(100, step))
        sizes.append(cache.nbytes // (2 * 3 * 4 * 4 * 2))
    copies = sum(a != b for a, b in zip(sizes, sizes[1:], strict=False))
    assert copies < 40
    assert sizes[-1] <= 20_000 * 9 / 8 + GROWTH
