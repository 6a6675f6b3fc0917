"""Matrix products in float32, by rows of the matrix; on MLX's CPU back end NumPy does them, which has a BLAS there.

MLX multiplies at 3 GFLOP/s on a CPU, NumPy at 30 to 130. A model that only judges or gathers statistics may use either.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlxarch.blocks import CausalLM
from mlxarch.blocks.linear import Matrix

BLOCK = 32 << 20  # elements of a matrix that are unpacked at once


@contextmanager
def float32_products(model: CausalLM) -> Iterator[None]:
    """Within it, the head computes in float32 whatever the model runs in, and on a CPU so does every plain matrix.

    Logits in bfloat16 would differ by a tenth where they are large, which is more than 8 bits do to a model.
    """
    on_cpu = mx.default_device() == mx.cpu
    chosen = [m for _, m in model.named_modules() if isinstance(m, Matrix) and m.weight.ndim == 2]
    chosen = [m for m in chosen if on_cpu or m.weight.shape[0] == model.vocab_size]
    for matrix in chosen:
        matrix.product = _in_float32(matrix, matrix.product, on_cpu)
    try:
        yield
    finally:
        for matrix in chosen:
            del matrix.product  # the method of the class again


def _in_float32(matrix: Matrix, usual: Callable[..., mx.array], on_cpu: bool) -> Callable[..., mx.array]:
    def product(x: mx.array, arrays: dict[str, Any] | None = None, transpose: bool = True) -> mx.array:
        if not transpose:
            return usual(x, arrays, transpose)
        arrays = matrix if arrays is None else arrays
        flat, step = x.reshape(-1, x.shape[-1]).astype(mx.float32), max(BLOCK // x.shape[-1], 1)
        weights = (_rows(matrix, arrays, at, at + step) for at in range(0, arrays["weight"].shape[0], step))
        if on_cpu:
            left = np.asarray(flat)
            blocks = [mx.array(left @ np.asarray(weight).T) for weight in weights]
        else:
            blocks = [flat @ weight.T for weight in weights]
        joined = blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-1)
        return joined.reshape(*x.shape[:-1], -1)

    return product


def _rows(matrix: Matrix, arrays: dict[str, Any], start: int, stop: int) -> mx.array:
    """Rows of a matrix as floats, unpacked if need be."""
    weight = arrays["weight"][start:stop]
    if matrix.quantization is None:
        return weight.astype(mx.float32)
    scales, biases = arrays["scales"][start:stop], arrays.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases[start:stop].astype(mx.float32)
    return matrix.quantization.dequantize(weight, scales, biases, mx.float32)
