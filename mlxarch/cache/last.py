"""The last layer of a pass that is for the caches alone: of its keys and values nothing is made."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import mlx.core as mx

from mlxarch.cache.base import Cache, Held


class _Taken(Exception):
    """The cache has what it is for."""


class _Last:
    """A cache behind whose ``append`` nothing follows."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def append(self, keys: mx.array, values: mx.array) -> tuple[Held, Held]:
        self._cache.append(keys, values)
        raise _Taken


def last_cache(caches: Sequence[Cache | None]) -> int:
    """The number of the last layer that has one: where a pass for the caches ends."""
    return max(number for number, cache in enumerate(caches) if cache is not None)


def take_in(layer: Callable[..., mx.array], state: mx.array, step: Any, cache: Cache | None) -> None:
    """Let the cache of a layer, if any, take in what a pass brings, and compute nothing of the layer behind that.

    Most of it nobody would evaluate anyway; but attention that goes by blocks begins at once with what it is asked for,
    and a router is waited for where its experts are read from the disk.
    """
    with suppress(_Taken):
        if cache is not None:
            layer(state, step, cast(Cache, _Last(cache)))
