"""Lazily read tensors in FP8 with block scales, MXFP4 bytes, and integers with zero points."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor
from mlxarch.errors import CheckpointError


class RowwiseMapped(LazyTensor):
    """A tensor to whose rows a function is applied; only the width of a row may change."""

    def __init__(
        self,
        tensor: LazyTensor,
        width: int,
        dtype: mx.Dtype,
        function: Callable[[mx.array], mx.array],
    ) -> None:
        self.tensor = tensor
        self.function = function
        self.dtype = dtype
        self.shape = (*tensor.shape[:-1], width)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def read_rows(self, start: int, stop: int) -> mx.array:
        return self.function(self.tensor.read_rows(start, stop))


class BytesAsWords(LazyTensor):
    """Bytes viewed as MLX's uint32 words: (…, blocks, bytes) become (…, blocks · bytes / 4)."""

    def __init__(self, name: str, tensor: LazyTensor) -> None:
        self.tensor = tensor
        self.dtype = mx.uint32
        if tensor.dtype != mx.uint8 or len(tensor.shape) < 2 or tensor.shape[-1] % 4:
            raise CheckpointError(
                f"tensor {name}: packed codes must be bytes (…, blocks, bytes), these a multiple "
                "of 4; "
                f"found {tensor.dtype} {tensor.shape}"
            )
        self.shape = (*tensor.shape[:-2], tensor.shape[-2] * tensor.shape[-1] // 4)

    def read_rows(self, start: int, stop: int) -> mx.array:
        blocks = self.tensor.shape[-2]
        octets = self.tensor.read_rows(start * blocks, stop * blocks)
        return octets.view(self.dtype).reshape(stop - start, -1)

    def load(self) -> mx.array:
        return self.tensor.load().view(self.dtype).flatten(-2)


class ZeroPointBiases(LazyTensor):
    """Affine biases from zero points: -zero * scale (out, groups), exact in float32.

    The zero points of neighbouring rows share a word: (out · bits / 32, groups), the first in its
    lowest bits.
    """

    def __init__(self, name: str, zeros: LazyTensor, scale: LazyTensor, bits: int) -> None:
        self.zeros = zeros
        self.scale = scale
        self.bits = bits
        self.shape = scale.shape
        self.dtype = mx.float32
        expected = (-(-scale.shape[0] * bits // 32), *scale.shape[1:]) if scale.shape else None
        if len(scale.shape) != 2 or zeros.shape != expected or zeros.dtype != mx.int32:
            raise CheckpointError(
                f"tensor {name}: zero points of {bits} bits must be int32 {expected} beside scales "
                "of "
                f"{scale.shape}; found {zeros.dtype} {zeros.shape}"
            )

    def read_rows(self, start: int, stop: int) -> mx.array:
        per_word = 32 // self.bits
        first = start // per_word
        words = self.zeros.read_rows(first, -(-stop // per_word)).view(mx.uint32)[:, None]
        shifts = mx.arange(0, 32, self.bits, dtype=mx.uint32)[:, None]
        fields = (words >> shifts & 2**self.bits - 1).flatten(0, 1)
        zeros = fields[start - first * per_word : stop - first * per_word]
        return -self.scale.read_rows(start, stop).astype(self.dtype) * zeros.astype(self.dtype)


class Fp8BlockTensor(LazyTensor):
    """A float8 e4m3 matrix with one scale per ``block``; blocks at the edges may be smaller.

    Blocks of 128 by 128 are DeepSeek-V3's format; a block may as well be a row, or the whole
    matrix. Stacks of matrices have a stack of scales.
    Source: arXiv:2412.19437 section 3.3.2; the ``weight_scale_inv`` tensors of
    deepseek-ai/DeepSeek-V3.

    Shape:
        weight: (..., out, in), scale: (..., ceil(out / block rows), ceil(in / block columns))
    """

    def __init__(
        self,
        name: str,
        weight: LazyTensor,
        scale: LazyTensor,
        block: tuple[int, int] = (128, 128),
    ) -> None:
        self.weight = weight
        self.scale = scale
        self.block = block
        self.shape = weight.shape
        self.dtype = mx.float32
        blocks = tuple(
            -(-size // length) for size, length in zip(weight.shape[-2:], block, strict=False)
        )
        if (
            len(weight.shape) < 2
            or weight.dtype != mx.uint8
            or scale.shape != (*weight.shape[:-2], *blocks)
            or scale.dtype not in FLOAT_DTYPES
        ):
            raise CheckpointError(
                f"tensor {name}: a float8 matrix has a float scale for each block of {block}; "
                "found "
                f"{weight.dtype} {weight.shape} with scales {scale.dtype} {scale.shape}"
            )

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes

    def read_rows(self, start: int, stop: int) -> mx.array:
        block_rows, block_columns = self.block
        rows = np.arange(start, stop)
        height = self.shape[-2]
        blocks = rows // height * self.scale.shape[-2] + rows % height // block_rows
        first = int(blocks[0])
        scales = self.scale.read_rows(first, int(blocks[-1]) + 1).astype(mx.float32)
        row_scales = scales[mx.array(blocks - first)]
        scales = mx.repeat(row_scales, block_columns, axis=1)[:, : self.shape[-1]]
        return mx.from_fp8(self.weight.read_rows(start, stop), mx.float32) * scales
