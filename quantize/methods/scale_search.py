"""Search for affine scales and biases that minimize the activation-weighted error.

Rounding to nearest spreads the levels evenly from a group's smallest weight to its largest. Here
the range is shrunk from both ends by several amounts; from each start, weighted least squares for
scale and bias alternates with rounding to codes, and the best grid on the way is kept. A weight
counts by its channel's importance, the mean square of the channel's inputs (as in AWQ,
arXiv:2306.00978), so the expected squared error of the product is minimized as far as inputs are
uncorrelated. A group keeps the grid of rounding to nearest where that is better.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.methods.rounding import encode_affine, min_max_grid

# Start ranges: shares of the distance from a group's weighted mean to its minimum and maximum
RANGE_SHARES = (
    (1, 1),
    (0.9, 0.9),
    (0.75, 0.75),
    (0.55, 0.55),
    (1, 0.7),
    (0.7, 1),
    (0.85, 0.55),
    (0.55, 0.85),
)
RANGE_SHARES_8_BITS = RANGE_SHARES[:1]  # with 256 levels, clipping never pays
# Factors of the least-squares step: codes follow each step, so a single full one is too short
STEP_FACTORS = (3, 3, 2, 1)
# Offsets of 8-bit grids in bfloat16: scales by units in the last place, biases by levels
STORED_OFFSETS = (-1, 0, 1)
BFLOAT16_ULP = 2**-8  # largest relative distance of neighboring bfloat16 numbers
# Weight of a channel without input in calibration, relative to the mean: it may have some later
MIN_WEIGHT = 1e-6
CPU_BLOCK_ELEMENTS = 1 << 17  # elements per step on a CPU, where they stay in its cache
BLOCK_ELEMENTS = 1 << 24  # elements per step on a GPU


class Grid(NamedTuple):
    """Scales and biases of the quantization grid of each group, each (R, groups, 1) in float32.

    The levels of a group are scale * code + bias, for codes 0 to 2^bits − 1.
    """

    scales: mx.array
    biases: mx.array


class SearchResult(NamedTuple):
    """Grids found by the search, with the weighted squared error (R, groups, 1) of each group.

    Attributes:
        grid: scales and biases.
        error: error with ``grid``, at most that of rounding.
        rounding_error: error with the min-max grid of rounding to nearest.
    """

    grid: Grid
    error: mx.array
    rounding_error: mx.array


def search_grids(
    rows: mx.array, to: Quantization, dtype: mx.Dtype, importance: mx.array
) -> SearchResult:
    """Find affine grids for finite rows (R, columns); the result is evaluated.

    Args:
        to: quantization format.
        dtype: type that scales and biases are stored in; the grids contain only its numbers.
        importance: mean square of the inputs of each column, (columns,), or (R, columns) for each
            row its own. All columns of a group count the same where all are 0.
    """
    groups = mx.unflatten(rows.astype(mx.float32), -1, (-1, to.group_size))
    weights = group_weights(importance, to.group_size)
    block = CPU_BLOCK_ELEMENTS if mx.default_device() == mx.cpu else BLOCK_ELEMENTS
    step = max(block // (groups.shape[1] * groups.shape[2]), 1)
    results: list[SearchResult] = []
    for start in range(0, len(groups), step):
        part = slice(start, start + step)
        part_weights = weights if len(weights) == 1 else weights[part]
        results.append(_search(groups[part], part_weights, to.bits, dtype))
        mx.eval(results[-1])
    grid = Grid(
        mx.concatenate([result.grid.scales for result in results]),
        mx.concatenate([result.grid.biases for result in results]),
    )
    return SearchResult(
        grid,
        mx.concatenate([result.error for result in results]),
        mx.concatenate([result.rounding_error for result in results]),
    )


def search_and_quantize(
    rows: mx.array, to: Quantization, dtype: mx.Dtype, importance: mx.array
) -> dict[str, mx.array]:
    """Quantize rows (R, columns) with the grids of ``search_grids``, whose arguments these are.

    Returns:
        The arrays of ``mx.quantize``: "weight", "scales" and "biases".
    """
    grid = search_grids(rows, to, dtype, importance).grid
    groups = mx.unflatten(rows.astype(mx.float32), -1, (-1, to.group_size))
    return encode_affine(groups, grid, to.bits, dtype)


def group_weights(importance: mx.array, group_size: int) -> mx.array:
    """Normalize importance to mean 1 in each group.

    (columns,) or (R, columns) -> (1 or R, groups, group_size).
    """
    groups = importance.shape[-1] // group_size
    importance = importance.astype(mx.float32).reshape(-1, groups, group_size)
    mean = importance.mean(-1, keepdims=True)
    return mx.where(mean > 0, importance / mx.where(mean > 0, mean, 1), 1) + MIN_WEIGHT


def _search(groups: mx.array, weights: mx.array, bits: int, dtype: mx.Dtype) -> SearchResult:
    total = weights.sum(-1, keepdims=True)
    rounding = Grid(*(part.astype(dtype).astype(mx.float32) for part in min_max_grid(groups, bits)))
    mean = (weights * groups).sum(-1, keepdims=True) / total
    low = groups.min(-1, keepdims=True) - mean
    high = groups.max(-1, keepdims=True) - mean
    best = rounding
    error = mx.full(total.shape, mx.inf)
    for low_share, high_share in RANGE_SHARES if bits < 8 else RANGE_SHARES_8_BITS:
        first = mean + low * low_share
        grid = Grid(mx.maximum((mean + high * high_share - first) / (2**bits - 1), 1e-7), first)
        for factor in (*STEP_FACTORS, None):
            new_error, step = _least_squares_step(groups, weights, total, grid, bits)
            best = _select(new_error < error, grid, best)
            error = mx.minimum(new_error, error)
            if factor is not None:
                grid = Grid(grid.scales + factor * step.scales, grid.biases + factor * step.biases)
    stored = _cast_grid(groups, weights, total, best, bits, dtype)
    error = weighted_error(groups, weights, stored, bits)
    rounding_error = weighted_error(groups, weights, rounding, bits)
    grid = _select(error < rounding_error, stored, rounding)
    return SearchResult(grid, mx.minimum(error, rounding_error), rounding_error)


def nearest_codes(groups: mx.array, grid: Grid, bits: int) -> mx.array:
    """Return the code of the level nearest to each weight, as floats (R, groups, group_size)."""
    step = mx.where(grid.scales == 0, 1, grid.scales)  # a small type may have flushed it to zero
    return mx.clip(mx.round((groups - grid.biases) / step), 0, 2**bits - 1)


def nearest_values(groups: mx.array, grid: Grid, bits: int) -> np.ndarray:
    """Return the level nearest to each weight: (R, groups, group_size) -> (R, columns)."""
    return np.asarray((nearest_codes(groups, grid, bits) * grid.scales + grid.biases).flatten(1))


def weighted_error(groups: mx.array, weights: mx.array, grid: Grid, bits: int) -> mx.array:
    """Return the weighted squared rounding error of each group, (R, groups, 1).

    Args:
        groups: weights of the matrix, (R, groups, group_size).
        weights: factors of the squared errors, (1 or R, groups, group_size).
        grid: scales and biases.
        bits: bits per code.
    """
    residual = groups - (nearest_codes(groups, grid, bits) * grid.scales + grid.biases)
    return (weights * residual.square()).sum(-1, keepdims=True)


def _least_squares_step(
    groups: mx.array, weights: mx.array, total: mx.array, grid: Grid, bits: int
) -> tuple[mx.array, Grid]:
    """Return the weighted error of a grid and the change that makes it optimal for its codes."""
    codes = nearest_codes(groups, grid, bits)
    residual = groups - (codes * grid.scales + grid.biases)
    weighted_residual = weights * residual
    weighted_codes = weights * codes
    r = weighted_residual.sum(-1, keepdims=True)
    cr = (weighted_residual * codes).sum(-1, keepdims=True)
    c = weighted_codes.sum(-1, keepdims=True)
    cc = (weighted_codes * codes).sum(-1, keepdims=True)
    determinant = total * cc - c * c
    singular = determinant <= 1e-6 * total * cc  # all codes are equal: only the bias can change
    scale = mx.where(singular, 0, (total * cr - c * r) / mx.where(singular, 1, determinant))
    bias = (r - c * scale) / total
    error = (weighted_residual * residual).sum(-1, keepdims=True)
    return error, Grid(scale, bias)


def _cast_grid(
    groups: mx.array, weights: mx.array, total: mx.array, grid: Grid, bits: int, dtype: mx.Dtype
) -> Grid:
    """Round a grid to ``dtype``, fitting the bias to the rounded scale.

    bfloat16 is too coarse for the last of 256 levels. There neighboring scales are tried, and
    biases some levels off, one of which lands close to the wanted one.
    """
    offsets = STORED_OFFSETS if bits == 8 and dtype == mx.bfloat16 else (0,)
    best = grid
    error = mx.full(total.shape, mx.inf)
    for scale_offset in offsets:
        scales = (grid.scales * (1 + scale_offset * BFLOAT16_ULP)).astype(dtype).astype(mx.float32)
        residual = groups - nearest_codes(groups, Grid(scales, grid.biases), bits) * scales
        bias = (weights * residual).sum(-1, keepdims=True) / total
        for bias_offset in offsets:
            stored_bias = (bias + bias_offset * scales).astype(dtype).astype(mx.float32)
            stored = Grid(scales, stored_bias)
            new_error = weighted_error(groups, weights, stored, bits)
            best = _select(new_error < error, stored, best)
            error = mx.minimum(new_error, error)
    return best


def _select(condition: mx.array, one: Grid, other: Grid) -> Grid:
    """Return grids that equal ``one`` where the condition holds, else ``other``."""
    return Grid(
        mx.where(condition, one.scales, other.scales),
        mx.where(condition, one.biases, other.biases),
    )
