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
