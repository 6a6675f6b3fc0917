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

    @property
    def factor(self) -> mx.array:
        """Factor of the normalised features (dims,)."""
        return self["weight"]

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.factor, self.eps)


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

    @property
    def factor(self) -> mx.array:
        weight = self["weight"]
        if self._cached_for is not weight:
            one_plus_weight = 1 + weight
            # two threads must not evaluate one array, and unevaluated it would belong to this one
            mx.eval(one_plus_weight)
            self._one_plus_weight = one_plus_weight
            self._cached_for = weight
        return self._one_plus_weight


class FusableHeadNorms:
    """Norms of the queries' and of the keys' heads, run as one norm of all heads after ``fuse``.

    Each head is computed from the same numbers as before, so results do not change. Norms whose
    weights are replaced later run separately again.

    Args:
        norms: the norm of each kind of heads, and their number.
    """

    def __init__(self, *norms: tuple[nn.Module, int]) -> None:
        self.norms = norms
        self._factors = self._ones = mx.ones(())
        self._eps = 0.0
        self._weights: list[mx.array] = []  # of the norms when they were fused

    @property
    def is_fused(self) -> bool:
        """Whether they run as one norm: they are fused, and their weights were not replaced."""
        return bool(self._weights) and all(
            norm["weight"] is weight
            for (norm, _), weight in zip(self.norms, self._weights, strict=True)
        )

    def fuse(self) -> None:
        """Repeat the factors for each head, if all are RMS norms with one epsilon."""
        norms = [norm for norm, _ in self.norms if isinstance(norm, RMSNorm)]
        if len(norms) < len(self.norms) or len({norm.eps for norm in norms}) > 1:
            return
        if any(norm["weight"].ndim != 1 for norm in norms):  # still to be loaded
            return
        counts = [heads for _, heads in self.norms]
        factors = [[norm.factor] * heads for norm, heads in zip(norms, counts, strict=True)]
        self._factors = mx.stack(sum(factors, []))  # (heads, D)
        self._ones = mx.ones_like(norms[0].factor)
        self._eps = norms[0].eps
        mx.eval(self._factors, self._ones)
        self._weights = [norm["weight"] for norm in norms]

    def __call__(self, x: mx.array) -> mx.array:
        """Normalise the first heads of x (…, heads, D), as many as there are norms for.

        The others are normalised beside them and dropped: without them the heads of several rows
        would have to be copied.
        """
        y = rms_norm(x, self._ones, self._eps)
        return y[..., : self._factors.shape[0], :] * self._factors


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
