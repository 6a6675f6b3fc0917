"""What every cache offers a layer."""

from abc import ABC, abstractmethod

import mlx.core as mx


class Cache(ABC):
    """The keys and values of one layer.

    A token's *slot* is its place in the row, padding included: the first token ever appended has slot 0. Its
    position is the slot less the row's padding.

    Attributes:
        length: tokens appended so far, also those that the cache has let go of.
        padding: tokens of padding on the left of each row (B,), None where there is none.
    """

    def __init__(self) -> None:
        self.length = 0
        self.padding: mx.array | None = None

    @abstractmethod
    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in the keys and values of new tokens, and return all that a new query may need.

        Shape:
            keys, values: (B, K, L, D) -> (B, K, S, D)
        """

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

    @abstractmethod
    def arrays(self) -> list[mx.array]:
        """What must be evaluated for the cache to be up to date."""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that it holds."""
        return sum(array.nbytes for array in self.arrays())
