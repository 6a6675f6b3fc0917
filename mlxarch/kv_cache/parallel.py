"""Cache of a layer in which a recurrence and attention run beside each other."""

from collections.abc import Sequence

import mlx.core as mx

from mlxarch.errors import InvalidInput
from mlxarch.kv_cache.base import QUANTIZED_ARRAYS, Cache
from mlxarch.kv_cache.state import StateCache


class ParallelCache(Cache):
    """A state, and keys and values, of the same tokens.

    Args:
        state: cache of the recurrence, which runs first.
        keys_values: cache of attention.

    Attributes:
        parts: both caches, for the two halves of the layer.
    """

    def __init__(self, state: StateCache, keys_values: Cache) -> None:
        self.state_cache = state
        self.keys_values = keys_values
        self.kv = keys_values.kv
        self.padding = None

    @property
    def parts(self) -> tuple[Cache, ...]:
        return self.state_cache, self.keys_values

    @property
    def length(self) -> int:
        """Tokens appended so far."""
        return self.keys_values.length

    @length.setter
    def length(self, value: int) -> None:
        for part in self.parts:
            part.length = value

    def _write(self, buffer: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        raise InvalidInput("the parts of the cache are written, not the whole")

    def slots(self, length: int) -> mx.array:
        return self.keys_values.slots(length)

    def oldest_slot(self, length: int) -> int:
        return self.keys_values.oldest_slot(length)

    def truncatable_length(self, length: int) -> int:
        length = min(length, *(part.length for part in self.parts))
        while True:
            shortest = min(part.truncatable_length(length) for part in self.parts)
            if shortest >= length:
                return length
            length = shortest

    def truncate(self, length: int) -> bool:
        longest = max(part.length for part in self.parts)  # unequal after an interrupted pass
        if self.truncatable_length(length) < min(length, longest):
            return False
        for part in self.parts:
            part.truncate(length)
        return True

    def snapshot(self, keep: int) -> None:
        for part in self.parts:
            part.snapshot(keep)

    @property
    def snapshot_bytes(self) -> int:
        return sum(part.snapshot_bytes for part in self.parts)

    def _split(self, arrays: tuple[mx.array, ...]) -> tuple[tuple[mx.array, ...], ...]:
        """Arrays of an export, for each part: keys and values are last."""
        count = 2 * (1 if self.kv is None else QUANTIZED_ARRAYS)
        return arrays[:-count], arrays[-count:]

    def export(self) -> tuple[mx.array, ...]:
        return tuple(array for part in self.parts for array in part.export())

    def restore(self, length: int, parts: Sequence[tuple[mx.array, ...]]) -> None:
        [arrays] = parts
        for part, own in zip(self.parts, self._split(arrays), strict=True):
            part.restore(length, [own])

    def can_restore(self, length: int, arrays: tuple[mx.array, ...]) -> bool:
        pairs = zip(self.parts, self._split(arrays), strict=True)
        return all(part.can_restore(length, own) for part, own in pairs)

    def bytes_at(self, length: int) -> int:
        return sum(part.bytes_at(length) for part in self.parts)

    def arrays(self) -> list[mx.array]:
        return [array for part in self.parts for array in part.arrays()]

    def drop_arrays(self) -> None:
        for part in self.parts:
            part.drop_arrays()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)
