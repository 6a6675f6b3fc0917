"""The cache of latent attention."""

import mlx.core as mx
import pytest

from mlxarch.kv_cache import FullCache, LatentCache

RANK, SHARED = 6, 2


def entries(length: int, seed: int) -> mx.array:
    return mx.random.normal((2, 1, length, RANK + SHARED), key=mx.random.key(seed))


@pytest.mark.parametrize("capacity", [None, 40, 2000])
def test_returns_all_keys_in_order_and_the_front_of_each_as_its_value(capacity: int | None) -> None:
    cache, keys = LatentCache(capacity), []
    for step, length in enumerate([1, 30, 1, 300, 1]):
        keys.append(entries(length, step))
        assert cache.slots(length).tolist() == list(range(cache.length + length))
        held, values = cache.append(keys[-1], keys[-1][..., :RANK])
        assert isinstance(held, mx.array) and isinstance(values, mx.array)
        assert mx.array_equal(held, mx.concatenate(keys, axis=2))
        assert mx.array_equal(values, held[..., :RANK])
    assert cache.length == 333


@pytest.mark.parametrize("length", [0, 1, 12, 19, 20, 100])
def test_forgets_down_to_any_length(length: int) -> None:
    cache, first, second = LatentCache(), entries(20, 1), entries(5, 2)
    cache.append(first, first[..., :RANK])
    assert cache.truncate(length)
    held, _ = cache.append(second, second[..., :RANK])
    assert isinstance(held, mx.array)
    assert mx.array_equal(held, mx.concatenate([first[..., :length, :], second], axis=2))


def test_holds_one_vector_a_token() -> None:
    latent, full = LatentCache(100), FullCache(100)
    for cache in (latent, full):
        cache.append(entries(1, 1), entries(1, 1)[..., :RANK])
    assert latent.nbytes == 2 * 100 * (RANK + SHARED) * 4
    assert full.nbytes > latent.nbytes
