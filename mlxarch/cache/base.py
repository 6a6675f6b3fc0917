"""What every cache offers a layer."""

from abc import ABC, abstractmethod

import mlx.core as mx

from mlxarch.cache.packed import Packed, pack
from mlxarch.packing import Quantization

Held = mx.array | Packed  # keys or values of one layer, (B, K, S, D)


class Cache(ABC):
    """The keys and values of one layer.

    A token's *slot* is its place in the row, padding included: the first token ever appended has slot 0. Its
    position is the slot less the row's padding.

    Args:
        kv: how keys and values are packed, as they are appended; None keeps them as they come.

    Attributes:
        length: tokens appended so far, also those that the cache has let go of.
        padding: tokens of padding on the left of each row (B,), None where there is none.
    """

    def __init__(self, kv: Quantization | None = None) -> None:
        self.length = 0
        self.padding: mx.array | None = None
        self.kv = kv
        self._held: dict[int, tuple[mx.array, ...]] = {}  # the parts of the keys, and of the values

    def append(self, keys: mx.array, values: mx.array) -> tuple[Held, Held]:
        """Take in the keys and values of new tokens, and return all that a new query may need.

        Shape:
            keys, values: (B, K, L, D) -> (B, K, S, D)
        """
        seen = self._take(keys, values)
        return seen[0], seen[1]

    def _take(self, *news: mx.array) -> list[Held]:
        seen: list[Held] = []
        for index, new in enumerate(news):
            packed = None if self.kv is None else pack(new, self.kv)
            parts = (new,) if packed is None else packed.parts
            pairs = [self._put(*pair) for pair in zip(self._held.get(index, (None,) * len(parts)), parts, strict=True)]
            self._held[index] = tuple(held for held, _ in pairs)
            found = tuple(found for _, found in pairs)
            seen.append(found[0] if packed is None else packed.of(found))
        self._advance(news[0].shape[2])
        return seen

    @abstractmethod
    def _put(self, held: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        """What is held, the new tokens (B, K, L, …) taken in, and all of it that their queries may see."""

    def _advance(self, length: int) -> None:
        self.length += length

    @abstractmethod
    def slots(self, length: int) -> mx.array:
        """Slots of the keys that ``append`` would return for ``length`` new tokens: (S,).

        They have no gap. For several new tokens they are in order; for one they may be in any.
        """

    def oldest(self, length: int) -> int:
        """The smallest of ``slots(length)``."""
        return 0

    @abstractmethod
    def truncate(self, length: int) -> bool:
        """Forget all but the first ``length`` tokens. Returns False, and changes nothing, where it cannot."""

    def arrays(self) -> list[mx.array]:
        """What must be evaluated for the cache to be up to date."""
        return [part for parts in self._held.values() for part in parts]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that it holds."""
        return sum(array.nbytes for array in self.arrays())
