"""State that all layers share in one forward pass: positions of the queries, and masks."""

from collections.abc import Hashable, Sequence
from typing import Any, cast

import mlx.core as mx

from mlxarch.blocks.attention.blockwise import Mask
from mlxarch.blocks.attention.span import Span
from mlxarch.kv_cache import BatchedCache, BatchedStateCache, Cache, PerRow, RowCaches


class ForwardContext:
    """One forward pass over ``length`` new tokens.

    Attributes:
        length: L.
        padding: tokens of padding on the left of each row (B,); None without padding.
        offset: position of the first query; one for each row (B,) in a padded or ragged batch.
        shared: values that a layer passes on to later layers, under a key that both know.
    """

    def __init__(self, length: int, caches: Sequence[Cache | None] | None = None) -> None:
        first = next((cache for cache in caches or () if cache is not None), None)
        self.length = length
        self.shared: dict[Hashable, Any] = {}
        self._masks: dict[tuple[Span, type[Cache] | None], Mask] = {}
        self._rows: PerRow[ForwardContext] | None = None
        if isinstance(first, RowCaches):
            rows = tuple(ForwardContext(length, [cache]) for cache in first.rows)
            self._rows = PerRow(rows, first.batch)
            self.padding = None
            offsets = [cache.length for cache in first.rows]
            offsets += offsets[-1:] * (first.batch - len(rows))
            self.offset: int | mx.array = mx.array(offsets)
            return
        if isinstance(first, BatchedCache | BatchedStateCache):
            self.padding = None
            batch = first.batch
            self.offset = batch.lengths[0] if batch.are_equal else batch.offsets
            return
        cached = first.length if first else 0
        self.padding = first.padding if first else None
        self.offset = cached if self.padding is None else cached - self.padding

    @property
    def by_row(self) -> "ForwardContext | PerRow[ForwardContext]":
        """This context, or in a ragged batch one for each row."""
        return self._rows or self

    @property
    def positions(self) -> mx.array:
        """Positions of the queries, (L,) or (B, L) in a padded batch; negative ones are padding."""
        indices = mx.arange(self.length)
        if isinstance(self.offset, int):
            return self.offset + indices
        return self.offset[:, None] + indices

    def without_padding(self, x: mx.array) -> mx.array:
        """Set the features of padding tokens to zero: (B, L, …) -> the same."""
        if self.padding is None:
            return x
        real = (self.positions >= 0).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        return mx.where(real, x, mx.zeros((), x.dtype))

    def mask(self, span: Span, cache: Cache | None) -> Mask:
        """Mask of the keys that ``cache`` will return in this pass.

        Call it before the new keys are appended. Layers with equal spans share one mask.

        Shape:
            (L, S), or (B, 1, L, S) in a padded batch; "causal" or None where attention needs no
            array; in a ragged batch one of these for each row
        """
        if isinstance(cache, RowCaches) and self._rows:
            pairs = zip(self._rows.rows, cache.rows, strict=True)
            masks = tuple(context.mask(span, own) for context, own in pairs)
            return cast(Mask, PerRow(masks, cache.batch))
        key = (span, type(cache) if cache else None)
        if key not in self._masks:
            self._masks[key] = self._make_mask(span, cache)
        return self._masks[key]

    def _make_mask(self, span: Span, cache: Cache | None) -> Mask:
        if isinstance(self.offset, int):
            first = cache.oldest_slot(self.length) if cache else 0
            if span.is_plain_causal(first, self.offset + self.length - 1):
                return None if self.length == 1 else "causal"
        if isinstance(cache, BatchedCache):
            keys = cache.slots(self.length)[:, None]  # (B, 1, S)
            visible = span.is_visible(self.positions[..., None], keys) & (keys >= 0)
            return visible[:, None]
        keys = cache.slots(self.length) if cache else mx.arange(self.length)  # (S,)
        if self.padding is None:
            return span.is_visible(self.positions[:, None], keys)
        queries = self.positions[:, :, None]  # (B, L, 1)
        keys = keys - self.padding[:, None, None]  # (B, 1, S)
        visible = span.is_visible(queries, keys) & (keys >= 0)
        # a padding token attends to itself: a row without any key would be NaN, and NaN spreads
        return (visible | (keys == queries))[:, None]
