"""A cache that keeps the newest tokens only."""

from copy import copy
from dataclasses import dataclass

import mlx.core as mx

from mlxarch.cache.full import FullCache
from mlxarch.packing import Quantization


@dataclass(frozen=True)
class Mark:
    """What a ring held once: ``length`` tokens had been appended, those below slot ``lost`` written over."""

    length: int
    lost: int
    held: dict[int, tuple[mx.array, ...]]


class SlidingCache(FullCache):
    """The newest ``window`` tokens: as in a full cache up to there, then a ring.

    In the ring the token of slot s lies at s modulo ``window``.
    """

    def __init__(self, window: int, capacity: int | None = None, kv: Quantization | None = None) -> None:
        super().__init__(min(capacity, window) if capacity else None, kv)
        self.window = window
        self._lost = 0  # tokens below this slot were written over at some time
        self._marks: list[Mark] = []  # the oldest first

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

    def reachable(self, length: int) -> int:
        length = min(length, self.length)
        if self._whole(length, self._lost):
            return length
        known = [(min(length, mark.length), mark.lost) for mark in self._marks]
        return max((found for found, lost in known if self._whole(found, lost)), default=0)

    def _whole(self, length: int, lost: int) -> bool:
        """Whether a token behind ``length`` finds the window - 1 before it, where those below ``lost`` are gone."""
        return max(0, length + 1 - self.window) >= lost

    def _go_back(self, length: int) -> None:
        if not self._whole(length, self._lost):
            fitting = [mark for mark in self._marks if mark.length >= length and self._whole(length, mark.lost)]
            newest = fitting[-1] if fitting else Mark(0, 0, {})
            self._lost, self._held = newest.lost, _handles(newest.held)
        self._marks = [mark for mark in self._marks if mark.length <= length]
        super()._go_back(length)

    def mark(self, keep: int) -> None:
        self._marks = [*self._marks, Mark(self.length, self._lost, _handles(self._held))][-keep:] if keep else []

    @property
    def mark_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(
            array.nbytes for mark in self._marks for parts in mark.held.values() for array in parts
        )


def _handles(held: dict[int, tuple[mx.array, ...]]) -> dict[int, tuple[mx.array, ...]]:
    """The same arrays under handles of their own: writing to one copies what the others share."""
    return {index: tuple(map(copy, parts)) for index, parts in held.items()}
