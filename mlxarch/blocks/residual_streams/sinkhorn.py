"""Manifold-constrained hyper-connections: streams are mixed by nearly doubly stochastic matrices."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.config import DecoderConfig, Positive, Size


@dataclass(frozen=True, kw_only=True)
class StreamsConfig(DecoderConfig):
    """Config keys of residual streams; ``hc`` means hyper-connections."""

    hc_mult: Size
    hc_sinkhorn_iters: Size
    hc_eps: Positive


class Connection(NamedTuple):
    """What a block reads from the streams, and how its output goes back.

    Attributes:
        inputs: weighted sum of the streams (B, L, hidden_size).
        write: weight of the block's output in each stream (B, L, streams), in float32.
        mix: weight of the old stream r in the new stream s (B, L, r, s), in float32.
    """

    inputs: mx.array
    write: mx.array
    mix: mx.array


class StreamConnection(nn.Module):
    """Weights of the streams around one block, computed from all streams in float32.

    The mixing matrix is made nearly doubly stochastic by Sinkhorn-Knopp iterations, so that mixing
    neither amplifies nor loses the streams' sum.
    Source: arXiv:2512.24880 (mHC); deepseek-ai/DeepSeek-V4, inference/model.py; transformers'
    DeepseekV4HyperConnection.

    Shape:
        streams: (B, L, streams · hidden_size)
    """

    float32 = ("fn", "base", "scale")

    def __init__(self, c: StreamsConfig) -> None:
        super().__init__()
        count = c.hc_mult
        rows = (2 + count) * count
        self.fn = mx.zeros((rows, count * c.hidden_size))
        self.base = mx.zeros((rows,))
        self.scale = mx.ones((3,))
        self.count = count
        self.iterations = c.hc_sinkhorn_iters
        self.eps = c.hc_eps
        self.norm_eps = c.rms_norm_eps

    def __call__(self, streams: mx.array) -> Connection:
        count = self.count
        logits = (
            normalised(streams, self.norm_eps) @ self["fn"].T
        )  # (B, L, (2 + streams) · streams)
        read, write, mix = mx.split(logits, [count, 2 * count], axis=-1)
        of_read, of_write, of_mix = mx.split(self["base"], [count, 2 * count])
        scale = self["scale"]
        read = mx.sigmoid(read * scale[0] + of_read) + self.eps
        write = 2 * mx.sigmoid(write * scale[1] + of_write)
        mix = self.balance(mx.unflatten(mix * scale[2] + of_mix, -1, (count, count)))
        return Connection(weighted_sum(streams, read), write, mix)

    def balance(self, logits: mx.array) -> mx.array:
        """Nearly doubly stochastic matrices (…, streams, streams) from logits."""
        mix = mx.softmax(logits, axis=-1) + self.eps
        mix = mix / (mix.sum(-2, keepdims=True) + self.eps)
        for _ in range(self.iterations - 1):
            mix = mix / (mix.sum(-1, keepdims=True) + self.eps)
            mix = mix / (mix.sum(-2, keepdims=True) + self.eps)
        return mix

    def write(self, streams: mx.array, connection: Connection, out: mx.array) -> mx.array:
        """Streams after a block whose output is ``out`` (B, L, hidden_size)."""
        old = mx.unflatten(streams.astype(mx.float32), -1, (self.count, -1))
        added = connection.write[..., None] * out.astype(mx.float32)[:, :, None]
        new = connection.mix.swapaxes(-1, -2) @ old + added  # (B, L, streams, hidden_size)
        return new.flatten(-2).astype(streams.dtype)


def normalised(streams: mx.array, eps: float) -> mx.array:
    """All streams of a token divided by their common root mean square, in float32."""
    return mx.fast.rms_norm(streams.astype(mx.float32), None, eps)


def weighted_sum(streams: mx.array, weights: mx.array) -> mx.array:
    """Sum of the streams with weights (B, L, streams): -> (B, L, hidden_size)."""
    split = mx.unflatten(streams.astype(mx.float32), -1, (weights.shape[-1], -1))
    return (weights[..., None] * split).sum(-2).astype(streams.dtype)
