"""How a matrix is packed, and what can be computed with it as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Quantization:
    """How a matrix is packed: ``bits`` an element, one scale (and bias) for ``group_size`` elements of a row.

    ``mode`` is one of MLX's: affine (scale and bias), mxfp4, mxfp8, nvfp4 (scale only).
    Source: the table of quantization modes in MLX's documentation of ``mx.quantize``.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the uint32 array that holds a weight of logical ``shape``."""
        return (*shape[:-1], shape[-1] * self.bits // 32)

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales, and of the biases where the mode has them."""
        return (*shape[:-1], shape[-1] // self.group_size)

    def matmul(self, x: mx.array, packed: dict[str, Any], transpose: bool = True) -> mx.array:
        """x @ weight.T for a ``packed`` weight with its scales and, in affine mode, biases; x @ weight if told so."""
        return mx.quantized_matmul(
            x,
            packed["weight"],
            packed["scales"],
            packed.get("biases"),
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def gather_matmul(self, x: mx.array, packed: dict[str, Any], chosen: mx.array, sorted: bool) -> mx.array:
        """Each row of x @ the transposed matrix that is chosen for it, of a ``packed`` stack (E, out, in)."""
        return mx.gather_qmm(
            x,
            packed["weight"],
            packed["scales"],
            packed.get("biases"),
            rhs_indices=chosen,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted,
        )

    def dequantize(self, weight: mx.array, scales: mx.array, biases: mx.array | None, dtype: mx.Dtype) -> mx.array:
        """The values that the packed arrays stand for."""
        return mx.dequantize(
            weight, scales, biases, group_size=self.group_size, bits=self.bits, mode=self.mode, dtype=dtype
        )
