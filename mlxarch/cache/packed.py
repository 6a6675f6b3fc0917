"""Keys and values in few bits: packed as they come, and unpacked a block at a time."""

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

    def unpacked(self) -> mx.array:
        """The values, (B, K, S, D)."""
        weight, scales, biases = self.parts
        values = self.form.dequantize(weight, scales, biases, self.dtype)
        return spread(values, self.form.group_size)[..., : self.size]

    def product(self, x: mx.array, transpose: bool) -> mx.array:
        """Rows x (B, K, R, D) times the transposed keys -> (B, K, R, S); or (B, K, R, S) times the values."""
        if unpacks(x.shape[2]):
            held = self.unpacked()
            return x @ (held.swapaxes(-1, -2) if transpose else held)
        (weight, scales, biases), group = self.parts, self.form.group_size
        arrays = {"weight": weight, "scales": scales, "biases": biases}
        if transpose:  # both sides spread, the product is the same
            padding = scales.shape[-1] * group - x.shape[-1]
            x = mx.pad(x, [(0, 0)] * 3 + [(0, padding)]) if padding else x
            return self.form.matmul(spread(x, group), arrays, True)
        return spread(self.form.matmul(x, arrays, False), group)[..., : self.size]


def unpacks(rows: int) -> bool:
    """Whether a product with so many rows takes the values, and not the packed elements."""
    # CUDA's product of packed elements takes no slice of a larger buffer
    return rows > FEW or not (mx.metal.is_available() or mx.default_device() == mx.cpu)


def spread(x: mx.array, group: int) -> mx.array:
    """Each group times an orthonormal matrix that is its own inverse (arXiv:2404.00456).

    An outlier is spread over its whole group, so that the steps between packed values can be smaller.
    """
    return mx.hadamard_transform(mx.unflatten(x, -1, (-1, group))).flatten(-2)


def pack(x: mx.array, kv: Quantization) -> Packed:
    """Pack vectors (B, K, L, D), each by itself."""
    form, padded = fitted(kv, x.shape[-1])
    size = x.shape[-1]
    if padded > size:
        x = mx.pad(x, [(0, 0)] * 3 + [(0, padded - size)])
    return Packed(tuple(mx.quantize(spread(x, form.group_size), form.group_size, form.bits)), form, size)


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

    def block(self, start: int, stop: int) -> mx.array:
        """Those of the tokens from ``start`` to ``stop``."""
        return self.make(self.held.block(start, stop).unpacked())
