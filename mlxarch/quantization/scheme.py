"""Quantization scheme of a matrix: bits, group size and mode, and products with packed arrays."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxarch.cpu_kernels import native
from mlxarch.errors import QuantizationError
from mlxarch.quantization.formats import MODES


@dataclass(frozen=True)
class Quantization:
    """Group quantization of a matrix.

    Each row is divided into groups of ``group_size`` elements, which share a scale (and a bias);
    an element is stored as a code of ``bits`` bits.

    Attributes:
        mode: affine (scale and bias), mxfp4, mxfp8 or nvfp4 (scale only). Source: the table of
            quantization modes in MLX's documentation of ``mx.quantize``.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the uint32 array that stores a weight of logical ``shape``."""
        return (*shape[:-1], shape[-1] * self.bits // 32)

    def scales_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales, and of the biases where the mode has them."""
        return (*shape[:-1], shape[-1] // self.group_size)

    def matmul(self, x: mx.array, arrays: dict[str, Any], transpose: bool = True) -> mx.array:
        """Multiply by a quantized weight: x @ weight.T, or x @ weight without ``transpose``.

        Args:
            arrays: packed ``weight``, ``scales`` and, in affine mode, ``biases``.
        """
        if transpose:
            y = native.matmul(x, arrays, self.mode, self.bits, self.group_size)
            if y is not None:
                return y
        # MLX's CUDA back end would read the matrix anew for each row of (B, 1, in)
        one_token = x.ndim == 3 and x.shape[1] == 1 < x.shape[0]
        y = mx.quantized_matmul(
            x.squeeze(1) if one_token else x,
            arrays["weight"],
            arrays["scales"],
            arrays.get("biases"),
            transpose=transpose,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return mx.expand_dims(y, 1) if one_token else y

    def gather_matmul(
        self, x: mx.array, arrays: dict[str, Any], chosen: mx.array, sorted: bool
    ) -> mx.array:
        """Multiply each row of x by one matrix, transposed, of a quantized stack (E, out, in).

        Args:
            arrays: packed ``weight``, ``scales`` and, in affine mode, ``biases`` of the stack.
            chosen: index of the matrix for each row.
            sorted: whether ``chosen`` is in ascending order.
        """
        y = native.expert_matmul(x, arrays, chosen, self.mode, self.bits, self.group_size)
        if y is not None:
            return y
        return mx.gather_qmm(
            x,
            arrays["weight"],
            arrays["scales"],
            arrays.get("biases"),
            rhs_indices=chosen,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted,
        )

    def dequantize(
        self, weight: mx.array, scales: mx.array, biases: mx.array | None, dtype: mx.Dtype
    ) -> mx.array:
        """Compute the floating-point values of packed arrays."""
        return mx.dequantize(
            weight,
            scales,
            biases,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=dtype,
        )


def default_bits(mode: str) -> int:
    """Bits of a mode that allows only one number; 4 for other modes."""
    bits, _ = MODES.get(mode, ((), ()))
    return bits[0] if len(bits) == 1 else 4


def check_quantization(
    bits: int, group_size: int | None = None, mode: str = "affine"
) -> Quantization:
    """Check bits, group size and mode given by the user.

    Args:
        group_size: None takes the default of the mode, 64 for affine.

    Raises:
        QuantizationError: a value is not allowed; the message names those that are.
    """
    if mode not in MODES:
        raise QuantizationError(f"mode {mode!r} does not exist; allowed: {', '.join(MODES)}")
    bits_allowed, groups_allowed = MODES[mode]
    if bits not in bits_allowed or type(bits) is not int:
        allowed = _comma_separated(bits_allowed)
        raise QuantizationError(f"{bits!r} bits: mode {mode} allows {allowed} bits")
    if group_size is None:
        group_size = groups_allowed[0]
    if group_size not in groups_allowed or type(group_size) is not int:
        allowed = _comma_separated(groups_allowed)
        raise QuantizationError(
            f"group size {group_size!r}: mode {mode} allows groups of {allowed}"
        )
    return Quantization(bits, group_size, mode)


def fit_group_size(wanted: Quantization, columns: int) -> Quantization | None:
    """Choose the largest group size up to the wanted one that divides a row of ``columns``.

    Returns:
        ``wanted`` with this group size; None if no group size divides the row.
    """
    _, groups = MODES[wanted.mode]
    for size in sorted(groups, reverse=True):
        if size <= wanted.group_size and columns and columns % size == 0:
            return Quantization(wanted.bits, size, wanted.mode)
    return None


def stored_arrays(
    quantization: Quantization, shape: Sequence[int], scales: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each array of a quantized matrix.

    Args:
        shape: logical shape of the matrix.
        scales: safetensors name of the type of affine scales and biases. Scales of the other modes
            are 8-bit floats, stored as bytes.

    Returns:
        "weight", "scales" and, in affine mode, "biases" -> (safetensors dtype, shape).
    """
    packed = quantization.packed_shape(shape)
    per_group = quantization.scales_shape(shape)
    if quantization.mode != "affine":
        return {"weight": ("U32", packed), "scales": ("U8", per_group)}
    return {"weight": ("U32", packed), "scales": (scales, per_group), "biases": (scales, per_group)}


def describe_quantization(*quantizations: Quantization) -> str:
    """Describe quantizations of one mode for the user, e.g. "4 bits, groups of 64, affine"."""
    bits = _join_with_or({quantization.bits for quantization in quantizations})
    groups = _join_with_or({quantization.group_size for quantization in quantizations})
    modes = _join_with_or({quantization.mode for quantization in quantizations})
    return f"{bits} bits, groups of {groups}, {modes}"


def _join_with_or(values: Iterable[Any]) -> str:
    """Join sorted values, e.g. "2, 3 or 4"."""
    *others, last = map(str, sorted(values))
    return f"{', '.join(others)} or {last}" if others else last


def _comma_separated(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
