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
        return self.form.dequantize(weight, scales, biases, self.dtype)[..., : self.size]

    def product(self, x: mx.array, transpose: bool) -> mx.array:
        """Rows x (B, K, R, D) times the transposed keys -> (B, K, R, S); or (B, K, R, S) times the values."""
        # CUDA's product takes no slice of a larger buffer
        if x.shape[2] > FEW or not (mx.metal.is_available() or mx.default_device() == mx.cpu):
            held = self.unpacked()
            return x @ (held.swapaxes(-1, -2) if transpose else held)
        weight, scales, biases = self.parts
        padding = scales.shape[-1] * self.form.group_size - x.shape[-1]
        if transpose and padding:
            x = mx.pad(x, [(0, 0)] * 3 + [(0, padding)])
        arrays = {"weight": weight, "scales": scales, "biases": biases}
        out = self.form.matmul(x, arrays, transpose)
        return out if transpose else out[..., : self.size]


def pack(x: mx.array, kv: Quantization) -> Packed:
    """Pack vectors (B, K, L, D), each by itself."""
    form, padded = fitted(kv, x.shape[-1])
    size = x.shape[-1]
    if padded > size:
        x = mx.pad(x, [(0, 0)] * 3 + [(0, padded - size)])
    return Packed(tuple(mx.quantize(x, form.group_size, form.bits)), form, size)


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
