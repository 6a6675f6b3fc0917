"""Update the KV cache of a layer without computing the rest of the layer.

While a prompt is processed in chunks, only the last chunk needs logits. For the other chunks the
last layer with a cache has to compute keys and values, but no attention and no feed-forward.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import mlx.core as mx

from mlxarch.kv_cache.base import Cache, KVArray
from mlxarch.kv_cache.state import StateCache


class _CacheUpdated(Exception):
    """Raised once the cache has its new keys and values, to leave the layer."""


class _StopAfterAppend:
    """Proxy of a cache that leaves the layer after ``append`` or ``update``."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def append(self, *vectors: mx.array) -> tuple[KVArray, ...]:
        self._cache.append(*vectors)
        raise _CacheUpdated

    @property
    def parts(self) -> tuple[Cache, ...]:
        *first, last = self._cache.parts  # the last one is updated last
        return *first, cast(Cache, _StopAfterAppend(last))

    def update(self, length: int, *state: mx.array) -> None:
        cast(StateCache, self._cache).update(length, *state)
        raise _CacheUpdated


def last_cached_layer(caches: Sequence[Cache | None]) -> int:
    """Index of the last layer that has a cache."""
    return max(index for index, cache in enumerate(caches) if cache is not None)


def update_cache_only(
    layer: Callable[..., mx.array], state: mx.array, context: Any, cache: Cache | None
) -> None:
    """Append the keys and values of new tokens to the cache of a layer, and compute nothing else.

    MLX is lazy, so most of the rest would not be evaluated anyway. But blockwise attention starts
    as soon as it is called, and a router is waited for where its experts are read from the SSD.

    Args:
        layer: a decoder layer.
        state: hidden state before the layer, (B, L, hidden_size).
        context: ForwardContext of the pass.
        cache: cache of the layer; nothing is done without one.
    """
    if cache is None:
        return
    with suppress(_CacheUpdated):
        layer(state, context, cast(Cache, _StopAfterAppend(cache)))
