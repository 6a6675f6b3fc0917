"""Blocks of ggml that MLX packs alike: bytes in, the codes, scales and biases of MLX's groups out.

Source: ggml-common.h and the functions dequantize_row_* of ggml-quants.c.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlxarch.packing import Quantization

GROUP = 32  # values that share a scale, in every type that is repacked


@dataclass(frozen=True)
class Layout:
    """How a type becomes packed.

    Attributes:
        bits: of a code.
        block: its fields.
        codes: blocks (N,) -> (N, values) in uint8, in the order of the values.
        scales: blocks -> scales and biases (N, groups), a bias being what the code 0 stands for; of MXFP4 scales alone.
        factor: biases are at most that many times the largest float16 in ``block``.
        exact: float16 holds the scales, and float16 the biases unless they overflow.
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
        """MLX's settings."""
        return Quantization(self.bits, GROUP, self.mode)


def _halves(octets: np.ndarray) -> np.ndarray:
    """(…, n) bytes -> (…, 2 n): the lower four bits of all, then the upper."""
    return np.concatenate([octets & 15, octets >> 4], axis=-1)


def _four(blocks: np.ndarray) -> np.ndarray:
    return _halves(blocks["codes"])


def _five(blocks: np.ndarray) -> np.ndarray:
    """The fifth bit of value i is bit i of ``high``."""
    high = blocks["high"][..., None] >> np.arange(GROUP, dtype=np.uint32) & 1
    return _halves(blocks["codes"]) | high.astype(np.uint8) << 4


def _eight(blocks: np.ndarray) -> np.ndarray:
    return blocks["codes"] ^ 0x80  # -128 … 127 -> 0 … 255


def _around(zero: int) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    """Codes that stand around zero: the bias is so many scales."""
    return lambda blocks: (blocks["scale"][:, None], blocks["scale"][:, None].astype(np.float32) * -zero)


def _stored(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return blocks["scale"][:, None], blocks["bias"][:, None]


def _k_four(blocks: np.ndarray) -> np.ndarray:
    """Of 64 values each, 32 bytes."""
    return _halves(blocks["codes"].reshape(*blocks.shape, 4, GROUP)).reshape(*blocks.shape, -1)


def _k_five(blocks: np.ndarray) -> np.ndarray:
    """The fifth bit of value i in group g is bit g of byte i of ``high``."""
    high = blocks["high"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # (N, groups, 32)
    return _k_four(blocks) | high.reshape(*blocks.shape, -1) << 4


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Six bits of a scale and six of a minimum for each of eight groups, in twelve bytes, times a float16 each."""
    first, second, third = np.split(blocks["steps"], 3, axis=-1)  # (N, 4) each
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1).astype(np.float32)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1).astype(np.float32)
    wide = {name: blocks[name][:, None].astype(np.float32) for name in ("scale", "bias")}
    return wide["scale"] * scales, -wide["bias"] * minima


_SCALE, _BIAS, _STEPS = ("scale", "<f2"), ("bias", "<f2"), ("steps", "u1", 12)
REPACKED = {
    "Q4_0": Layout(4, np.dtype([_SCALE, ("codes", "u1", 16)]), _four, _around(8), 8),
    "Q4_1": Layout(4, np.dtype([_SCALE, _BIAS, ("codes", "u1", 16)]), _four, _stored),
    "Q5_0": Layout(5, np.dtype([_SCALE, ("high", "<u4"), ("codes", "u1", 16)]), _five, _around(16), 16),
    "Q5_1": Layout(5, np.dtype([_SCALE, _BIAS, ("high", "<u4"), ("codes", "u1", 16)]), _five, _stored),
    "Q8_0": Layout(8, np.dtype([_SCALE, ("codes", "u1", 32)]), _eight, _around(128), 128),
    "Q4_K": Layout(4, np.dtype([_SCALE, _BIAS, _STEPS, ("codes", "u1", 128)]), _k_four, _k_scales, exact=False),
    "Q5_K": Layout(
        5, np.dtype([_SCALE, _BIAS, _STEPS, ("high", "u1", 32), ("codes", "u1", 128)]), _k_five, _k_scales, exact=False
    ),
    "MXFP4": Layout(
        4, np.dtype([("exponent", "u1"), ("codes", "u1", 16)]), _four, lambda b: (b["exponent"][:, None],), mode="mxfp4"
    ),
}
