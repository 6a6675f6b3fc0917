"""Attention spans: which earlier tokens a token attends to, and the cache that suffices for it."""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlxarch.kv_cache import Cache, FullCache, LatentCache, SlidingCache
from mlxarch.quantization.scheme import Quantization


class Span(Protocol):
    """Attention span of a layer; hashable, so that layers with equal spans share one mask."""

    def is_visible(self, query: mx.array, key: mx.array) -> mx.array:
        """Whether a query attends to a key, given their positions; the arrays are broadcast."""
        ...

    def is_plain_causal(self, first: int, last: int) -> bool:
        """Whether every position in first … last attends to itself and to all before it there."""
        ...

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        """Create an empty cache.

        Args:
            capacity: tokens to allocate for at once; None grows as needed.
            kv: quantization of keys and values.
        """
        ...


@dataclass(frozen=True)
class Full:
    """A token attends to itself and to every token before it."""

    def is_visible(self, query: mx.array, key: mx.array) -> mx.array:
        return key <= query

    def is_plain_causal(self, first: int, last: int) -> bool:
        return True

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        return FullCache(capacity, kv)


@dataclass(frozen=True)
class Latent(Full):
    """Full attention whose keys and values are computed from one cached latent per token."""

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        return LatentCache(capacity, kv)


@dataclass(frozen=True)
class Sliding:
    """A token attends to itself and to the ``window - 1`` tokens before it."""

    window: int

    def is_visible(self, query: mx.array, key: mx.array) -> mx.array:
        return (key <= query) & (key > query - self.window)

    def is_plain_causal(self, first: int, last: int) -> bool:
        return last - first < self.window

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        return SlidingCache(self.window, capacity, kv)


@dataclass(frozen=True)
class Chunked:
    """A token attends to itself and to the tokens before it in its chunk of ``size`` positions."""

    size: int

    def is_visible(self, query: mx.array, key: mx.array) -> mx.array:
        return (key <= query) & (key // self.size == query // self.size)

    def is_plain_causal(self, first: int, last: int) -> bool:
        return first // self.size == last // self.size

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        # the newest ``size`` tokens include the current chunk, whatever the padding of the row
        return SlidingCache(self.size, capacity, kv)
