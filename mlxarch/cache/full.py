"""A cache that keeps every token."""

import mlx.core as mx

from mlxarch.cache.base import Cache

GROWTH = 256  # tokens; a multiple of it is allocated, so that most appends write in place


class FullCache(Cache):
    """Keeps every token, in buffers allocated for ``capacity`` tokens at once or grown by need."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self._capacity = capacity or 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        end = self.length + keys.shape[2]
        self._keys, self._values = self._room(self._keys, keys, end), self._room(self._values, values, end)
        self._keys[..., self.length : end, :] = keys
        self._values[..., self.length : end, :] = values
        self.length = end
        return self._keys[..., :end, :], self._values[..., :end, :]

    def _room(self, held: mx.array | None, new: mx.array, end: int) -> mx.array:
        if held is not None and held.shape[2] >= end:
            return held
        # an eighth more than needed: copying all of it every 256 tokens would make long contexts quadratic
        wanted = max(self._capacity, end + (end // 8 if held is not None else 0))
        capacity = self._capacity if end <= self._capacity else -(-wanted // GROWTH) * GROWTH
        batch, heads, _, size = new.shape
        if held is None:
            return mx.zeros((batch, heads, capacity, size), new.dtype)
        more = mx.zeros((batch, heads, capacity - self.length, size), new.dtype)
        return mx.concatenate([held[..., : self.length, :], more], axis=2)

    def slots(self, length: int) -> mx.array:
        return mx.arange(self.length + length)

    def truncate(self, length: int) -> bool:
        self.length = min(self.length, length)
        return True

    def arrays(self) -> list[mx.array]:
        return [a for a in (self._keys, self._values) if a is not None]
