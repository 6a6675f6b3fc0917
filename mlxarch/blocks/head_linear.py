"""The matrices of heads: one for each."""

import mlx.core as mx

from mlxarch.blocks.linear import Matrix


class HeadLinear(Matrix):
    """One matrix for each head, (H, out, in).

    Shape:
        x: (B, h or 1, L, in) -> (B, h, L, out) for the h ``heads``; from out to in where not ``transpose``
    """

    def __call__(self, x: mx.array, heads: slice, transpose: bool = True) -> mx.array:
        return self.product(x, {name: array[heads] for name, array in self.items()}, transpose)
