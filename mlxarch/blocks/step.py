"""What all layers share in one forward pass: where the queries stand, and who may see whom."""

from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx

from mlxarch.blocks.scores import Mask
from mlxarch.blocks.span import Span
from mlxarch.cache import Cache


class Step:
    """One forward pass over ``length`` new tokens.

    Attributes:
        shared: keys and values that a later layer takes from an earlier one, by whatever name the two agree on.
        offset: position of the first query; one for each row (B,) where rows are padded on the left.
        positions: of all queries, (L,) or (B, L); negative ones are padding.
    """

    def __init__(self, length: int, caches: Sequence[Cache | None] | None = None) -> None:
        first = next((cache for cache in caches or () if cache is not None), None)
        held = first.length if first else 0
        self.length, self.padding = length, first.padding if first else None
        self.offset: int | mx.array = held if self.padding is None else held - self.padding
        self.shared: dict[Hashable, Any] = {}
        self._masks: dict[tuple[Span, type[Cache] | None], Mask] = {}

    @property
    def positions(self) -> mx.array:
        """Of the queries: (L,), or (B, L) in a padded batch."""
        steps = mx.arange(self.length)
        return self.offset + steps if isinstance(self.offset, int) else self.offset[:, None] + steps

    def mask(self, span: Span, cache: Cache | None) -> Mask:
        """Which of the keys that ``cache`` will hold after this pass its queries may see.

        Ask before the new keys are appended. Layers with the same span share one mask.

        Shape:
            (L, S), or (B, 1, L, S) in a padded batch; "causal" or None where attention needs no array
        """
        shared = (span, type(cache) if cache else None)
        if shared not in self._masks:
            self._masks[shared] = self._mask(span, cache)
        return self._masks[shared]

    def _mask(self, span: Span, cache: Cache | None) -> Mask:
        if self.padding is None:
            first, last = (cache.oldest(self.length), cache.length) if cache else (0, 0)
            if span.sees_all(first, last + self.length - 1):
                return None if self.length == 1 else "causal"
        keys = cache.slots(self.length) if cache else mx.arange(self.length)  # (S,)
        if self.padding is None:
            return span.sees(self.positions[:, None], keys)
        queries = self.positions[:, :, None]  # (B, L, 1)
        keys = keys - self.padding[:, None, None]  # (B, 1, S)
        # a padding token sees itself: a row without any key would be NaN, and NaN spreads through the values
        return (span.sees(queries, keys) & (keys >= 0) | (keys == queries))[:, None]
