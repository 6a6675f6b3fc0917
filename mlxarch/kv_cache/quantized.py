"""Quantized keys and values, rotated by a Hadamard transform before quantization.

Every group of features is multiplied by an orthonormal Hadamard matrix before it is quantized
(arXiv:2404.00456). That spreads an outlier over its group, so the quantization steps are smaller.
Scalar products do not change if queries are rotated as well, and a weighted sum of rotated values
only has to be rotated back. Few queries multiply the packed codes directly; for many, keys and
values are dequantized a block of tokens at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlxarch.quantization.kv_vectors import fit_kv_quantization
from mlxarch.quantization.scheme import Quantization

MAX_MATMUL_ROWS = 16  # up to here a matmul reads packed codes; more rows share what is dequantized


@dataclass(frozen=True)
class QuantizedVectors:
    """Quantized keys or values of some tokens, in place of an array (B, K, S, D).

    Attributes:
        arrays: packed codes, scales and biases, each (B, K, S, …).
        quantization: bits and group size.
        size: D. The stored vectors may be longer; the features after the first D are padding.
    """

    arrays: tuple[mx.array, ...]
    quantization: Quantization
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, S, D)."""
        batch, heads, length = self.arrays[1].shape[:3]
        return batch, heads, length, self.size

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the dequantized vectors."""
        return self.arrays[1].dtype

    def with_arrays(self, arrays: tuple[mx.array, ...]) -> "QuantizedVectors":
        """Vectors of other tokens, quantized in the same way."""
        return replace(self, arrays=arrays)

    def first_features(self, size: int) -> "QuantizedVectors":
        """The first ``size`` features of every vector."""
        return replace(self, size=size)

    def slice_tokens(self, start: int, stop: int) -> "QuantizedVectors":
        """The vectors of the tokens from ``start`` to ``stop``."""
        return self.with_arrays(tuple(array[:, :, start:stop] for array in self.arrays))

    def dequantize(self, rotated: bool = False) -> mx.array:
        """Dequantized vectors (B, K, S, D).

        Args:
            rotated: leave the rotation in, and the padding: (B, K, S, padded D).
        """
        weight, scales, biases = self.arrays
        values = self.quantization.dequantize(weight, scales, biases, self.dtype)
        return values if rotated else self.rotate_back(values)

    def rotate(self, x: mx.array) -> mx.array:
        """Pad and rotate vectors (…, D) like the stored ones."""
        group_size = self.quantization.group_size
        return pad_and_rotate(x, self.arrays[1].shape[-1] * group_size, group_size)

    def rotate_back(self, x: mx.array) -> mx.array:
        """Undo the rotation of vectors and remove their padding: (…, padded D) -> (…, D)."""
        return hadamard_rotate(x, self.quantization.group_size)[..., : self.size]

    def matmul(self, x: mx.array, transpose: bool) -> mx.array:
        """Multiply by the rotated vectors without dequantizing them.

        Shape:
            x @ keys.T (``transpose``): rotated rows (B, K, R, padded D) -> (B, K, R, S)
            x @ values: rows (B, K, R, S) -> rotated rows (B, K, R, padded D)
        """
        weight, scales, biases = self.arrays
        return self.quantization.matmul(
            x, {"weight": weight, "scales": scales, "biases": biases}, transpose
        )


def should_dequantize(rows: int) -> bool:
    """Whether a product with ``rows`` rows uses dequantized vectors instead of packed codes."""
    # the CUDA kernel of quantized_matmul does not accept a slice of a larger buffer
    return rows > MAX_MATMUL_ROWS or not (mx.metal.is_available() or mx.default_device() == mx.cpu)


def hadamard_rotate(x: mx.array, group_size: int) -> mx.array:
    """Multiply each group of features by an orthonormal Hadamard matrix, its own inverse."""
    return mx.hadamard_transform(mx.unflatten(x, -1, (-1, group_size))).flatten(-2)


def pad_and_rotate(x: mx.array, length: int, group_size: int) -> mx.array:
    """Pad vectors (…, D) with zeros to ``length`` features, and rotate them."""
    missing = length - x.shape[-1]
    if missing:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return hadamard_rotate(x, group_size)


def quantize_vectors(x: mx.array, kv: Quantization) -> QuantizedVectors:
    """Rotate and quantize vectors (B, K, L, D), each on its own."""
    size = x.shape[-1]
    quantization, padded = fit_kv_quantization(kv, size)
    rotated = pad_and_rotate(x, padded, quantization.group_size)
    arrays = mx.quantize(rotated, quantization.group_size, quantization.bits)
    return QuantizedVectors(tuple(arrays), quantization, size)


@dataclass(frozen=True)
class UpProjectedLatents:
    """Keys or values computed from quantized latents on demand, a block of tokens at a time.

    Attributes:
        latents: quantized latents (B, 1, S, …).
        heads: K.
        size: D.
        up_project: dequantized latents of some tokens -> their keys or values (B, K, …, D).
    """

    latents: QuantizedVectors
    heads: int
    size: int
    up_project: Callable[[mx.array], mx.array]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, S, D)."""
        batch, _, length, _ = self.latents.shape
        return batch, self.heads, length, self.size
