"""A cache that keeps the newest tokens only."""

import mlx.core as mx

from mlxarch.cache.base import Cache


class SlidingCache(Cache):
    """A ring of the newest ``window`` tokens: the token of slot s lies at s modulo ``window``."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self._lost = 0  # tokens below this slot were written over at some time
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        length = keys.shape[2]
        (self._keys, keys), (self._values, values) = self._put(self._keys, keys), self._put(self._values, values)
        self.length += length
        self._lost = max(self._lost, self.length - self.window)
        return keys, values

    def _put(self, ring: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        """The ring with the new tokens in it, and all that their queries may see."""
        batch, heads, length, size = new.shape
        if ring is None:
            ring = mx.zeros((batch, heads, self.window, size), new.dtype)
        if length == 1:
            at = self.length % self.window
            ring[..., at : at + 1, :] = new
            return ring, ring[..., : self.length + 1, :]
        at, kept = self.length % self.window, min(self.length, self.window)
        ordered = mx.concatenate([ring[..., at:, :], ring[..., :at, :]], axis=2)[..., self.window - kept :, :]
        seen = mx.concatenate([ordered[..., kept - self._visible() :, :], new], axis=2)
        newest, end = seen[..., -self.window :, :], self.length + length
        if newest.shape[2] < self.window:  # short of the window: nothing was let go of, slots are places
            rest = mx.zeros((batch, heads, self.window - newest.shape[2], size), new.dtype)
            return mx.concatenate([newest, rest], axis=2), seen
        turn = self.window - end % self.window
        return mx.concatenate([newest[..., turn:, :], newest[..., :turn, :]], axis=2), seen

    def _visible(self) -> int:
        """How many of the held tokens the first of several new ones may still see."""
        return min(self.length, self.window - 1)

    def oldest(self, length: int) -> int:
        return max(0, self.length + 1 - self.window) if length == 1 else self.length - self._visible()

    def slots(self, length: int) -> mx.array:
        if length > 1 or self.length < self.window:
            return mx.arange(self.oldest(length), self.length + length)
        places = mx.arange(self.window)
        return self.length - (self.length - places) % self.window

    def truncate(self, length: int) -> bool:
        if length >= self.length:
            return True
        # the token that follows sees window - 1 before it: all of these must still be there
        if max(0, length + 1 - self.window) < self._lost:
            return False
        self.length = length
        return True

    def arrays(self) -> list[mx.array]:
        return [a for a in (self._keys, self._values) if a is not None]
