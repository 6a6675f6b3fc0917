"""Normalisation. All act on the last axis and accumulate in float32."""

import mlx.core as mx
import mlx.nn as nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467).

    Shape:
        x: (..., dims) -> the same
    """

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self["weight"], self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight): weight decay then pulls towards 1, and a checkpoint's weights lie around 0.

    The sum is kept as long as the weight is the same array, so that no token pays for it, and ``weight`` stays what
    the checkpoint holds.
    """

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__(dims, eps)
        self.weight = mx.zeros((dims,))
        self._sum_of: mx.array | None = None
        self._sum = self.weight

    def __call__(self, x: mx.array) -> mx.array:
        weight = self["weight"]
        if self._sum_of is not weight:
            self._sum = 1 + weight
            mx.eval(self._sum)  # unevaluated, it would belong to this thread
            self._sum_of = weight
        return mx.fast.rms_norm(x, self._sum, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias (arXiv:1607.06450).

    Shape:
        x: (..., dims) -> the same
    """

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = mx.ones((dims,)), mx.zeros((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self["weight"], self["bias"], self.eps)
