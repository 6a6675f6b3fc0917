"""Hashed n-gram embeddings: rows of a large table, chosen by the last tokens, gated into a layer."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.config import Count, DecoderConfig, Size
from mlxarch.blocks.linear import Embedding, Linear
from mlxarch.blocks.recurrent.causal_convolution import CausalConvolution
from mlxarch.errors import ConfigError

TOKENS = "tokens"  # ids of a pass (B, L), in ``ForwardContext.shared``
WORD = 2**64
GAMMA = 0x9E3779B97F4A7C15  # increment of SplitMix64
SEED_STEP = 10007  # between the seeds of two layers
MIN_SCORE = 1e-6


@dataclass(frozen=True, kw_only=True)
class NGramConfig(DecoderConfig):
    """Config keys of n-gram embeddings.

    Attributes:
        ple_layer_ids: layers with embeddings, counted from 1.
        eos_token_id: token that ends a text; no n-gram reaches across it.
    """

    ngram_size: Annotated[int, msgspec.Meta(ge=2, le=16)]
    heads_per_ngram: Size
    ngram_vocab_size_base: Annotated[int, msgspec.Meta(ge=2, lt=2**31)]
    make_ngram_vocab_size_divisible_by: Size = 1
    ple_layer_ids: tuple[Size, ...]
    ple_embed_dim: Size
    ple_conv_kernel_size: Size
    seed: Count = 0
    eos_token_id: Count

    @property
    def ngram_heads(self) -> int:
        """Rows of the table that are read for one token."""
        return (self.ngram_size - 1) * self.heads_per_ngram

    def has_ngrams(self, index: int) -> bool:
        """Whether the layer at ``index``, counted from 0, has n-gram embeddings."""
        return index + 1 in self.ple_layer_ids

    def check(self) -> None:
        super().check()
        ids = self.ple_layer_ids
        if len(set(ids)) < len(ids) or max(ids, default=0) > self.num_hidden_layers:
            raise ConfigError(
                f"config.json: ple_layer_ids = {list(ids)} must be different numbers of layers, "
                f"from 1 to {self.num_hidden_layers}"
            )
        if self.ple_embed_dim % self.ngram_heads:
            raise ConfigError(
                f"config.json: ple_embed_dim = {self.ple_embed_dim} must be a multiple of "
                f"(ngram_size - 1) * heads_per_ngram = {self.ngram_heads}"
            )


def split_mix(value: int) -> int:
    """SplitMix64 of a 64-bit number (Steele, Lea, Flood 2014)."""
    value = (value + GAMMA) % WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB % WORD
    return value ^ value >> 31


def primes_from(first: int) -> Iterator[int]:
    """Prime numbers in ascending order, from ``first`` on."""
    number = max(first, 2)
    while True:
        divisors = np.arange(2, math.isqrt(number) + 1)
        if (number % divisors).all():
            yield number
        number += 1


@dataclass(frozen=True)
class NGramHash:
    """Hash functions of one layer, from a token and those before it to rows of the layer's table.

    Attributes:
        multipliers: odd factor of the token, of the one before it, and so on.
        sizes: rows of each head, all different prime numbers.
        rows: rows of the table; a multiple that may be larger than the sum of ``sizes``.
    """

    multipliers: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: int

    @classmethod
    def for_layer(cls, c: NGramConfig, index: int) -> "NGramHash":
        """Hash functions of the layer at ``index``, which has n-gram embeddings.

        Source: transformers' Qwen4ExpTextNGramEmbedding.
        """
        order = sorted(c.ple_layer_ids).index(index + 1)
        # a factor of a token id stays below 2^63
        bound = max((2**63 - 1) // c.vocab_size // 2, 1)
        seed = c.seed + SEED_STEP * order
        multipliers = tuple(
            2 * (split_mix(seed + GAMMA * (n + 1)) % bound) + 1 for n in range(c.ngram_size)
        )
        heads = c.ngram_heads
        primes = primes_from(c.ngram_vocab_size_base)
        sizes = tuple(next(primes) for _ in range((order + 1) * heads))[-heads:]
        multiple = c.make_ngram_vocab_size_divisible_by
        return cls(multipliers, sizes, -(-sum(sizes) // multiple) * multiple)

    def row_indices(self, history: mx.array, eos: int) -> mx.array:
        """Rows of the heads: bigrams first, then trigrams, and so on.

        Args:
            history: ids of the tokens (B, n - 1 + L), those before the first new one included.
            eos: token that ends a text; the tokens before the last one count as it.

        Shape:
            (B, L, heads)
        """
        before = len(self.multipliers) - 1
        length = history.shape[1] - before
        history = history.astype(mx.int64)
        mixed = history[:, before:] * self.multipliers[0]
        same_text = mx.ones(mixed.shape, mx.bool_)
        rows: list[mx.array] = []
        heads = len(self.sizes) // before
        starts = np.cumsum([0, *self.sizes])
        for back in range(1, before + 1):
            earlier = history[:, before - back : before - back + length]
            token = mx.where(same_text, earlier, eos)
            mixed = mx.bitwise_xor(mixed, token * self.multipliers[back])
            same_text = same_text & (earlier != eos)
            for head in range((back - 1) * heads, back * heads):
                rows.append(mixed % self.sizes[head] + int(starts[head]))
        return mx.stack(rows, axis=-1)


class NGramEmbedding(nn.Module):
    """Embeddings of the n-grams that end at a token, added to each of several residual streams.

    Every head looks up one row of the table by a hash of the last 2, 3, … tokens. A stream scores
    the embeddings with a normalised query and key, and adds the gated value and, by a causal
    convolution with gaps over its channels, the values of earlier tokens.
    Source: transformers' Qwen4ExpTextPLE.

    Args:
        index: index of the layer.
        streams: number of residual streams.
        norm: constructor of a norm of one stream, called with its width.

    Shape:
        x: (B, L, streams · hidden_size) -> the same; state: inputs of the convolution (B, T,
        streams · hidden_size), ids (B, n - 1)
    """

    def __init__(
        self, c: NGramConfig, index: int, streams: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        width = streams * c.hidden_size
        self.hash = NGramHash.for_layer(c, index)
        self.table = Embedding(self.hash.rows, c.ple_embed_dim // c.ngram_heads)
        self.table.lookups = c.ngram_heads
        self.key_proj = Linear(c.ple_embed_dim, width)
        self.value_proj = Linear(c.ple_embed_dim, c.hidden_size)
        self.norm_key = norm(width)
        self.norm_query = norm(width)
        self.norm_conv = norm(width)
        self.conv1d = CausalConvolution(width, c.ple_conv_kernel_size, dilation=c.ngram_size)
        self.streams = streams
        self.c = c

    def __call__(
        self, x: mx.array, context: ForwardContext, state: tuple[mx.array, ...]
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        eos = self.c.eos_token_id
        before = self.c.ngram_size - 1
        tokens = context.shared[TOKENS].astype(mx.int32)
        if context.padding is not None:
            tokens = mx.where(context.positions >= 0, tokens, eos)
        tail, last = state or (
            self.conv1d.empty_tail(x),
            mx.full((x.shape[0], before), eos, mx.int32),
        )
        history = mx.concatenate([last, tokens], axis=1)
        rows = self.hash.row_indices(history, eos)  # (B, L, heads)
        e = self.table(rows).flatten(-2)  # (B, L, ple_embed_dim)
        key, query = (
            mx.unflatten(t.astype(mx.float32), -1, (self.streams, -1))
            for t in (self.norm_key(self.key_proj(e)), self.norm_query(x))
        )
        score = (query * key).sum(-1, keepdims=True) * self.c.hidden_size**-0.5
        score = mx.sign(score) * mx.sqrt(mx.maximum(mx.abs(score), MIN_SCORE))
        gate = mx.sigmoid(score).astype(x.dtype)  # (B, L, streams, 1)
        added = context.without_padding((gate * self.value_proj(e)[:, :, None]).flatten(-2))
        mixed, tail = self.conv1d(self.norm_conv(added), tail)
        return x + added + nn.silu(mixed), (tail, history[:, -before:])
