"""LongRoPE (arXiv:2402.13753): other frequencies for texts that exceed the original context.

A text up to the original context has the short factors at all of its positions, a longer one has the
long factors at all of them, as in transformers. So a conversation that grows beyond the original
context, or shrinks back, is read again with the other factors: the caches keep the ids of its tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlxarch.blocks.attention.attention import Attention
from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.attention.span import Sliding
from mlxarch.blocks.config import ORIGINAL_CONTEXT
from mlxarch.blocks.decoder import CausalLM
from mlxarch.blocks.rope import RoPE, RoPEConfig
from mlxarch.errors import ConfigError
from mlxarch.kv_cache import Cache, RowCaches
from mlxarch.kv_cache.base import evaluate_caches
from mlxarch.kv_cache.recording import RecordingCache, RecordingSlidingCache
from mlxarch.quantization.scheme import Quantization

REREAD_CHUNK = 512  # tokens that are read again at once
IS_LONG = "the rows of a pass that are longer than the original context"  # in ForwardContext.shared


class LongRoPE(RoPE):
    """RoPE whose frequencies are divided by short or long factors, one for each pair of features.

    Queries and keys grow by sqrt(1 + ln(factor) / ln(original context)), where the factor is that
    by which the context was extended, unless the config has an ``attention_factor``.

    Args:
        dims: features of a head that are rotated.
        config: base, ``short_factor``, ``long_factor`` and both contexts.
        context: tokens that the model is made for.

    Shape:
        x: (B, heads, L, D) -> the same; offset: position of the first query, an int or one per row
        (B,); long: whether the long factors apply, or that for each row (B, 1, 1, 1)

    Raises:
        ConfigError: a list of factors is missing or has another length.
    """

    def __init__(self, dims: int, config: RoPEConfig, context: int) -> None:
        super().__init__(dims, RoPEConfig(config.theta))
        self.config = config
        self.original = config.number(ORIGINAL_CONTEXT)
        factor = context / self.original
        grown = math.sqrt(1 + math.log(max(factor, 1)) / math.log(self.original))
        self.factor = config.number("attention_factor", grown)
        periods = config.theta ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
        self._freqs = mx.array((periods * self._factors("short_factor")).astype(np.float32))
        self._long_freqs = mx.array((periods * self._factors("long_factor")).astype(np.float32))

    def _factors(self, key: str) -> np.ndarray:
        factors = self.config.scaling.get(key)
        count = self.dims // 2
        if (
            not isinstance(factors, list | tuple)
            or len(factors) != count
            or not all(isinstance(value, int | float) and 0 < value < 1e9 for value in factors)
        ):
            raise ConfigError(
                f"config.json: RoPE of type 'longrope' needs {key}, a list of {count} positive "
                f"numbers, found {factors!r}; take the original model's"
            )
        return np.array(factors, dtype=np.float64)

    def __call__(
        self, x: mx.array, offset: int | mx.array, long: bool | mx.array = False
    ) -> mx.array:
        if isinstance(long, mx.array):
            rotated = (self.rotate(x, offset, freqs) for freqs in (self._long_freqs, self._freqs))
            return mx.where(long, *rotated)
        return self.rotate(x, offset, self._long_freqs if long else self._freqs)


class LongRoPEAttention(Attention):
    """Attention whose LongRoPE depends on how long the text is."""

    rope: LongRoPE

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        if isinstance(self.span, Sliding):
            return RecordingSlidingCache(self.span.window, capacity, kv)
        return RecordingCache(capacity, kv)

    def apply_positions(
        self, q: mx.array, k: mx.array, context: ForwardContext
    ) -> tuple[mx.array, mx.array]:
        long = context.shared.get(IS_LONG)
        if long is None:
            long = context.offset + context.length > self.rope.original
        if isinstance(long, mx.array):
            long = long[:, None, None, None]
        return self.rope(q, context.offset, long), self.rope(k, context.offset, long)


class LongRoPEModel(CausalLM):
    """Causal language model with LongRoPE in all layers.

    The first cache records id · 2 + 1 of a token whose keys have the long factors, and id · 2 of
    another one.
    """

    def begin_pass(
        self, tokens: mx.array, caches: Sequence[Cache | None] | None = None
    ) -> ForwardContext:
        context = super().begin_pass(tokens, caches)
        if not caches:
            return context
        original = cast(Any, self.layers[0]).self_attn.rope.original
        first = caches[0]
        if isinstance(first, RowCaches):
            by_layer = [cast(RowCaches, layer).rows for layer in caches]
            rows = [list(row) for row in zip(*by_layer, strict=True)]
            long = [
                self._prepare(row, tokens[index : index + 1], original)[0]
                for index, row in enumerate(rows)
            ]
            long += long[-1:] * (first.batch - len(rows))
        else:
            long = self._prepare(cast(list[Cache], caches), tokens, original)
        context.shared[IS_LONG] = long[0] if len(set(long)) == 1 else mx.array(long)
        return context

    def _prepare(self, caches: Sequence[Cache], tokens: mx.array, original: float) -> list[bool]:
        """Record new tokens, after the earlier ones are read again if their factors have changed.

        Returns:
            Whether the long factors apply, for each row.
        """
        first = cast(RecordingCache, caches[0])
        batch, length = tokens.shape
        padding = [0] * batch if first.padding is None else cast(list[int], first.padding.tolist())
        long = [first.length + length - pad > original for pad in padding]
        if first.length and first.recorded_at != (first.length, long):
            held = first.recorded()
            if held is not None and not _match(held, long):
                self._read_again(caches, held // 2, long)
        _record(first, tokens, long)
        return long

    def _read_again(self, caches: Sequence[Cache], tokens: mx.array, long: list[bool]) -> None:
        for cache in caches:
            cache.truncate(0)
        for start in range(0, tokens.shape[1], REREAD_CHUNK):
            part = tokens[:, start : start + REREAD_CHUNK]
            context = super().begin_pass(part, caches)
            context.shared[IS_LONG] = long[0] if len(set(long)) == 1 else mx.array(long)
            _record(cast(RecordingCache, caches[0]), part, long)
            state = self.embed(part, context)
            for layer, cache in zip(self.layers, caches, strict=True):
                state = layer(state, context, cache)
            evaluate_caches(caches)


def _match(records: mx.array, long: list[bool]) -> bool:
    """Whether the keys of all tokens (B, S) have the factors that each row shall have."""
    flags = np.asarray(records % 2)
    return bool((flags == np.array(long, np.int32)[:, None]).all())


def _record(cache: RecordingCache, tokens: mx.array, long: list[bool]) -> None:
    cache.record(tokens.astype(mx.int32) * 2 + mx.array(long, mx.int32)[:, None])
    cache.recorded_at = (cache.length + tokens.shape[1], long)
