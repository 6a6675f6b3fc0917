"""KV cache of a sliding window: stores the newest tokens only, in a ring buffer."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import mlx.core as mx

from mlxarch.kv_cache.full import FullCache
from mlxarch.quantization.scheme import Quantization


@dataclass(frozen=True)
class Snapshot:
    """Saved state of a ring buffer.

    Attributes:
        length: tokens appended when the snapshot was taken.
        overwritten: slots below this one had been overwritten.
        buffers: stored arrays of keys and values.
    """

    length: int
    overwritten: int
    buffers: dict[int, tuple[mx.array, ...]]


class SlidingCache(FullCache):
    """KV cache of the newest ``window`` tokens.

    Up to ``window`` tokens it works like FullCache. Beyond that the buffer is a ring: the token of
    slot s is stored at index s modulo ``window``.
    """

    def __init__(
        self, window: int, capacity: int | None = None, kv: Quantization | None = None
    ) -> None:
        super().__init__(min(capacity, window) if capacity else None, kv)
        self.window = window
        self._overwritten = 0  # slots below this one have been overwritten at some time
        self._snapshots: list[Snapshot] = []  # oldest first

    def _buffer_length(self, end: int, grows: bool) -> int:
        return min(super()._buffer_length(end, grows), self.window)

    def _advance(self, length: int) -> None:
        super()._advance(length)
        self._overwritten = max(self._overwritten, self.length - self.window)

    def _write(self, buffer: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        length = new.shape[2]
        end = self.length + length
        if end <= self.window:
            return super()._write(buffer, new)
        if buffer is None or buffer.shape[2] < self.window:
            buffer = self._grow(buffer, new, self.window)
        start = self.length % self.window
        if length == 1:
            buffer[..., start : start + 1, :] = new
            return buffer, buffer
        in_order = buffer[..., :start, :]  # everything, as long as the ring has not wrapped around
        if self.length >= self.window:
            in_order = mx.concatenate([buffer[..., start:, :], in_order], axis=2)
        first = in_order.shape[2] - self._visible_tokens()
        visible = mx.concatenate([in_order[..., first:, :], new], axis=2)
        newest = visible[..., -self.window :, :]
        shift = self.window - end % self.window  # so that slot s is at s modulo window again
        ring = mx.concatenate([newest[..., shift:, :], newest[..., :shift, :]], axis=2)
        return ring, visible

    def _visible_tokens(self) -> int:
        """Number of stored tokens that the first of several new queries may attend to."""
        return min(self.length, self.window - 1)

    def oldest_slot(self, length: int) -> int:
        if length == 1:
            return max(0, self.length + 1 - self.window)
        return self.length - self._visible_tokens()

    @property
    def stores_all(self) -> bool:
        return False

    def export(self) -> tuple[mx.array, ...]:
        return tuple(map(copy, self.arrays()))

    def restore(self, length: int, parts: Sequence[tuple[mx.array, ...]]) -> None:
        [arrays] = parts
        self._buffers = self._group(tuple(map(copy, arrays)))
        self._overwritten = max(0, length - self.window)
        self._snapshots = []
        self.length = length

    def drop_arrays(self) -> None:
        super().drop_arrays()
        self._snapshots = []

    def slots(self, length: int) -> mx.array:
        if length > 1 or self.length < self.window:
            return mx.arange(self.oldest_slot(length), self.length + length)
        indices = mx.arange(self.window)
        return self.length - (self.length - indices) % self.window

    def _stored(self, length: int, other: mx.array) -> int:
        # a buffer that has not wrapped around may have room for more
        return min(max(other.shape[2], length), self.window)

    def truncatable_length(self, length: int) -> int:
        length = min(length, self.length)
        if self._has_window(length, self._overwritten):
            return length
        candidates = [(min(length, saved.length), saved.overwritten) for saved in self._snapshots]
        return max(
            (end for end, overwritten in candidates if self._has_window(end, overwritten)),
            default=0,
        )

    def _has_window(self, length: int, overwritten: int) -> bool:
        """Whether the window - 1 tokens before slot ``length`` are stored.

        Slots below ``overwritten`` are not.
        """
        return max(0, length + 1 - self.window) >= overwritten

    def _roll_back(self, length: int) -> None:
        if not self._has_window(length, self._overwritten):
            usable = [
                saved
                for saved in self._snapshots
                if saved.length >= length and self._has_window(length, saved.overwritten)
            ]
            newest = usable[-1] if usable else Snapshot(0, 0, {})
            self._overwritten = newest.overwritten
            self._buffers = _copy_handles(newest.buffers)
        self._snapshots = [saved for saved in self._snapshots if saved.length <= length]
        super()._roll_back(length)

    def snapshot(self, keep: int) -> None:
        if not keep:
            self._snapshots = []
            return
        current = Snapshot(self.length, self._overwritten, _copy_handles(self._buffers))
        self._snapshots = [*self._snapshots, current][-keep:]

    @property
    def snapshot_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    @property
    def nbytes(self) -> int:
        saved = sum(
            array.nbytes
            for snapshot in self._snapshots
            for arrays in snapshot.buffers.values()
            for array in arrays
        )
        return super().nbytes + saved


def _copy_handles(buffers: dict[int, tuple[mx.array, ...]]) -> dict[int, tuple[mx.array, ...]]:
    """Give the arrays handles of their own, so that MLX copies them on the next write."""
    return {index: tuple(map(copy, arrays)) for index, arrays in buffers.items()}
