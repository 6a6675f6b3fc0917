"""Interface of a KV cache: append keys and values, truncate, take snapshots.

``Cache`` implements everything that does not depend on which tokens are kept; a subclass decides
that in ``_write``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy

import mlx.core as mx

from mlxarch.kv_cache.quantized import QuantizedVectors, quantize_vectors
from mlxarch.quantization.scheme import Quantization

QUANTIZED_ARRAYS = 3  # packed codes, scales, biases
KVArray = mx.array | QuantizedVectors
"""Keys or values of one layer, (B, K, S, D)."""


class Cache(ABC):
    """Keys and values of one layer.

    A token's *slot* is its index in the row, padding included: the first token ever appended has
    slot 0. Its position is the slot minus the padding of the row.

    Args:
        kv: quantization of keys and values, applied as they are appended; None stores them as they
            are.

    Attributes:
        length: tokens appended so far, including those that are no longer stored.
        padding: tokens of padding on the left of each row (B,); None without padding.
    """

    def __init__(self, kv: Quantization | None = None) -> None:
        self.length = 0
        self.padding: mx.array | None = None
        self.kv = kv
        # stored arrays of the keys (0), of the values (1) and of further vectors: one array, or
        # weight, scales and biases
        self._buffers: dict[int, tuple[mx.array, ...]] = {}

    @property
    def parts(self) -> "tuple[Cache, ...]":
        """Caches of the token mixers of the layer: this one, unless several run in parallel."""
        return (self,)

    def append(self, keys: mx.array, values: mx.array, *others: mx.array) -> tuple[KVArray, ...]:
        """Append the keys and values of new tokens; return all that the new queries may attend to.

        Args:
            others: further vectors of each token, such as the keys of an indexer.

        Shape:
            keys, values, others: (B, K, L, D) -> (B, K, S, D)
        """
        return tuple(self._append(keys, values, *others))

    def _append(self, *tensors: mx.array) -> list[KVArray]:
        """Append vectors of new tokens, one after the other; return the visible vectors of each."""
        buffers: dict[int, tuple[mx.array, ...]] = {}
        visible: list[KVArray] = []
        for index, tensor in enumerate(tensors):
            if self.kv is None:
                buffer, found = self._write(self._buffers.get(index, (None,))[0], tensor)
                buffers[index] = (buffer,)
                visible.append(found)
                continue
            quantized = quantize_vectors(tensor, self.kv)
            stored = self._buffers.get(index, (None,) * QUANTIZED_ARRAYS)
            written = [self._write(*pair) for pair in zip(stored, quantized.arrays, strict=True)]
            buffers[index] = tuple(buffer for buffer, _ in written)
            visible.append(quantized.with_arrays(tuple(array for _, array in written)))
        # length first: if interrupted in between, no overwritten token counts as stored
        self._advance(tensors[0].shape[2])
        self._buffers = {**self._buffers, **buffers}
        return visible

    @abstractmethod
    def _write(self, buffer: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        """Write new tokens (B, K, L, …) into ``buffer``.

        Returns:
            The buffer, and the part of it (B, K, S, …) that the new queries may attend to.
        """

    def _advance(self, length: int) -> None:
        self.length += length

    @abstractmethod
    def slots(self, length: int) -> mx.array:
        """Slots (S,) of the keys that ``append`` would return for ``length`` new tokens.

        They have no gaps. They are sorted for several new tokens, but not always for a single one.
        """

    def oldest_slot(self, length: int) -> int:
        """Minimum of ``slots(length)``."""
        return 0

    def truncatable_length(self, length: int) -> int:
        """Largest number of tokens, at most ``length``, to which ``truncate`` can go back."""
        return min(length, self.length)

    def truncate(self, length: int) -> bool:
        """Discard all but the first ``length`` tokens.

        Returns:
            False if the cache cannot, because it no longer stores the tokens; nothing changes then.
        """
        if self.truncatable_length(length) < min(length, self.length):
            return False
        self._roll_back(min(length, self.length))
        return True

    def _roll_back(self, length: int) -> None:
        self.length = length

    def snapshot(self, keep: int) -> None:
        """Save the current state, so that ``truncate`` can return to it; keep the last ``keep``."""
        return  # a cache that stores every token needs none

    @property
    def snapshot_bytes(self) -> int:
        """Size of one snapshot in bytes."""
        return 0

    @property
    def stores_all(self) -> bool:
        """Whether every token is stored, so that ``cut`` can copy any range of them."""
        return False

    def cut(self, start: int, stop: int) -> tuple[mx.array, ...]:
        """Copy what is stored of the tokens from ``start`` to ``stop``; needs ``stores_all``."""
        raise NotImplementedError

    def export(self) -> tuple[mx.array, ...]:
        """Arrays that hold the present state; later tokens do not change them."""
        return tuple(map(copy, self.arrays()))

    def restore(self, length: int, parts: Sequence[tuple[mx.array, ...]]) -> None:
        """Take the state after ``length`` tokens.

        Args:
            parts: a result of ``export``; with ``stores_all`` also results of ``cut`` that follow
                one another from the first token on.
        """
        [arrays] = parts
        self._buffers = self._group(tuple(map(copy, arrays)))
        self.length = length

    def can_restore(self, length: int, arrays: tuple[mx.array, ...]) -> bool:
        """Whether arrays from elsewhere are a state after ``length`` tokens, by types and shapes.

        This cache must hold at least one token, to compare with.
        """
        own = self.arrays()
        return len(own) == len(arrays) and all(
            mine.dtype == other.dtype and self._has_shape(length, mine, other)
            for mine, other in zip(own, arrays, strict=True)
        )

    def _has_shape(self, length: int, mine: mx.array, other: mx.array) -> bool:
        return mine.shape == other.shape

    def _group(self, arrays: tuple[mx.array, ...]) -> dict[int, tuple[mx.array, ...]]:
        """Arrays of an export, by keys (0), values (1) and further vectors."""
        size = 1 if self.kv is None else QUANTIZED_ARRAYS
        starts = range(0, len(arrays), size)
        return {index: arrays[start : start + size] for index, start in enumerate(starts)}

    def drop_arrays(self) -> None:
        """Drop the stored arrays, of which another cache has a copy; ``restore`` brings them back."""
        self._buffers = {}

    def bytes_at(self, length: int) -> int:
        """Bytes that are allocated once ``length`` tokens have been appended one after the other.

        Known from the first append on.
        """
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> list[mx.array]:
        """Arrays to evaluate so that the cache is up to date."""
        return [array for _, arrays in sorted(self._buffers.items()) for array in arrays]

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(array.nbytes for array in self.arrays())


def evaluate_caches(caches: Sequence[Cache | None], *others: mx.array) -> None:
    """Evaluate the contents of the caches and ``others``, and nothing else."""
    mx.eval([cache.arrays() for cache in caches if cache is not None], others)
