"""Normalisation layers. All act on the last axis and accumulate in float32."""

import mlx.core as mx
import mlx.nn as nn

from mlxarch.cpu_kernels import native


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / rms(x) * weight."""
    y = native.rms_norm(x, weight, eps)
    return mx.fast.rms_norm(x, weight, eps) if y is None else y


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
        return rms_norm(x, self["weight"], self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), whose weights are centred at zero; weight decay leads them there.

    1 + weight is computed once per weight array, not for every token. ``weight`` stays as the
    checkpoint stores it.
    """

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__(dims, eps)
        self.weight = mx.zeros((dims,))
        self._cached_for: mx.array | None = None
        self._one_plus_weight = self.weight

    def __call__(self, x: mx.array) -> mx.array:
        weight = self["weight"]
        if self._cached_for is not weight:
            one_plus_weight = 1 + weight
            # two threads must not evaluate one array, and unevaluated it would belong to this one
            mx.eval(one_plus_weight)
            self._one_plus_weight = one_plus_weight
            self._cached_for = weight
        return rms_norm(x, self._one_plus_weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias (arXiv:1607.06450).

    Shape:
        x: (..., dims) -> the same
    """

    def __init__(self, dims: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))
        if bias:
            self.bias = mx.zeros((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self["weight"], self.get("bias"), self.eps)
