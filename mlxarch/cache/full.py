"""A cache that keeps every token."""

import mlx.core as mx

from mlxarch.cache.base import Cache
from mlxarch.packing import Quantization

GROWTH = 256  # tokens; a multiple of it is allocated, so that most appends write in place


class FullCache(Cache):
    """Keeps every token, in buffers allocated for ``capacity`` tokens at once or grown by need."""

    def __init__(self, capacity: int | None = None, kv: Quantization | None = None) -> None:
        super().__init__(kv)
        self._capacity = capacity or 0

    def _put(self, held: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        end = self.length + new.shape[2]
        if held is None or held.shape[2] < end:
            held = self._grown(held, new, self._wanted(end, held is not None))
        held[..., self.length : end, :] = new
        return held, held[..., :end, :]

    def _wanted(self, end: int, grows: bool) -> int:
        """Tokens to allocate for, where ``end`` must have room."""
        if end <= self._capacity:
            return self._capacity
        # an eighth more than needed: copying all of it every 256 tokens would make long contexts quadratic
        return -(-(end + (end // 8 if grows else 0)) // GROWTH) * GROWTH

    def _grown(self, held: mx.array | None, like: mx.array, capacity: int) -> mx.array:
        """A buffer for ``capacity`` tokens, with those in it that are held."""
        batch, heads, _, size = like.shape
        kept = [] if held is None else [held[..., : self.length, :]]
        more = mx.zeros((batch, heads, capacity - (self.length if kept else 0), size), like.dtype)
        return mx.concatenate([*kept, more], axis=2) if kept else more

    def slots(self, length: int) -> mx.array:
        return mx.arange(self.length + length)
