"""How far back a token may look: a predicate over positions, and the kind of cache that suffices for it."""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlxarch.cache import Cache, FullCache


class Span(Protocol):
    """Hashable, so that the layers of one pass share a mask for each span."""

    def sees(self, query: mx.array, key: mx.array) -> mx.array:
        """Whether the query at one position may see the key at another; the arrays are broadcast."""
        ...

    def is_causal(self, length: int) -> bool:
        """Whether, among ``length`` consecutive positions, each sees itself and all before it."""
        ...

    def make_cache(self, capacity: int | None) -> Cache:
        """An empty cache; ``capacity`` in tokens where the context is planned, None to grow by need."""
        ...


@dataclass(frozen=True)
class Full:
    """A token sees itself and every token before it."""

    def sees(self, query: mx.array, key: mx.array) -> mx.array:
        return key <= query

    def is_causal(self, length: int) -> bool:
        return True

    def make_cache(self, capacity: int | None) -> Cache:
        return FullCache(capacity)
