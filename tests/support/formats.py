"""Number formats as their definitions say, in NumPy; arrays as virtual tensors."""

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.lazy_tensor import LazyTensor


class Held(LazyTensor):
    """A tensor that is an array."""

    def __init__(self, array: np.ndarray | mx.array) -> None:
        self.array = mx.array(array)
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def read_rows(self, start: int, stop: int) -> mx.array:
        return self.array.reshape(-1, self.shape[-1] if self.shape else 1)[start:stop]


# float8: a byte is sign, 4 bits of exponent, 3 of mantissa (OCP FP8, E4M3: no infinity, one NaN)


def e4m3() -> np.ndarray:
    """Value of every byte."""
    code = np.arange(256)
    sign, exponent, mantissa = np.where(code & 128, -1.0, 1.0), code >> 3 & 15, (code & 7) / 8
    values = sign * np.where(
        exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7)
    )
    values[[127, 255]] = np.nan
    return values


def fp8_of(values: np.ndarray, block: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Nearest codes, and a scale for every block that makes its largest value 448."""
    scales = np.ones([-(-size // block) for size in values.shape], np.float32)
    codes = np.zeros(values.shape, np.uint8)
    table = np.nan_to_num(e4m3(), nan=np.inf)
    for row, column in np.ndindex(*scales.shape):
        place = np.s_[row * block : (row + 1) * block, column * block : (column + 1) * block]
        scales[row, column] = np.abs(values[place]).max() / 448
        codes[place] = np.abs(values[place][..., None] / scales[row, column] - table).argmin(-1)
    return codes, scales


def of_fp8(codes: np.ndarray, scales: np.ndarray, block: int = 128) -> np.ndarray:
    wide = np.repeat(np.repeat(scales, block, axis=0), block, axis=1)[
        : codes.shape[0], : codes.shape[1]
    ]
    return (e4m3()[codes] * wide).astype(np.float32)
