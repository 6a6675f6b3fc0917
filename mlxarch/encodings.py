"""Number formats of other programs as virtual tensors: codes in bytes, eight-bit floats with scales for blocks."""

from collections.abc import Callable

import mlx.core as mx

from mlxarch.errors import CheckpointError
from mlxarch.tensors import FLOATS, Tensor


class Mapped(Tensor):
    """Another tensor with a function on every row; the function keeps the shape, but for the width of a row."""

    def __init__(self, tensor: Tensor, width: int, dtype: mx.Dtype, function: Callable[[mx.array], mx.array]) -> None:
        self.tensor, self.function, self.dtype = tensor, function, dtype
        self.shape = (*tensor.shape[:-1], width)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def rows(self, start: int, stop: int) -> mx.array:
        return self.function(self.tensor.rows(start, stop))


class Words(Tensor):
    """Bytes as MLX's uint32 words: (…, blocks, bytes) become one row of (…, blocks · bytes / 4)."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.tensor, self.dtype = tensor, mx.uint32
        if tensor.dtype != mx.uint8 or len(tensor.shape) < 2 or tensor.shape[-1] % 4:
            raise CheckpointError(
                f"tensor {name}: packed codes must be bytes (…, blocks, bytes), these a multiple of 4; "
                f"found {tensor.dtype} {tensor.shape}"
            )
        self.shape = (*tensor.shape[:-2], tensor.shape[-2] * tensor.shape[-1] // 4)

    def rows(self, start: int, stop: int) -> mx.array:
        blocks = self.tensor.shape[-2]
        return self.tensor.rows(start * blocks, stop * blocks).view(self.dtype).reshape(stop - start, -1)

    def load(self) -> mx.array:
        return self.tensor.load().view(self.dtype).flatten(-2)


class ZeroPoints(Tensor):
    """What the code 0 stands for: -zero * scale (out, groups), in float32, which holds the product exactly.

    The zero points of neighbouring rows share a word: (out · bits / 32, groups), the first in its lowest bits.
    """

    def __init__(self, name: str, zeros: Tensor, scale: Tensor, bits: int) -> None:
        self.zeros, self.scale, self.bits, self.shape, self.dtype = zeros, scale, bits, scale.shape, mx.float32
        wanted = (-(-scale.shape[0] * bits // 32), *scale.shape[1:]) if scale.shape else None
        if len(scale.shape) != 2 or zeros.shape != wanted or zeros.dtype != mx.int32:
            raise CheckpointError(
                f"tensor {name}: zero points of {bits} bits must be int32 {wanted} beside scales of {scale.shape}; "
                f"found {zeros.dtype} {zeros.shape}"
            )

    def rows(self, start: int, stop: int) -> mx.array:
        each = 32 // self.bits
        first = start // each
        words = self.zeros.rows(first, -(-stop // each)).view(mx.uint32)[:, None]
        shifts = mx.arange(0, 32, self.bits, dtype=mx.uint32)[:, None]
        zeros = (words >> shifts & 2**self.bits - 1).flatten(0, 1)[start - first * each : stop - first * each]
        return -self.scale.rows(start, stop).astype(self.dtype) * zeros.astype(self.dtype)


class Fp8Blocks(Tensor):
    """float8 e4m3 with a scale for every ``block`` of a matrix, ragged at the edges.

    Blocks of 128 by 128 are DeepSeek-V3's format; a block may as well be a row, or the whole matrix.
    Source: arXiv:2412.19437 section 3.3.2; the ``weight_scale_inv`` tensors of deepseek-ai/DeepSeek-V3.
    """

    def __init__(self, name: str, weight: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128)) -> None:
        self.weight, self.scale, self.block, self.shape, self.dtype = weight, scale, block, weight.shape, mx.float32
        wanted = tuple(-(-size // part) for size, part in zip(weight.shape, block, strict=False))
        if len(weight.shape) != 2 or weight.dtype != mx.uint8 or scale.shape != wanted or scale.dtype not in FLOATS:
            raise CheckpointError(
                f"tensor {name}: a float8 matrix has a float scale for each block of {block}; found "
                f"{weight.dtype} {weight.shape} with scales {scale.dtype} {scale.shape}"
            )

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes

    def rows(self, start: int, stop: int) -> mx.array:
        high, wide = self.block
        first = start // high
        scales = self.scale.rows(first, -(-stop // high)).astype(mx.float32)
        scales = mx.repeat(scales[mx.arange(start, stop) // high - first], wide, axis=1)[:, : self.shape[-1]]
        return mx.from_fp8(self.weight.rows(start, stop), mx.float32) * scales
