"""How a matrix is packed, and what can be computed with it as it is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxarch.errors import QuantizationError

KV_BITS, KV_GROUPS = (8, 4), (128, 64, 32)


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


# Keys and values ----------------------------------------------------------------------------------------------------


def fitted(kv: Quantization, features: int) -> tuple[Quantization, int]:
    """How vectors of ``features`` elements are packed: in the largest groups allowed that divide them.

    Where none does, they are padded to the next multiple of the smallest: the second value is their length then.

    Raises:
        QuantizationError: keys and values are not packed in this way.
    """
    if kv.bits not in KV_BITS or kv.group_size not in KV_GROUPS or kv.mode != "affine":
        raise QuantizationError(
            f"keys and values are packed in {' or '.join(map(str, KV_BITS))} bits, affine, with groups of "
            f"{', '.join(map(str, sorted(KV_GROUPS)))}; found {kv.bits} bits, {kv.mode}, groups of {kv.group_size}"
        )
    group = next((size for size in KV_GROUPS if size <= kv.group_size and features % size == 0), KV_GROUPS[-1])
    return replace(kv, group_size=group), -(-features // group) * group


def vector_bytes(features: int, kv: Quantization | None, float_bytes: int) -> int:
    """Bytes of one token's key or value of one head, scales and biases included."""
    if kv is None:
        return features * float_bytes
    form, padded = fitted(kv, features)
    return padded * form.bits // 8 + 2 * (padded // form.group_size) * float_bytes
