"""Residual streams that blocks read and write through learned gates of low rank."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.config import DecoderConfig, Size
from mlxarch.blocks.linear import ExactLinear, Linear
from mlxarch.blocks.norms import ZeroCenteredRMSNorm


@dataclass(frozen=True, kw_only=True)
class LowRankStreamsConfig(DecoderConfig):
    """Config keys of residual streams; ``hc`` means hyper-connections (arXiv:2409.19606)."""

    hc_count: Size
    hc_lowrank: Size


class StreamNorm(ZeroCenteredRMSNorm):
    """Norm of each stream on its own: (B, L, streams · hidden_size) -> the same."""

    def __init__(self, width: int, streams: int, eps: float) -> None:
        super().__init__(width, eps)
        self.streams = streams

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.fast.rms_norm(mx.unflatten(x, -1, (self.streams, -1)), None, self.eps)
        return y.flatten(-2) * (1 + self["weight"])


class StreamMixer(nn.Module):
    """Gated mean of the streams, normalised, as the input of a block."""

    def __init__(self, c: LowRankStreamsConfig) -> None:
        super().__init__()
        width = c.hc_count * c.hidden_size
        self.hc_norm = StreamNorm(width, c.hc_count, c.rms_norm_eps)
        self.input_mix_weight_down = Linear(width, c.hc_lowrank)
        self.input_mix_weight_up = Linear(c.hc_lowrank, width)
        self.streams = c.hc_count

    def __call__(self, x: mx.array) -> mx.array:
        return self.mix(self.hc_norm(x))

    def mix(self, n: mx.array) -> mx.array:
        """Mix normalised streams (B, L, streams · hidden_size) -> (B, L, hidden_size)."""
        gate = self.input_mix_weight_up(nn.silu(self.input_mix_weight_down(n) / self.streams))
        return mx.unflatten(mx.sigmoid(gate) * n, -1, (self.streams, -1)).mean(-2)


class HyperConnection(StreamMixer):
    """Mixer that also adds the output of the block to each stream, with a gate for each."""

    def __init__(self, c: LowRankStreamsConfig) -> None:
        super().__init__(c)
        self.block_inject_weight = ExactLinear(c.hc_count * c.hidden_size, c.hc_count)

    def inject(self, x: mx.array, n: mx.array, out: mx.array) -> mx.array:
        """Add a block's output (B, L, hidden_size) to streams x, whose norm is n."""
        gate = 2 * mx.sigmoid(self.block_inject_weight(n) / self.streams)
        return x + (gate[..., None] * out[:, :, None]).flatten(-2)
