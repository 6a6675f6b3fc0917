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
        packed = [None if self.kv is None else pack(new, self.kv) for new in news]
        parts = [(new,) if some is None else some.parts for new, some in zip(news, packed, strict=True)]
        held = [self._held.get(index, (None,) * len(some)) for index, some in enumerate(parts)]
        pairs = [[self._put(*pair) for pair in zip(*both, strict=True)] for both in zip(held, parts, strict=True)]
        # in this order, so that an interruption in between leaves nothing that passes for what it is not
        self._advance(news[0].shape[2])
        self._held = {index: tuple(kept for kept, _ in some) for index, some in enumerate(pairs)}
        seen = [tuple(found for _, found in some) for some in pairs]
        return [found[0] if some is None else some.of(found) for some, found in zip(packed, seen, strict=True)]

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

    def reachable(self, length: int) -> int:
        """The most tokens, of ``length`` at most, down to which it can forget: at worst none."""
        return min(length, self.length)

    def truncate(self, length: int) -> bool:
        """Forget all but the first ``length`` tokens. Returns False, and changes nothing, where it cannot."""
        if self.reachable(length) < min(length, self.length):
            return False
        self._go_back(min(length, self.length))
        return True

    def _go_back(self, length: int) -> None:
        self.length = length

    def mark(self, keep: int) -> None:
        """Remember what is held now, so that it stays reachable; the last ``keep`` marks are kept."""
        return  # a cache that lets go of nothing needs none

    @property
    def mark_bytes(self) -> int:
        """Bytes that a mark takes."""
        return 0

    def arrays(self) -> list[mx.array]:
        """What must be evaluated for the cache to be up to date."""
        return [part for parts in self._held.values() for part in parts]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that it holds."""
        return sum(array.nbytes for array in self.arrays())
