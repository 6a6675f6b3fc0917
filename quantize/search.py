"""Scales and biases that fit the weights that matter: those of the input channels with large values.

Rounding spreads the levels evenly over a group, from its smallest weight to its largest. Here the range is drawn in
from either side, by several shares, and from each of them scale and bias move by weighted least squares, in turn with
the choice of codes; the best grid on the way counts. The weight of a channel is the mean square of its inputs, so that
what is minimised is the expected square of the error of a product, as far as inputs are uncorrelated. A group keeps the
grid of rounding where that is better.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.quantize.rounding import affine, grid_of

# how far a start goes from the weighted mean of a group towards its smallest and its largest weight
STARTS = ((1, 1), (0.9, 0.9), (0.75, 0.75), (0.55, 0.55), (1, 0.7), (0.7, 1), (0.85, 0.55), (0.55, 0.85))
FEW_STARTS = STARTS[:1]  # of 8 bits: with so many levels nobody wants to give up a part of the range
NUDGES = (-1, 0, 1)  # of 8 bits: units in the last place of a scale in bfloat16, and codes, by which grids are tried
STRIDES = (3, 3, 2, 1)  # times the step of least squares from each: the codes follow, and one step is far too short
BFLOAT16 = 2**-8  # units in the last place of it, at the most
FLOOR = 1e-6  # of a weight, the mean being 1: a channel that was silent may yet speak
CPU_BLOCK, BLOCK = 1 << 17, 1 << 24  # elements at a time: on a CPU they stay in its cache


class Grid(NamedTuple):
    """Scale and bias of each group, (R, groups, 1), in float32."""

    scales: mx.array
    biases: mx.array


class Found(NamedTuple):
    """Grids, and their weighted squared errors beside those of rounding, (R, groups, 1)."""

    grid: Grid
    error: mx.array
    rounded: mx.array


def search(rows: mx.array, to: Quantization, dtype: mx.Dtype, importance: mx.array) -> Found:
    """Affine grids for finite ``rows`` (R, columns), of numbers that ``dtype`` has; evaluated.

    Args:
        importance: of the columns, (columns,), or of every row's, (R, columns). Where all are 0, all count the same.
    """
    groups = mx.unflatten(rows.astype(mx.float32), -1, (-1, to.group_size))
    weights = weights_of(importance, to.group_size)
    block = CPU_BLOCK if mx.default_device() == mx.cpu else BLOCK
    step = max(block // (groups.shape[1] * groups.shape[2]), 1)
    found: list[Found] = []
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        found.append(_search(groups[part], weights if len(weights) == 1 else weights[part], to.bits, dtype))
        mx.eval(found[-1])
    grid = Grid(*(mx.concatenate([each.grid[part] for each in found]) for part in range(2)))
    return Found(grid, mx.concatenate([each.error for each in found]), mx.concatenate([each.rounded for each in found]))


def quantize(rows: mx.array, to: Quantization, dtype: mx.Dtype, importance: mx.array) -> dict[str, mx.array]:
    """Pack rows with what ``search`` finds."""
    grid = search(rows, to, dtype, importance).grid
    return affine(mx.unflatten(rows.astype(mx.float32), -1, (-1, to.group_size)), grid, to.bits, dtype)


def weights_of(importance: mx.array, group_size: int) -> mx.array:
    """(columns,) or (R, columns) -> (1 or R, groups, group_size), of mean 1 in each group."""
    importance = importance.astype(mx.float32).reshape(-1, importance.shape[-1] // group_size, group_size)
    mean = importance.mean(-1, keepdims=True)
    return mx.where(mean > 0, importance / mx.where(mean > 0, mean, 1), 1) + FLOOR


def _search(groups: mx.array, weights: mx.array, bits: int, dtype: mx.Dtype) -> Found:
    total = weights.sum(-1, keepdims=True)
    plain = Grid(*(part.astype(dtype).astype(mx.float32) for part in grid_of(groups, bits)))
    middle = (weights * groups).sum(-1, keepdims=True) / total
    low, high = groups.min(-1, keepdims=True) - middle, groups.max(-1, keepdims=True) - middle
    best, error = plain, mx.full(total.shape, mx.inf)
    for down, up in STARTS if bits < 8 else FEW_STARTS:
        first = middle + low * down
        grid = Grid(mx.maximum((middle + high * up - first) / (2**bits - 1), 1e-7), first)
        for stride in (*STRIDES, None):
            new, step = _step(groups, weights, total, grid, bits)
            best, error = _choose(new < error, grid, best), mx.minimum(new, error)
            if stride is not None:
                grid = Grid(*(part + stride * change for part, change in zip(grid, step, strict=True)))
    stored = _as_stored(groups, weights, total, best, bits, dtype)
    error, rounded = (error_of(groups, weights, grid, bits) for grid in (stored, plain))
    return Found(_choose(error < rounded, stored, plain), mx.minimum(error, rounded), rounded)


def codes_of(groups: mx.array, grid: Grid, bits: int) -> mx.array:
    """The nearest codes, as floats."""
    step = mx.where(grid.scales == 0, 1, grid.scales)  # a small type may have flushed it to zero
    return mx.clip(mx.round((groups - grid.biases) / step), 0, 2**bits - 1)


def values_of(groups: mx.array, grid: Grid, bits: int) -> np.ndarray:
    """The nearest values that a grid has, (R, columns)."""
    return np.asarray((codes_of(groups, grid, bits) * grid.scales + grid.biases).flatten(1))


def error_of(groups: mx.array, weights: mx.array, grid: Grid, bits: int) -> mx.array:
    """The weighted squared error of each group, (R, groups, 1)."""
    rest = groups - (codes_of(groups, grid, bits) * grid.scales + grid.biases)
    return (weights * rest.square()).sum(-1, keepdims=True)


def _step(groups: mx.array, weights: mx.array, total: mx.array, grid: Grid, bits: int) -> tuple[mx.array, Grid]:
    """The errors of a grid, and how it has to change to be the best for its codes."""
    codes = codes_of(groups, grid, bits)
    rest = groups - (codes * grid.scales + grid.biases)
    times_rest, times_codes = weights * rest, weights * codes
    r, cr = times_rest.sum(-1, keepdims=True), (times_rest * codes).sum(-1, keepdims=True)
    c, cc = times_codes.sum(-1, keepdims=True), (times_codes * codes).sum(-1, keepdims=True)
    spread = total * cc - c * c
    alike = spread <= 1e-6 * total * cc  # all codes are one: only the bias can follow
    scale = mx.where(alike, 0, (total * cr - c * r) / mx.where(alike, 1, spread))
    bias = (r - c * scale) / total
    error = (times_rest * rest).sum(-1, keepdims=True)
    return error, Grid(scale, bias)


def _as_stored(groups: mx.array, weights: mx.array, total: mx.array, grid: Grid, bits: int, dtype: mx.Dtype) -> Grid:
    """The grid in ``dtype``, its bias moved to make up for what the scale lost.

    The last of 256 levels is farther away than bfloat16 has digits for: there some neighbours are tried as well, and
    biases a few codes off, of which one comes to lie where it should.
    """
    coarse = bits == 8 and dtype == mx.bfloat16
    best, error = grid, mx.full(total.shape, mx.inf)
    for nudge in NUDGES if coarse else (0,):
        scales = (grid.scales * (1 + nudge * BFLOAT16)).astype(dtype).astype(mx.float32)
        rest = groups - codes_of(groups, Grid(scales, grid.biases), bits) * scales
        bias = (weights * rest).sum(-1, keepdims=True) / total
        for codes in NUDGES if coarse else (0,):
            stored = Grid(scales, (bias + codes * scales).astype(dtype).astype(mx.float32))
            new = error_of(groups, weights, stored, bits)
            best, error = _choose(new < error, stored, best), mx.minimum(new, error)
    return best


def _choose(condition: mx.array, one: Grid, other: Grid) -> Grid:
    return Grid(*(mx.where(condition, a, b) for a, b in zip(one, other, strict=True)))
