"""KV cache that stores every token."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxarch.kv_cache.base import Cache
from mlxarch.quantization.scheme import Quantization

GROWTH = 256  # tokens; buffers have a multiple of it, so that most appends write in place


class FullCache(Cache):
    """KV cache of every token, in buffers that are allocated once or grow as needed.

    Args:
        capacity: tokens to allocate for at once; None grows as needed.
        kv: quantization of keys and values.
    """

    def __init__(self, capacity: int | None = None, kv: Quantization | None = None) -> None:
        super().__init__(kv)
        self._capacity = capacity or 0

    def _write(self, buffer: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        end = self.length + new.shape[2]
        if buffer is None or buffer.shape[2] < end:
            buffer = self._grow(buffer, new, self._buffer_length(end, buffer is not None))
        buffer[..., self.length : end, :] = new
        return buffer, buffer[..., :end, :]

    def append_by(
        self, shape: tuple[int, int, int, int], write: Callable[[int, mx.array, int], mx.array]
    ) -> list[mx.array]:
        """Append keys (0) and values (1) that ``write`` writes into their buffers.

        Args:
            shape: of the new keys and of the new values (B, K, L, D), in float32.
            write: called with the index, the buffer and the first new token in it; returns the
                buffer with the new tokens.

        Returns:
            The buffers (B, K, C, D), of which the first ``length`` tokens are set.
        """
        batch, heads, length, size = shape
        like = mx.zeros((batch, heads, 1, size))
        end = self.length + length
        written: list[mx.array] = []
        for index in range(2):
            [buffer] = self._buffers.get(index, (None,))
            if buffer is None or buffer.shape[2] < end:
                buffer = self._grow(buffer, like, self._buffer_length(end, buffer is not None))
            written.append(write(index, buffer, self.length))
        self._advance(length)  # first, as in ``_append``
        self._buffers = {**self._buffers, 0: (written[0],), 1: (written[1],)}
        return written

    def _buffer_length(self, end: int, grows: bool) -> int:
        """Number of tokens to allocate for when ``end`` tokens must fit."""
        if end <= self._capacity:
            return self._capacity
        # one eighth extra: copying everything every 256 tokens would make long contexts quadratic
        spare = end // 8 if grows else 0
        return -(-(end + spare) // GROWTH) * GROWTH

    def _grow(self, buffer: mx.array | None, like: mx.array, capacity: int) -> mx.array:
        """Allocate a buffer for ``capacity`` tokens that starts with the stored ones."""
        batch, heads, _, size = like.shape
        if buffer is None:
            return mx.zeros((batch, heads, capacity, size), like.dtype)
        spare = mx.zeros((batch, heads, capacity - self.length, size), like.dtype)
        return mx.concatenate([buffer[..., : self.length, :], spare], axis=2)

    @property
    def stores_all(self) -> bool:
        return True

    def cut(self, start: int, stop: int) -> tuple[mx.array, ...]:
        # a gather: a slice may share the memory of the buffer, and then neither could be written
        indices = mx.arange(start, stop)
        return tuple(mx.take(array, indices, axis=2) for array in self.arrays())

    def export(self) -> tuple[mx.array, ...]:
        return self.cut(0, self.length)

    def restore(self, length: int, parts: Sequence[tuple[mx.array, ...]]) -> None:
        spare = self._buffer_length(length + 1, grows=False) - length
        joined: list[mx.array] = []
        for arrays in zip(*parts, strict=True):
            batch, heads, _, size = arrays[0].shape
            zeros = mx.zeros((batch, heads, spare, size), arrays[0].dtype)
            joined.append(mx.concatenate([*arrays, zeros], axis=2))
        self._buffers = self._group(tuple(joined))
        self.length = length

    def _has_shape(self, length: int, mine: mx.array, other: mx.array) -> bool:
        batch, heads, _, size = mine.shape
        return other.ndim == 4 and other.shape == (batch, heads, self._stored(length, other), size)

    def _stored(self, length: int, other: mx.array) -> int:
        """Tokens that an array of a state after ``length`` tokens must have."""
        return length

    def bytes_at(self, length: int) -> int:
        token = sum(array.nbytes // array.shape[2] for array in self.arrays())
        return token * self._buffer_length(length, grows=length > GROWTH)

    def slots(self, length: int) -> mx.array:
        return mx.arange(self.length + length)
