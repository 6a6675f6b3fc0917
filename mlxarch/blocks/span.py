"""How far back a token may look: a predicate over positions, and the kind of cache that suffices for it."""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlxarch.cache import Cache, FullCache, LatentCache, SlidingCache
from mlxarch.packing import Quantization


class Span(Protocol):
    """Hashable, so that the layers of one pass share a mask for each span."""

    def sees(self, query: mx.array, key: mx.array) -> mx.array:
        """Whether the query at one position may see the key at another; the arrays are broadcast."""
        ...

    def sees_all(self, first: int, last: int) -> bool:
        """Whether each of the positions from ``first`` to ``last`` sees itself and all of them before it."""
        ...

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        """An empty cache, packed as ``kv`` says.

        ``capacity`` in tokens where the context is planned; None grows by need.
        """
        ...


@dataclass(frozen=True)
class Full:
    """A token sees itself and every token before it."""

    def sees(self, query: mx.array, key: mx.array) -> mx.array:
        return key <= query

    def sees_all(self, first: int, last: int) -> bool:
        return True

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        return FullCache(capacity, kv)


@dataclass(frozen=True)
class Latent(Full):
    """As Full, with keys and values that are made of one latent a token: only this is kept."""

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        return LatentCache(capacity, kv)


@dataclass(frozen=True)
class Sliding:
    """A token sees itself and the ``window - 1`` tokens before it."""

    window: int

    def sees(self, query: mx.array, key: mx.array) -> mx.array:
        return (key <= query) & (key > query - self.window)

    def sees_all(self, first: int, last: int) -> bool:
        return last - first < self.window

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        return SlidingCache(self.window, capacity, kv)


@dataclass(frozen=True)
class Chunked:
    """A token sees itself and the tokens before it in its chunk; a new chunk begins every ``size`` positions."""

    size: int

    def sees(self, query: mx.array, key: mx.array) -> mx.array:
        return (key <= query) & (key // self.size == query // self.size)

    def sees_all(self, first: int, last: int) -> bool:
        return first // self.size == last // self.size

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        # the newest ``size`` tokens hold all of the current chunk, whatever the padding of the row
        return SlidingCache(self.size, capacity, kv)
