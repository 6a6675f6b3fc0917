"""Learned compression of neighbouring tokens to one vector."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.linear import ExactLinear
from mlxarch.blocks.norms import RMSNorm
from mlxarch.blocks.rope import RoPE


class Compressed(NamedTuple):
    """Compressed tokens of one row.

    Attributes:
        entries: one vector for ``rate`` tokens (1, 1, E, D).
        inputs: projections (1, T, …) of the tokens that later entries need: those after the last
            entry, and with overlap those of the last entry.
    """

    entries: mx.array
    inputs: mx.array


def rotate_last(
    rope: RoPE, x: mx.array, offset: int | mx.array, *, stride: int = 1, back: bool = False
) -> mx.array:
    """Rotate the last features of vectors by their positions, or ``back``."""
    kept, turned = mx.split(x, [x.shape[-1] - rope.dims], axis=-1)
    if back:
        turned = rope.rotate_back(turned, offset)
    else:
        turned = rope.rotate_every(turned, offset, stride)
    return mx.concatenate([kept, turned], axis=-1)


class Compressor(nn.Module):
    """Entry of each ``rate`` neighbouring tokens: their weighted sum, normalised, with RoPE.

    The weights are a softmax over the tokens, for every feature, of a projection plus a bias for
    the token's place. With overlap an entry also covers the tokens of the one before, by projections
    of their own: the first half of the features belongs to the next entry, the second to the
    token's own.
    Source: transformers' DeepseekV4CSACompressor and DeepseekV4HCACompressor.

    Args:
        dim: hidden size of the model.
        size: features of an entry, D.
        rate: tokens of an entry.
        overlap: whether entries overlap.
        rope: position embedding of the last features, at the position of the first token.
        eps: of the norm.
    """

    float32 = ("ape",)

    def __init__(
        self, dim: int, size: int, *, rate: int, overlap: bool, rope: RoPE, eps: float
    ) -> None:
        super().__init__()
        width = size * (1 + overlap)
        self.wkv = ExactLinear(dim, width)
        self.wgate = ExactLinear(dim, width)
        self.ape = mx.zeros((rate, width))
        self.norm = RMSNorm(size, eps)
        self.size = size
        self.rate = rate
        self.overlap = overlap
        self.rope = rope

    def project(self, x: mx.array) -> mx.array:
        """Values and logits of the weights of tokens: (B, L, dim) -> (B, L, 2 · width)."""
        return mx.concatenate([self.wkv(x), self.wgate(x)], axis=-1)

    def empty(self, inputs: mx.array) -> Compressed:
        """No entry and no token before the first ones of a row."""
        return Compressed(mx.zeros((1, 1, 0, self.size), inputs.dtype), inputs[:, :0])

    def extend(self, before: Compressed, inputs: mx.array) -> Compressed:
        """Add the entries that become complete with the projections of new tokens (1, L, …)."""
        entries, kept = before
        first = entries.shape[2]
        inputs = mx.concatenate([kept, inputs], axis=1)
        old = self.rate if self.overlap and first else 0  # tokens of the last entry
        count = (inputs.shape[1] - old) // self.rate
        if count:
            tokens = mx.unflatten(inputs[:, : old + count * self.rate], 1, (-1, self.rate))
            new = self.compress(tokens.astype(mx.float32), first=not old)  # (1, count, D)
            new = self.norm(new.astype(inputs.dtype))[:, None]
            new = rotate_last(self.rope, new, first, stride=self.rate)
            entries = mx.concatenate([entries, new], axis=2)
            start = old + (count - self.overlap) * self.rate
            # gathered, which copies them: a view would keep all inputs in memory
            inputs = mx.take(inputs, mx.arange(start, inputs.shape[1]), axis=1)
        return Compressed(entries, inputs)

    def compress(self, tokens: mx.array, first: bool) -> mx.array:
        """Weighted sums of tokens (1, n, rate, 2 · width) -> (1, entries, D).

        Args:
            first: whether the first tokens are those of the row, without an entry before; otherwise
                with overlap the first ones only complete the next entry.
        """
        values, logits = mx.split(tokens, 2, axis=-1)
        logits = logits + self["ape"]
        if not self.overlap:
            return (mx.softmax(logits, axis=2) * values).sum(2)
        (v_next, v_own), (g_next, g_own) = (mx.split(t, 2, axis=-1) for t in (values, logits))
        if first:
            v_next = mx.concatenate([mx.zeros_like(v_next[:, :1]), v_next[:, :-1]], axis=1)
            none = mx.full(g_next[:, :1].shape, -mx.inf)
            g_next = mx.concatenate([none, g_next[:, :-1]], axis=1)
        else:
            v_next, g_next = v_next[:, :-1], g_next[:, :-1]
            v_own, g_own = v_own[:, 1:], g_own[:, 1:]
        values = mx.concatenate([v_next, v_own], axis=2)
        return (mx.softmax(mx.concatenate([g_next, g_own], axis=2), axis=2) * values).sum(2)
