"""Caches whose arrays are replaced: states of fixed size, and those that grow by entries."""

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


@dataclass(frozen=True)
class EntrySizes:
    """Sizes of the entries that one compressor makes.

    Attributes:
        size: features of an entry.
        rate: tokens of an entry.
        width: numbers that are kept of a token until its entry is complete.
        overlap: whether the next entry needs the tokens of the last one as well.
    """

    size: int
    rate: int
    width: int
    overlap: bool

    def elements(self, length: int) -> int:
        """Numbers that are stored after ``length`` tokens."""
        entries, tokens = divmod(length, self.rate)
        if self.overlap and entries:
            tokens += self.rate
        return entries * self.size + tokens * self.width


@dataclass(frozen=True)
class CompressedSizes:
    """Sizes of the cache of one layer.

    Attributes:
        size: features of the vector of a token.
        window: newest tokens that a query sees; one less is stored.
        entries: sizes of each kind of entry.
    """

    size: int
    window: int
    entries: tuple[EntrySizes, ...]

    def elements(self, length: int) -> int:
        """Numbers that are stored after ``length`` tokens."""
        window = min(length, self.window - 1) * self.size
        return window + sum(entry.elements(length) for entry in self.entries)

    @property
    def elements_per_token(self) -> float:
        """Numbers by which the cache grows for each token of a long text."""
        return sum(entry.size / entry.rate for entry in self.entries)


class CompressedCache(StateCache):
    """Arrays of a layer that grow by an entry whenever a number of tokens is complete.

    They are replaced and never written in place, so that a snapshot costs no copy. Like a state
    they return to a snapshot only: an entry cannot be taken apart again.

    Attributes:
        state: arrays of each row of the batch, one row after the other; rows may hold different
            numbers of entries.
    """

    def __init__(self, sizes: CompressedSizes) -> None:
        super().__init__()
        self.sizes = sizes

    def row_states(self, rows: int) -> list[tuple[mx.array, ...]]:
        """Arrays of each of ``rows`` rows; empty before the first token."""
        size = len(self.state) // rows
        return [self.state[row * size : (row + 1) * size] for row in range(rows)]

    def bytes_at(self, length: int) -> int:
        return self.sizes.elements(length) * self.state[0].dtype.size

    def _has_shape(self, length: int, mine: mx.array, other: mx.array) -> bool:
        return mine.ndim == other.ndim and mine.shape[-1] == other.shape[-1]

    def can_restore(self, length: int, arrays: tuple[mx.array, ...]) -> bool:
        sizes = sum(array.size for array in arrays)
        return super().can_restore(length, arrays) and sizes == self.sizes.elements(length)
