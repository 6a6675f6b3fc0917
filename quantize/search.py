"""Scales and biases that fit the weights that matter: those of the input channels with large values.

Rounding spreads the levels evenly over a group, from its smallest weight to its largest. Here the levels are drawn in
by several steps, and from the best of them scale and bias are solved for by weighted least squares, in turn with the
choice of codes. The weight of a channel is the mean square of its inputs, so that what is minimised is the expected
square of the error of a product, as far as inputs are uncorrelated. A group keeps the grid of rounding where that is
better.
"""

from typing import NamedTuple

import mlx.core as mx

from mlxarch.blocks import Quantization
from mlxarch.quantize.rounding import affine, grid_of

SHRINKS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.5)  # of the range of a group
STEPS = 6  # of least squares, from the best of them
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
    error, following = _improved(groups, weights, total, plain, bits)
    best = plain
    for share in SHRINKS:
        drawn_in = Grid(mx.maximum((high - low) * (share / (2**bits - 1)), 1e-7), middle + low * share)
        _, fitted = _improved(groups, weights, total, drawn_in, bits)
        new, then = _improved(groups, weights, total, fitted, bits)
        better = new < error
        best, following = _choose(better, fitted, best), _choose(better, then, following)
        error = mx.minimum(new, error)
    for _ in range(STEPS):
        grid = following
        new, following = _improved(groups, weights, total, grid, bits)
        best, error = _choose(new < error, grid, best), mx.minimum(new, error)
    stored = _as_stored(groups, weights, total, best, bits, dtype)
    error, rounded = (error_of(groups, weights, grid, bits) for grid in (stored, plain))
    return Found(_choose(error < rounded, stored, plain), mx.minimum(error, rounded), rounded)


def codes_of(groups: mx.array, grid: Grid, bits: int) -> mx.array:
    """The nearest codes, as floats."""
    step = mx.where(grid.scales == 0, 1, grid.scales)  # a small type may have flushed it to zero
    return mx.clip(mx.round((groups - grid.biases) / step), 0, 2**bits - 1)


def error_of(groups: mx.array, weights: mx.array, grid: Grid, bits: int) -> mx.array:
    """The weighted squared error of each group, (R, groups, 1)."""
    rest = groups - (codes_of(groups, grid, bits) * grid.scales + grid.biases)
    return (weights * rest.square()).sum(-1, keepdims=True)


def _improved(groups: mx.array, weights: mx.array, total: mx.array, grid: Grid, bits: int) -> tuple[mx.array, Grid]:
    """The errors of a grid, and the grid that is best for its codes.

    The change is solved for, not the grid, so that nothing large is subtracted from something as large.
    """
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
    return error, Grid(grid.scales + scale, grid.biases + bias)


def _as_stored(groups: mx.array, weights: mx.array, total: mx.array, grid: Grid, bits: int, dtype: mx.Dtype) -> Grid:
    """The grid in ``dtype``, its bias moved to make up for what the scale lost."""
    scales = grid.scales.astype(dtype).astype(mx.float32)
    rest = groups - codes_of(groups, grid, bits) * scales
    biases = (weights * rest).sum(-1, keepdims=True) / total
    return Grid(scales, biases.astype(dtype).astype(mx.float32))


def _choose(condition: mx.array, one: Grid, other: Grid) -> Grid:
    return Grid(*(mx.where(condition, a, b) for a, b in zip(one, other, strict=True)))
