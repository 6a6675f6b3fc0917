"""Caches of several rows with different numbers of tokens (a ragged batch), and calls row by row.

The rows of a batch run through linear layers and experts together, and each attends to a cache of
its own. No row needs padding or masks for the others, and rows join and leave without a copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import mlx.core as mx

from mlxarch.kv_cache.base import Cache, KVArray
from mlxarch.kv_cache.state import StateCache

T = TypeVar("T")


@dataclass(frozen=True)
class PerRow(Generic[T]):
    """One value for each row of a ragged batch, in place of one for all rows.

    Attributes:
        rows: the values.
        batch: rows of the arrays that they belong to; those beyond ``rows`` are copies of the last
            one, which only fill up the batch.
    """

    rows: tuple[T, ...]
    batch: int


class RowCaches:
    """Caches of one layer for the rows of a ragged batch; takes the place of a ``Cache``.

    Attributes:
        rows: cache of each row, of batch size 1.
        batch: rows of the batch; those beyond ``rows`` are copies of the last one.
    """

    def __init__(self, rows: Sequence[Cache], batch: int) -> None:
        self.rows = tuple(rows)
        self.batch = batch

    def append(self, *vectors: mx.array) -> tuple[KVArray, ...]:
        """Append the new tokens of each row to its cache: keys, values and further vectors.

        Shape:
            vectors: (B, K, L, D) -> for each row (1, K, S, D)
        """
        new = zip(self.rows, *(mx.split(array, self.batch) for array in vectors), strict=False)
        appended = [cache.append(*arrays) for cache, *arrays in new]
        visible = (PerRow(tuple(arrays), self.batch) for arrays in zip(*appended, strict=True))
        return cast("tuple[KVArray, ...]", tuple(visible))

    @property
    def parts(self) -> tuple[Cache, ...]:
        """Caches of the token mixers of the layer, each of all rows."""
        columns = zip(*(cache.parts for cache in self.rows), strict=True)
        return tuple(cast(Cache, RowCaches(column, self.batch)) for column in columns)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """States of all rows, each after at least one token: arrays with the batch in front."""
        states = [cast(StateCache, cache).state for cache in self.rows]
        states += states[-1:] * (self.batch - len(states))
        return tuple(mx.concatenate(list(arrays)) for arrays in zip(*states, strict=True))

    def update(self, length: int, *state: mx.array) -> None:
        """Replace the state of each row by the one after ``length`` more tokens."""
        columns = [mx.split(array, self.batch) for array in state]
        for cache, *arrays in zip(self.rows, *columns, strict=False):
            cast(StateCache, cache).update(length, *arrays)


def join_rows(rows: Sequence[Sequence[Cache | None]], batch: int) -> list[Cache | None]:
    """Join the caches of several rows, each with one cache for each layer, to those of a batch.

    Args:
        batch: rows of the batch, at least as many as ``rows``.
    """
    layers: list[Cache | None] = []
    for caches in zip(*rows, strict=True):
        own = [cache for cache in caches if cache is not None]
        layers.append(cast(Cache, RowCaches(own, batch)) if own else None)
    return layers


def by_row(function: Callable[..., mx.array], *arguments: Any) -> mx.array:
    """Call a function once for each row if an argument is ``PerRow``, and join the results.

    Args:
        arguments: arrays, of which each call gets one row, and values that differ by row.
    """
    first = next((value for value in arguments if isinstance(value, PerRow)), None)
    if first is None:
        return function(*arguments)
    columns = [
        value.rows if isinstance(value, PerRow) else mx.split(value, first.batch)
        for value in arguments
    ]
    results = [function(*row) for row in zip(*columns, strict=False)]
    results += results[-1:] * (first.batch - len(results))
    return results[0] if len(results) == 1 else mx.concatenate(results)
