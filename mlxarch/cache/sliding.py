"""A cache that keeps the newest tokens only."""

import mlx.core as mx

from mlxarch.cache.full import FullCache
from mlxarch.packing import Quantization


class SlidingCache(FullCache):
    """The newest ``window`` tokens: as in a full cache up to there, then a ring.

    In the ring the token of slot s lies at s modulo ``window``.
    """

    def __init__(self, window: int, capacity: int | None = None, kv: Quantization | None = None) -> None:
        super().__init__(min(capacity, window) if capacity else None, kv)
        self.window = window
        self._lost = 0  # tokens below this slot were written over at some time

    def _wanted(self, end: int, grows: bool) -> int:
        return min(super()._wanted(end, grows), self.window)

    def _advance(self, length: int) -> None:
        super()._advance(length)
        self._lost = max(self._lost, self.length - self.window)

    def _put(self, held: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        length, end = new.shape[2], self.length + new.shape[2]
        if end <= self.window:
            return super()._put(held, new)
        if held is None or held.shape[2] < self.window:
            held = self._grown(held, new, self.window)
        at = self.length % self.window
        if length == 1:
            held[..., at : at + 1, :] = new
            return held, held
        ordered = held[..., :at, :]  # of a ring that has not come round yet, all there is
        if self.length >= self.window:
            ordered = mx.concatenate([held[..., at:, :], ordered], axis=2)
        seen = mx.concatenate([ordered[..., ordered.shape[2] - self._visible() :, :], new], axis=2)
        newest, turn = seen[..., -self.window :, :], self.window - end % self.window
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
