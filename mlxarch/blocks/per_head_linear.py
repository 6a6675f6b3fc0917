"""Stack of matrices, one per attention head."""

import mlx.core as mx

from mlxarch.blocks.linear import Matrix


class PerHeadLinear(Matrix):
    """Multiplication by one matrix per head, weight (H, out, in).

    Shape:
        x: (B, h or 1, L, in) -> (B, h, L, out) for the h selected ``heads``; without ``transpose``
        from out to in
    """

    def __call__(self, x: mx.array, heads: slice, transpose: bool = True) -> mx.array:
        arrays = {name: array[heads] for name, array in self.items()}
        return self.matmul(x, arrays, transpose)
