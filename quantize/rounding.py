"""Floats to packed codes: rows in, the arrays of ``mx.quantize`` out."""

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def all_finite(rows: mx.array) -> bool:
    """Whether no element is NaN or infinite. A dot product carries both through, at memory speed."""
    values = np.asarray(rows.astype(mx.float32)).ravel()
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values @ values)) or bool(np.isfinite(values).all())  # large squares may overflow


def quantize(rows: mx.array, to: Quantization, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Pack finite ``rows`` (R, columns); ``dtype`` is what affine scales and biases are stored as.

    Affine codes are chosen for the scales as stored. ``mx.quantize`` on bfloat16 picks them for scales that it rounds
    afterwards, which costs a third more squared error at 8 bits; in float32 the two are the same, bit for bit.
    All is computed in float32, which every back end is fast at.
    """
    rows = rows.astype(mx.float32)
    if to.mode != "affine":
        return dict(zip(("weight", "scales"), mx.quantize(rows, to.group_size, to.bits, to.mode), strict=True))
    groups = mx.unflatten(rows, -1, (-1, to.group_size))
    return affine(groups, grid_of(groups, to.bits), to.bits, dtype)


def affine(groups: mx.array, grid: tuple[mx.array, mx.array], bits: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Pack groups (R, groups, group_size) with the scales and biases (R, groups, 1) of a grid."""
    scales, biases = (part.astype(dtype) for part in grid)
    step = scales.astype(mx.float32)
    codes = (groups - biases.astype(mx.float32)) / mx.where(step == 0, 1, step)  # float16 may have flushed it to zero
    codes = mx.clip(mx.round(codes), 0, 2**bits - 1).astype(mx.uint8)
    return {"weight": words_of(codes.flatten(1), bits), "scales": scales.squeeze(-1), "biases": biases.squeeze(-1)}


def grid_of(groups: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """Scale and bias (R, groups, 1) of evenly spaced levels over each group: one end is met exactly, and so is zero.

    Source: ``affine_quantize`` in MLX.
    """
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = mx.maximum((high - low) / (2**bits - 1), 1e-7)
    downwards = mx.abs(low) <= mx.abs(high)
    edge, scale = mx.where(downwards, high, low), mx.where(downwards, -scale, scale)
    zero = mx.round(edge / scale)  # the code that stands for 0
    return mx.where(zero == 0, scale, edge / zero), mx.where(zero == 0, 0, edge)


def words_of(codes: mx.array, bits: int) -> mx.array:
    """Codes (R, columns) in uint8 -> one stream of bits for each row, lowest first, in uint32."""
    width = bits
    while width % 8:  # join neighbours until they fill whole bytes
        width *= 2
        wide = _UNSIGNED[next(size for size in _UNSIGNED if 8 * size >= width)]
        high = mx.left_shift(codes[:, 1::2].astype(wide), mx.array(width // 2, wide))
        codes = codes[:, 0::2].astype(wide) | high
    octets = codes[..., None].view(mx.uint8)[..., : width // 8]
    return mx.contiguous(octets.flatten(1)).view(mx.uint32)
