"""Keys and values in few bits: turned and packed as they come, and multiplied, or unpacked a block at a time.

Vectors are turned before they are packed. So is what they are multiplied with, and a sum of them is turned back.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlxarch.packing import Quantization, fitted

FEW = 16  # rows up to which a product reads the packed elements themselves; more rows share what is unpacked once


@dataclass(frozen=True)
class Packed:
    """Keys or values of some tokens, in place of an array (B, K, S, D).

    Attributes:
        parts: elements, scales and biases, (B, K, S, …) each.
        form: how they are packed.
        size: D; the packed vectors may be longer, and what stands behind has no meaning.
    """

    parts: tuple[mx.array, ...]
    form: Quantization
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, S, D)."""
        batch, heads, length = self.parts[1].shape[:3]
        return batch, heads, length, self.size

    @property
    def dtype(self) -> mx.Dtype:
        """That of the values that they stand for."""
        return self.parts[1].dtype

    def of(self, parts: tuple[mx.array, ...]) -> "Packed":
        """The same kind of vectors for other tokens."""
        return replace(self, parts=parts)

    def first(self, size: int) -> "Packed":
        """The first ``size`` features of every vector."""
        return replace(self, size=size)

    def block(self, start: int, stop: int) -> "Packed":
        """The tokens from ``start`` to ``stop``."""
        return self.of(tuple(part[:, :, start:stop] for part in self.parts))

    def unpacked(self, turned: bool = False) -> mx.array:
        """The values, (B, K, S, D); or ``turned`` as they are, with all features."""
        weight, scales, biases = self.parts
        values = self.form.dequantize(weight, scales, biases, self.dtype)
        return values if turned else self.turned_back(values)

    def turned(self, x: mx.array) -> mx.array:
        """Vectors (…, D) as the held ones are turned, and as long."""
        return fitting(x, self.parts[1].shape[-1] * self.form.group_size, self.form.group_size)

    def turned_back(self, x: mx.array) -> mx.array:
        """The vectors (…, D) that turned ones stand for."""
        return spread(x, self.form.group_size)[..., : self.size]

    def product(self, x: mx.array, transpose: bool) -> mx.array:
        """Turned rows (B, K, R, …) times the transposed keys, or rows (B, K, R, S) times the values, turned."""
        weight, scales, biases = self.parts
        return self.form.matmul(x, {"weight": weight, "scales": scales, "biases": biases}, transpose)


def unpacks(rows: int) -> bool:
    """Whether a product with so many rows takes the values, and not the packed elements."""
    # CUDA's product of packed elements takes no slice of a larger buffer
    return rows > FEW or not (mx.metal.is_available() or mx.default_device() == mx.cpu)


def spread(x: mx.array, group: int) -> mx.array:
    """Each group times an orthonormal matrix that is its own inverse (arXiv:2404.00456).

    An outlier is spread over its whole group, so that the steps between packed values can be smaller.
    """
    return mx.hadamard_transform(mx.unflatten(x, -1, (-1, group))).flatten(-2)


def fitting(x: mx.array, length: int, group: int) -> mx.array:
    """Vectors (…, D) with zeros up to ``length``, and turned."""
    missing = length - x.shape[-1]
    return spread(mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x, group)


def pack(x: mx.array, kv: Quantization) -> Packed:
    """Pack vectors (B, K, L, D), each by itself."""
    form, padded = fitted(kv, x.shape[-1])
    turned = fitting(x, padded, form.group_size)
    return Packed(tuple(mx.quantize(turned, form.group_size, form.bits)), form, x.shape[-1])


@dataclass(frozen=True)
class Made:
    """Keys or values that are made of packed latents, some tokens' at a time.

    Attributes:
        held: the latents (B, 1, S, …).
        heads: K.
        size: D.
        make: unpacked latents of some tokens -> their keys or values (B, K, …, D).
    """

    held: Packed
    heads: int
    size: int
    make: Callable[[mx.array], mx.array]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, K, S, D)."""
        batch, _, length, _ = self.held.shape
        return batch, self.heads, length, self.size
