"""Cache of a layer that folds all earlier tokens into a state of fixed size."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxarch.errors import InvalidInput
from mlxarch.kv_cache.base import Cache


@dataclass(frozen=True)
class SavedState:
    """State of a layer after ``length`` tokens."""

    length: int
    arrays: tuple[mx.array, ...]


class StateCache(Cache):
    """State of a recurrent layer, and the last inputs of its convolution.

    A state cannot lose a token again: ``truncate`` returns to a snapshot, or to the empty state. A
    new state replaces the old one and is never written in place, so a snapshot costs no copy. States
    are not quantized, because their rounding errors would accumulate.

    Attributes:
        state: arrays after ``length`` tokens, the batch in front; empty before the first token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: tuple[mx.array, ...] = ()
        self._snapshots: list[SavedState] = []  # oldest first

    def update(self, length: int, *state: mx.array) -> None:
        """Replace the state by the one after ``length`` more tokens."""
        self.state = state
        self._advance(length)

    def _write(self, buffer: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        raise InvalidInput("a recurrent layer keeps a state, not keys and values")

    def slots(self, length: int) -> mx.array:
        return mx.arange(self.length + length)

    def restore(self, length: int, parts: Sequence[tuple[mx.array, ...]]) -> None:
        [self.state] = parts
        self._snapshots = []
        self.length = length

    def drop_arrays(self) -> None:
        self.state = ()
        self._snapshots = []

    def truncatable_length(self, length: int) -> int:
        if length >= self.length:
            return self.length
        return max((saved.length for saved in self._snapshots if saved.length <= length), default=0)

    def _roll_back(self, length: int) -> None:
        if length < self.length:
            # ``truncate`` asks only for lengths at which a snapshot was taken, or for none
            saved = {saved.length: saved.arrays for saved in self._snapshots}
            self.state = saved.get(length, ())
        self._snapshots = [saved for saved in self._snapshots if saved.length <= length]
        super()._roll_back(length)

    def snapshot(self, keep: int) -> None:
        if not keep:
            self._snapshots = []
            return
        earlier = [saved for saved in self._snapshots if saved.length < self.length]
        self._snapshots = [*earlier, SavedState(self.length, self.state)][-keep:]

    def state_bytes(self, float32_states: int, float_bytes: int) -> int:
        """Bytes of the state where floats have ``float_bytes``, but the first arrays four."""
        sizes = [array.size for array in self.state]
        return 4 * sum(sizes[:float32_states]) + float_bytes * sum(sizes[float32_states:])

    @property
    def snapshot_bytes(self) -> int:
        return sum(array.nbytes for array in self.state)

    def arrays(self) -> list[mx.array]:
        return list(self.state)

    @property
    def nbytes(self) -> int:
        saved = [array for snapshot in self._snapshots for array in snapshot.arrays]
        return super().nbytes + sum(array.nbytes for array in saved)
