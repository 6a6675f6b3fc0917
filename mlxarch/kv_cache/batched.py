"""Caches of several rows in arrays that they share, so that one operation attends for all rows.

Place i of a shared array holds the tokens of one row, from index 0 on (in a sliding window as a
ring); a mask hides what lies behind its end. A row joins by a copy into a free place, and leaves by
a copy out of it. This takes memory for the longest row in every place, and saves the operations
that a cache for each row needs in every layer.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlxarch.errors import InvalidInput
from mlxarch.kv_cache.base import Cache
from mlxarch.kv_cache.full import GROWTH, FullCache
from mlxarch.kv_cache.latent import LatentCache
from mlxarch.kv_cache.sliding import SlidingCache
from mlxarch.kv_cache.state import StateCache
from mlxarch.quantization.scheme import Quantization


class BatchLengths:
    """Tokens in each place of a batch, and what the layers of one pass derive from them.

    Attributes:
        lengths: tokens of each place; in a free one as many as in the longest row.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._offsets: mx.array | None = None
        self._indices: dict[int | None, mx.array] = {}
        self._are_equal: bool | None = None

    def changed(self) -> None:
        """Forget what was derived from the lengths before."""
        self._offsets = None
        self._indices = {}
        self._are_equal = None

    @property
    def offsets(self) -> mx.array:
        """Position of the next token of each place (B,)."""
        if self._offsets is None:
            self._offsets = mx.array(self.lengths)
        return self._offsets

    @property
    def are_equal(self) -> bool:
        """Whether every place holds the same number of tokens."""
        if self._are_equal is None:
            self._are_equal = len(set(self.lengths)) == 1
        return self._are_equal

    def indices(self, window: int | None) -> mx.array:
        """Index (B, 1, 1, 1) at which each place stores its next token."""
        if window not in self._indices:
            at = self.offsets if window is None else self.offsets % window
            self._indices[window] = at.reshape(-1, 1, 1, 1)
        return self._indices[window]

    def visible(self, window: int | None) -> int:
        """Number of stored tokens to attend to, with the next one of the longest row."""
        end = max(self.lengths) + 1
        if not self.are_equal:  # a multiple, so that most passes have the shapes of the one before
            end = -(-end // GROWTH) * GROWTH
        return end if window is None else min(end, window)


class BatchedCache(FullCache):
    """Keys and values of one layer for all rows of a batch.

    Args:
        batch: lengths of the rows, which the layers share.
        window: tokens of a sliding window; None stores all.
        kv: quantization of keys and values.
    """

    def __init__(
        self, batch: BatchLengths, window: int | None = None, kv: Quantization | None = None
    ) -> None:
        super().__init__(kv=kv)
        self.batch = batch
        self.window = window

    def _write(self, buffer: mx.array | None, new: mx.array) -> tuple[mx.array, mx.array]:
        if buffer is None or new.shape[2] != 1:
            raise InvalidInput(f"a batch of rows takes one token a row, not {new.shape[2]}")
        if self.batch.are_equal:
            index = self.batch.lengths[0] % (self.window or buffer.shape[2])
            buffer[:, :, index : index + 1] = new
        else:
            at = self.batch.indices(self.window)
            buffer = mx.put_along_axis(buffer, at, new.astype(buffer.dtype), axis=2)
        return buffer, buffer[:, :, : self.batch.visible(self.window)]

    def _advance(self, length: int) -> None:
        return  # ``CacheBatch.advance`` counts for all layers

    def slots(self, length: int) -> mx.array:
        """Slots (B, S) of the visible keys; of one that is not stored negative or behind the end."""
        indices = mx.arange(self.batch.visible(self.window))
        if self.window is None:
            return mx.broadcast_to(indices, (len(self.batch.lengths), indices.size))
        ends = self.batch.offsets[:, None]
        return ends - (ends - indices) % self.window

    def oldest_slot(self, length: int) -> int:
        if self.window is None:
            return 0
        return max(0, max(self.batch.lengths) + 1 - self.window)

    @property
    def tokens(self) -> int:
        """Tokens for which each place has room."""
        return self.arrays()[0].shape[2] if self._buffers else 0

    def insert(self, place: int, row: Cache) -> None:
        """Copy the contents of a row's cache to a place."""
        arrays = row.arrays()
        if not self._buffers:
            empty = (mx.zeros((1, a.shape[1], 1, a.shape[3]), a.dtype) for a in arrays)
            self._buffers = self._group(tuple(empty))
            self.reserve(len(self.batch.lengths), _with_spare(row.length + 1))
        for array, new in zip(self.arrays(), arrays, strict=True):
            end = min(row.length, new.shape[2])
            array[place : place + 1, :, :end] = new[:, :, :end]

    def extract(self, place: int, row: Cache) -> None:
        """Copy the contents of a place to the cache of a row."""
        length = self.batch.lengths[place]
        end = length if self.window is None else min(self.tokens, self.window)
        index = mx.array([place])  # a gather: a slice would share the memory of the batch
        row.restore(length, [tuple(mx.take(a[:, :, :end], index, axis=0) for a in self.arrays())])

    def reserve(self, places: int, tokens: int) -> None:
        """Make room for so many places, and tokens in each; never makes it smaller."""
        length = tokens if self.window is None else min(tokens, self.window)
        self._buffers = self._group(tuple(_padded(a, places, length) for a in self.arrays()))

    def keep(self, places: Sequence[int]) -> None:
        """Keep only these places, in this order; several may be the same."""
        index = mx.array(list(places))
        self._buffers = self._group(tuple(mx.take(a, index, axis=0) for a in self.arrays()))


class BatchedLatentCache(BatchedCache, LatentCache):
    """Latents of one layer for all rows of a batch."""


class BatchedStateCache(StateCache):
    """States of one recurrent layer for all rows of a batch.

    Args:
        batch: lengths of the rows, which the layers share.
    """

    def __init__(self, batch: BatchLengths) -> None:
        super().__init__()
        self.batch = batch

    def _advance(self, length: int) -> None:
        return  # ``CacheBatch.advance`` counts for all layers

    def insert(self, place: int, row: Cache) -> None:
        """Copy the state of a row to a place."""
        if not self.state:
            self.state = tuple(
                mx.zeros((len(self.batch.lengths), *a.shape[1:]), a.dtype) for a in row.arrays()
            )
        for array, new in zip(self.state, row.arrays(), strict=True):
            array[place : place + 1] = new

    def extract(self, place: int, row: Cache) -> None:
        """Copy the state of a place to the cache of a row."""
        index = mx.array([place])
        state = tuple(mx.take(array, index, axis=0) for array in self.state)
        row.restore(self.batch.lengths[place], [state])

    def reserve(self, places: int, tokens: int) -> None:
        """Make room for so many places; a state does not grow with its tokens."""
        self.state = tuple(_padded(array, places, None) for array in self.state)

    def keep(self, places: Sequence[int]) -> None:
        """Keep only these places, in this order; several may be the same."""
        index = mx.array(list(places))
        self.state = tuple(mx.take(array, index, axis=0) for array in self.state)


BatchedLayer = BatchedCache | BatchedStateCache
RowLayers = list[Cache | None]
"""Caches of one row, one for each layer."""


class CacheBatch:
    """Rows whose caches are in shared arrays while they decode together.

    While a row is in the batch, its own caches are out of date; ``release`` brings them up to date.

    Attributes:
        layers: cache of each layer for all rows, in place of a ``Cache``.
    """

    def __init__(self) -> None:
        self.layers: list[BatchedLayer | None] = []
        self._lengths = BatchLengths()
        self._rows: list[RowLayers | None] = []  # the row in each place; None in a free one

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(layer.nbytes for layer in self.layers if layer is not None)

    @property
    def rows(self) -> list[RowLayers]:
        """The rows of the batch."""
        return [row for row in self._rows if row is not None]

    def place(self, row: RowLayers) -> int | None:
        """Place of a row; None if it is not in the batch."""
        return next((i for i, other in enumerate(self._rows) if other is row), None)

    def arrange(self, rows: Sequence[RowLayers], places: int) -> list[int]:
        """Let these rows, and no others, be in a batch with so many places.

        Args:
            rows: rows to be in the batch; those that come new must hold at least one token.
            places: at least as many as there are rows.

        Returns:
            Place of each row.
        """
        for index, row in enumerate(self._rows):
            if row is not None and not any(row is other for other in rows):
                self._free(index)
        self._resize(places)
        found: list[int] = []
        for row in rows:
            place = self.place(row)
            found.append(self._join(row) if place is None else place)
        lengths = self._lengths.lengths
        longest = max(n for n, row in zip(lengths, self._rows, strict=True) if row is not None)
        for place, row in enumerate(self._rows):
            if row is None:  # computed as well: with another length the batch would need a mask
                lengths[place] = longest
        for layer in self.layers:
            if isinstance(layer, BatchedCache) and layer.tokens <= longest:
                layer.reserve(places, _with_spare(longest + 1))
        self._lengths.changed()
        return found

    def advance(self) -> None:
        """Count the token that a pass has appended to each row."""
        self._lengths.lengths = [length + 1 for length in self._lengths.lengths]
        self._lengths.changed()

    def release(self, row: RowLayers) -> None:
        """Take a row out of the batch, and bring its own caches up to date."""
        place = self.place(row)
        if place is None:
            return
        for layer, own in zip(self.layers, row, strict=True):
            if layer is not None and own is not None:
                layer.extract(place, own)
        # at once: the next write would otherwise have to copy what is still to be read
        mx.eval([cache.arrays() for cache in row if cache is not None])
        self._free(place)

    def discard(self, row: RowLayers) -> None:
        """Take a row out of the batch whose caches nobody needs any more."""
        place = self.place(row)
        if place is not None:
            self._free(place)

    def clear(self) -> None:
        """Release every row and the shared arrays."""
        for row in self.rows:
            self.release(row)
        self.layers = []
        self._rows = []
        self._lengths.lengths = []

    def _free(self, place: int) -> None:
        self._rows[place] = None

    def _resize(self, places: int) -> None:
        """Change the number of places; rows move to the front if there are fewer."""
        have = len(self._rows)
        if places < have:
            used = [index for index, row in enumerate(self._rows) if row is not None]
            free = [index for index, row in enumerate(self._rows) if row is None]
            kept = [*used, *free][:places]
            for layer in self.layers:
                if layer is not None:
                    layer.keep(kept)
            self._rows = [self._rows[index] for index in kept]
            self._lengths.lengths = [self._lengths.lengths[index] for index in kept]
        elif places > have:
            self._rows += [None] * (places - have)
            self._lengths.lengths += [0] * (places - have)
            for layer in self.layers:
                if layer is not None:
                    layer.reserve(places, 0)

    def _join(self, row: RowLayers) -> int:
        """Copy the caches of a row to a free place; gives the place."""
        place = self._rows.index(None)
        self._rows[place] = row
        length = next(cache.length for cache in row if cache is not None)
        self._lengths.lengths[place] = length
        if not self.layers:
            self.layers = [_batched(cache, self._lengths) for cache in row]
        for layer, own in zip(self.layers, row, strict=True):
            if layer is None or own is None:
                continue
            if isinstance(layer, BatchedCache) and 0 < layer.tokens <= length:
                layer.reserve(len(self._rows), _with_spare(length + 1))
            layer.insert(place, own)
            own.drop_arrays()
        return place


def can_batch(row: RowLayers) -> bool:
    """Whether the caches of a row are of kinds that ``CacheBatch`` knows: none with records."""
    known = (FullCache, LatentCache, SlidingCache, StateCache)
    return all(cache is None or type(cache) in known for cache in row)


def _batched(cache: Cache | None, lengths: BatchLengths) -> BatchedLayer | None:
    """An empty cache for a batch of rows with caches like this one."""
    if cache is None:
        return None
    if isinstance(cache, StateCache):
        return BatchedStateCache(lengths)
    if isinstance(cache, LatentCache):
        return BatchedLatentCache(lengths, kv=cache.kv)
    window = cache.window if isinstance(cache, SlidingCache) else None
    return BatchedCache(lengths, window, cache.kv)


def _with_spare(tokens: int) -> int:
    """Number of tokens to allocate for, so that a batch is not copied every few tokens."""
    return -(-(tokens + tokens // 8) // GROWTH) * GROWTH


def _padded(array: mx.array, places: int, tokens: int | None) -> mx.array:
    """Append zeros, up to so many places (axis 0) and tokens (axis 2; None leaves that as it is)."""
    more_tokens = 0 if tokens is None else max(tokens - array.shape[2], 0)
    widths = [(0, 0)] * array.ndim
    widths[0] = (0, max(places - array.shape[0], 0))
    if more_tokens:
        widths[2] = (0, more_tokens)
    return mx.pad(array, widths) if any(after for _, after in widths) else array
