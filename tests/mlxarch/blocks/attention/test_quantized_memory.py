"""Packed keys and values take less memory than unpacked ones, in decode and in prefill, where they are unpacked too."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import pytest

from mlxarch.blocks.attention import blockwise as scores
from mlxarch.blocks.attention.attention import attend
from mlxarch.kv_cache import Cache, FullCache
from mlxarch.kv_cache.quantized import should_dequantize
from mlxarch.quantization.scheme import Quantization

LAYERS, HEADS, KV_HEADS, SIZE, HELD = 6, 8, 4, 64, 2048


def peak(bits: int, length: int = 1) -> int:
    """Bytes that two steps of ``length`` tokens take at most, the caches of some layers with them."""
    kv = Quantization(bits, 64) if bits < 16 else None
    caches: list[Cache] = [FullCache(HELD + 2 * length, kv) for _ in range(LAYERS)]
    for number, cache in enumerate(caches):
        cache.append(
            *[mx.random.normal((1, KV_HEADS, HELD, SIZE), key=mx.random.key(number)) for _ in "kv"]
        )
        mx.eval(cache.arrays())
    held, x = (
        sum(cache.nbytes for cache in caches),
        mx.random.normal((1, HEADS, length, SIZE), key=mx.random.key(9)),
    )
    mx.eval(x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(2):
        y = x
        for cache in caches:
            keys, values = cache.append(x[:, :KV_HEADS], x[:, :KV_HEADS])
            y = attend(y, keys, values, None, scale=0.1)
        mx.eval(y)
    return mx.get_peak_memory() - before + held


@pytest.fixture
def unpacking(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """As on CUDA, where products do not read packed elements."""
    return lambda: monkeypatch.setattr(scores, "should_dequantize", lambda rows: True)


@pytest.mark.parametrize("length", [1, 9])
def test_fewer_bits_take_less_memory(length: int, unpacking: Callable[[], None]) -> None:
    peaks = [peak(bits, length) for bits in (16, 8, 4)]
    assert peaks[0] > peaks[1] > peaks[2]
    unpacking()
    peaks[1:] = [peak(bits, length) for bits in (8, 4)]
    assert peaks[0] > peaks[1] > peaks[2]


def test_whole_layers_without_a_pace_take_more(
    unpacking: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacking()
    paced = peak(8)

    def hurried(newest: Sequence[mx.array], before: Sequence[mx.array]) -> list[mx.array]:
        return list(newest)

    monkeypatch.setattr(scores, "eval_two_in_flight", hurried)
    monkeypatch.setattr(scores, "block_length", lambda q, k: HELD + 2)
    assert peak(8) > 1.2 * paced


def test_half_of_a_layer_is_unpacked_at_a_time(
    unpacking: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FullCache(None, Quantization(8, 64))
    keys, values = cache.append(*[mx.ones((1, KV_HEADS, 4 * scores.MIN_BLOCK_KEYS, SIZE))] * 2)
    query = mx.ones((1, HEADS, 1, SIZE))
    assert (
        not should_dequantize(HEADS // KV_HEADS)
        and scores.block_length(query, keys) >= 4 * scores.MIN_BLOCK_KEYS
    )
    unpacking()
    assert scores.block_length(query, keys) == 2 * scores.MIN_BLOCK_KEYS
    waits = list[int]()
    real = scores.eval_two_in_flight
    monkeypatch.setattr(
        scores, "eval_two_in_flight", lambda *some: [waits.append(1), real(*some)][1]
    )
    attend(query, keys, values, None, scale=0.1)
    assert len(waits) == 2
