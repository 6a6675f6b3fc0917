"""ggml block types that convert to MLX without loss: block bytes to codes, scales and biases.

Source: ggml-common.h and the functions dequantize_row_* of ggml-quants.c.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlxarch.quantization.scheme import Quantization

GROUP_SIZE = 32  # values that share a scale, in every type below


@dataclass(frozen=True)
class BlockLayout:
    """Byte layout of a block type, and its conversion to MLX's arrays.

    Attributes:
        bits: bits of a code.
        block: fields of a block, as a NumPy dtype.
        codes: blocks (N,) -> (N, values) in uint8, in the order of the values.
        scales: blocks -> scales and biases (N, groups); a bias is the value of code 0. MXFP4 has
            scales alone.
        factor: upper bound of |bias| as a multiple of the largest float16 in ``block``.
        exact: scales are exact in float16, and so are biases unless they overflow.
        mode: MLX's quantization mode.
    """

    bits: int
    block: np.dtype
    codes: Callable[[np.ndarray], np.ndarray]
    scales: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    factor: int = 1
    exact: bool = True
    mode: str = "affine"

    @property
    def quantization(self) -> Quantization:
        """MLX's quantization of the converted matrix."""
        return Quantization(self.bits, GROUP_SIZE, self.mode)


def _nibbles(octets: np.ndarray) -> np.ndarray:
    """Split bytes into nibbles: (…, n) -> (…, 2 n), the lower four bits of all, then the upper."""
    return np.concatenate([octets & 15, octets >> 4], axis=-1)


def _codes_4bit(blocks: np.ndarray) -> np.ndarray:
    return _nibbles(blocks["codes"])


def _codes_5bit(blocks: np.ndarray) -> np.ndarray:
    """Combine nibbles with the fifth bits: that of value i is bit i of ``high``."""
    high = blocks["high"][..., None] >> np.arange(GROUP_SIZE, dtype=np.uint32) & 1
    return _nibbles(blocks["codes"]) | high.astype(np.uint8) << 4


def _codes_8bit(blocks: np.ndarray) -> np.ndarray:
    return blocks["codes"] ^ 0x80  # -128 … 127 -> 0 … 255


def _symmetric_scales(zero: int) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    """Return scales and biases of a type whose code ``zero`` is 0: bias = -zero * scale."""
    return lambda blocks: (
        blocks["scale"][:, None],
        blocks["scale"][:, None].astype(np.float32) * -zero,
    )


def _stored_scales(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return blocks["scale"][:, None], blocks["bias"][:, None]


def _k_codes_4bit(blocks: np.ndarray) -> np.ndarray:
    """Split K-quant codes into nibbles: 32 bytes for each 64 values."""
    return _nibbles(blocks["codes"].reshape(*blocks.shape, 4, GROUP_SIZE)).reshape(
        *blocks.shape, -1
    )


def _k_codes_5bit(blocks: np.ndarray) -> np.ndarray:
    """Combine nibbles with the fifth bits: value i of group g has bit g of byte i of ``high``."""
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = blocks["high"][..., None, :] >> shifts & 1  # (N, groups, 32)
    return _k_codes_4bit(blocks) | high.reshape(*blocks.shape, -1) << 4


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Decode K-quant scales and biases.

    Twelve bytes hold six bits of scale and of minimum for each of eight groups. Both are multiplied
    by a float16 of the block.
    """
    first, second, third = np.split(blocks["group_scales"], 3, axis=-1)  # (N, 4) each
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1).astype(np.float32)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1).astype(
        np.float32
    )
    block_scale = blocks["scale"][:, None].astype(np.float32)
    block_minimum = blocks["bias"][:, None].astype(np.float32)
    return block_scale * scales, -block_minimum * minima


_SCALE = ("scale", "<f2")
_BIAS = ("bias", "<f2")
_GROUP_SCALES = ("group_scales", "u1", 12)
LOSSLESS_LAYOUTS = {
    "Q4_0": BlockLayout(
        4, np.dtype([_SCALE, ("codes", "u1", 16)]), _codes_4bit, _symmetric_scales(8), 8
    ),
    "Q4_1": BlockLayout(
        4, np.dtype([_SCALE, _BIAS, ("codes", "u1", 16)]), _codes_4bit, _stored_scales
    ),
    "Q5_0": BlockLayout(
        5,
        np.dtype([_SCALE, ("high", "<u4"), ("codes", "u1", 16)]),
        _codes_5bit,
        _symmetric_scales(16),
        16,
    ),
    "Q5_1": BlockLayout(
        5,
        np.dtype([_SCALE, _BIAS, ("high", "<u4"), ("codes", "u1", 16)]),
        _codes_5bit,
        _stored_scales,
    ),
    "Q8_0": BlockLayout(
        8, np.dtype([_SCALE, ("codes", "u1", 32)]), _codes_8bit, _symmetric_scales(128), 128
    ),
    "Q4_K": BlockLayout(
        4,
        np.dtype([_SCALE, _BIAS, _GROUP_SCALES, ("codes", "u1", 128)]),
        _k_codes_4bit,
        _k_scales,
        exact=False,
    ),
    "Q5_K": BlockLayout(
        5,
        np.dtype([_SCALE, _BIAS, _GROUP_SCALES, ("high", "u1", 32), ("codes", "u1", 128)]),
        _k_codes_5bit,
        _k_scales,
        exact=False,
    ),
    "MXFP4": BlockLayout(
        4,
        np.dtype([("exponent", "u1"), ("codes", "u1", 16)]),
        _codes_4bit,
        lambda b: (b["exponent"][:, None],),
        mode="mxfp4",
    ),
}
