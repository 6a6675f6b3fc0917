"""GPTQ: quantize column by column; later columns compensate the error of earlier ones.

Source: arXiv:2210.17323. With H = E[x xᵀ], the second moments of the inputs x, an error d of a row
costs d H dᵀ, the expected squared error of its product. This implementation differs from the paper
in these points:

- Columns with large inputs are quantized first ("act order"): their errors cost most, and more
  columns are left to compensate them. The order is by groups and within groups, so that groups stay
  contiguous.
- Grids are those of ``scale_search``, searched for each group either after error feedback from the
  groups before it (arXiv:2505.14638), or for all groups in advance ("static groups"). With grids
  from the smallest to the largest weight, error feedback can do worse than rounding.
- Grids found on the way are refined by coordinate descent on d H dᵀ: group by group, scale and bias
  by least squares, then each code.
- Off-diagonal elements of H are shrunk in proportion to how few tokens there are.
"""

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.methods.hessian import ColumnBlock
from mlxarch.quantize.methods.rounding import encode_affine, min_max_grid
from mlxarch.quantize.methods.scale_search import Grid, nearest_values, search_grids

BLOCK_WIDTH = 1024  # columns per block with static groups, which bounds the memory of H
DESCENT_PASSES = 2  # over all groups: the first reduces the error by 4 %, the second by 1 %
# Determinant relative to the product of the diagonal, below which the scale stays as it is
MIN_DETERMINANT = 1e-5


class ColumnFeedback:
    """Error feedback across columns, from the inputs (T, in) of a matrix.

    Args:
        inputs: input vectors of the matrix, (T, in).
        static_groups: find the grids of all groups before any error feedback and keep them, and
            feed errors back within blocks of ``BLOCK_WIDTH`` columns only. Takes a third of the
            time; the KL divergence is about 8 % larger.

    Attributes:
        blocks: blocks of columns within which errors are fed back; one for all columns without
            static groups.
        importance: mean square of each input channel, (in,).
    """

    def __init__(self, inputs: np.ndarray, static_groups: bool = False) -> None:
        channels = inputs.shape[1]
        width = BLOCK_WIDTH if static_groups else channels
        self.static_groups = static_groups
        self.blocks = [ColumnBlock(inputs, start, width) for start in range(0, channels, width)]
        diagonals = [block.hessian.diagonal() for block in self.blocks]
        self.importance = mx.array(np.concatenate(diagonals))

    def quantize(
        self, weights: np.ndarray, to: Quantization, dtype: mx.Dtype
    ) -> tuple[Grid, np.ndarray]:
        """Quantize rows (R, in) to affine codes with error feedback across columns.

        Args:
            weights: the rows, (R, in).
            to: quantization format.
            dtype: type in which scales and biases are stored.

        Returns:
            Scales and biases of each group, and the dequantized values (R, in).
        """
        return _quantize_parts([(self, slice(None))], weights, to, dtype)

    def apply_hessian(self, change: np.ndarray) -> np.ndarray:
        """Return change @ H, (R, in), with H = E[x xᵀ] the second moments of the inputs.

        The inner product with the change d of a row is d H dᵀ, the expected squared error that the
        change causes in the row's product with an input.

        Args:
            change: change of the rows, (R, in).
        """
        products = [change[:, block.start : block.stop] @ block.hessian for block in self.blocks]
        return np.concatenate(products, axis=1)

    def expected_error(self, inputs: np.ndarray) -> float:
        """Predict the squared error of a row's products, summed over inputs (T, in).

        Assumes that quantizing a column causes an independent error of variance 1, which later
        columns of its block compensate by error feedback. Without feedback the result would be the
        sum of the squared inputs. Used to predict the gain of error feedback on held-out inputs.
        """
        total = 0.0
        for block in self.blocks:
            columns, factor = block.ordered_factor(len(block.hessian))
            # effect of each column's error together with its compensation by later columns
            effects = inputs[:, columns] @ (factor / factor.diagonal()[:, None]).T
            total += float(np.vdot(effects, effects))
        return total


class ClusteredFeedback:
    """Error feedback across columns with a separate Hessian for each cluster of rows.

    Args:
        feedbacks: feedback of each cluster, all without static groups and of the same number of
            channels.
        assignments: cluster index of each row, (R,).
    """

    def __init__(self, feedbacks: Sequence[ColumnFeedback], assignments: np.ndarray) -> None:
        self._order = np.argsort(assignments, kind="stable")
        self._inverse_order = np.argsort(self._order)
        clusters, starts = np.unique(assignments[self._order], return_index=True)
        spans = pairwise([*starts.tolist(), len(assignments)])
        self._parts = [
            (feedbacks[cluster], slice(*span))
            for cluster, span in zip(clusters, spans, strict=True)
        ]

    def quantize(
        self, weights: np.ndarray, to: Quantization, dtype: mx.Dtype
    ) -> tuple[Grid, np.ndarray]:
        """Quantize rows (R, in), each with the feedback of its cluster; see ``ColumnFeedback``."""
        grid, values = _quantize_parts(self._parts, weights[self._order], to, dtype)
        inverse = mx.array(self._inverse_order)
        return Grid(grid.scales[inverse], grid.biases[inverse]), values[self._inverse_order]

    def apply_hessian(self, change: np.ndarray) -> np.ndarray:
        """Return change @ H for a change (R, in) of the rows, with H of each row's cluster."""
        change = change[self._order]
        products = [feedback.apply_hessian(change[rows]) for feedback, rows in self._parts]
        return np.concatenate(products)[self._inverse_order]


def quantize_with_feedback(
    feedback: ColumnFeedback | ClusteredFeedback,
    rows: mx.array,
    to: Quantization,
    dtype: mx.Dtype,
) -> tuple[dict[str, mx.array], np.ndarray, np.ndarray]:
    """Quantize rows (R, in) with error feedback, or round to nearest the rows it makes worse.

    Rows are compared by d H dᵀ, the expected squared error of their products, with d the change of
    the row and H = E[x xᵀ] the second moments of the inputs.

    Args:
        feedback: error feedback across columns.
        rows: weights (R, in).
        to: quantization format of mode affine.
        dtype: type of scales and biases.

    Returns:
        The arrays of ``mx.quantize``; the cost d H dᵀ of each row, (R,); and that of rounding to
        nearest, (R,).
    """
    weights = np.array(rows.astype(mx.float32))
    rounded_grid, rounded = round_values(weights, to, dtype)
    grid, values = feedback.quantize(weights, to, dtype)

    def row_costs(values: np.ndarray) -> np.ndarray:
        change = values - weights
        return np.einsum("ri,ri->r", feedback.apply_hessian(change), change)

    cost = row_costs(values)
    rounding_cost = row_costs(rounded)
    better = (mx.array(cost) < mx.array(rounding_cost))[:, None, None]
    best_grid = Grid(
        mx.where(better, grid.scales, rounded_grid.scales),
        mx.where(better, grid.biases, rounded_grid.biases),
    )
    best_values = mx.where(better[..., 0], mx.array(values), mx.array(rounded))
    groups = mx.unflatten(best_values, -1, (-1, to.group_size))
    arrays = encode_affine(groups, best_grid, to.bits, dtype)
    return arrays, np.minimum(cost, rounding_cost), rounding_cost


def _quantize_parts(
    parts: Sequence[tuple[ColumnFeedback, slice]],
    weights: np.ndarray,
    to: Quantization,
    dtype: mx.Dtype,
) -> tuple[Grid, np.ndarray]:
    """Quantize parts of rows (R, in), each with its own feedback; return grids and values."""
    size = to.group_size
    first = parts[0][0]
    values = np.empty(weights.shape[::-1], np.float32)
    grids = np.empty((2, weights.shape[1] // size, len(weights)), np.float32)
    if first.static_groups:
        grids[:] = _search_column_grids(weights.T, to, dtype, first.importance)
    for number in range(len(first.blocks)):
        sweeps = [_BlockSweep(feedback, number, weights[rows], size) for feedback, rows in parts]
        for start in range(0, len(sweeps[0].columns), size):
            group = slice(start, start + size)
            if not first.static_groups:
                remaining = np.concatenate([sweep.remaining[group] for sweep in sweeps], axis=1)
                importance = [sweep.row_importance(group) for sweep in sweeps]
                group_grids = _search_column_grids(
                    remaining,
                    to,
                    dtype,
                    mx.concatenate(importance) if len(importance) > 1 else importance[0][0],
                )
                for sweep, (_, rows) in zip(sweeps, parts, strict=True):
                    grids[:, sweep.columns[start] // size, rows] = group_grids[:, 0, rows]
            for sweep, (_, rows) in zip(sweeps, parts, strict=True):
                columns = sweep.columns[group]
                column_grids = grids[:, :, rows][:, columns // size]
                values[columns, rows] = sweep.quantize_group(group, column_grids, 2**to.bits - 1)
    if not first.static_groups:
        for feedback, rows in parts:
            grids[:, :, rows], values[:, rows] = _coordinate_descent(
                feedback.blocks[0], weights[rows].T, grids[:, :, rows], values[:, rows], to, dtype
            )
    scales, biases = (mx.array(np.ascontiguousarray(part.T))[..., None] for part in grids)
    return Grid(scales, biases), values.T


class _BlockSweep:
    """Quantization of rows (R, in) through one block of columns.

    Attributes:
        columns: column indices in the order of quantization.
        remaining: weights of these columns after the error feedback so far, (columns, R).
    """

    def __init__(
        self, feedback: ColumnFeedback, number: int, weights: np.ndarray, group_size: int
    ) -> None:
        block = feedback.blocks[number]
        size = len(block.hessian) if feedback.static_groups else group_size
        self.columns, self._factor = block.ordered_factor(size)
        self.remaining = np.ascontiguousarray(weights.T[self.columns])
        self._importance = feedback.importance

    def row_importance(self, group: slice) -> mx.array:
        """Return the importance of the columns of a group, repeated for each row, (R, columns)."""
        importance = self._importance[mx.array(self.columns[group])]
        return mx.broadcast_to(importance, (self.remaining.shape[1], len(importance)))

    def quantize_group(self, group: slice, grids: np.ndarray, max_code: int) -> np.ndarray:
        """Quantize consecutive columns and feed their errors back to the columns after them.

        Args:
            group: range of the columns within ``columns``.
            grids: scales and biases, (2, columns, R).
            max_code: largest code, 2^bits − 1.

        Returns:
            Dequantized values (columns, R).
        """
        weights = self.remaining[group]
        factor = self._factor[group, group.start :]
        scales, biases = grids
        values = np.empty_like(weights)
        errors = np.empty_like(weights)
        count = len(weights)
        divisors = np.where(scales == 0, np.float32(1), scales)
        for j in range(count):
            codes = np.clip(np.rint((weights[j] - biases[j]) / divisors[j]), 0, max_code)
            values[j] = codes * scales[j] + biases[j]
            errors[j] = (weights[j] - values[j]) / factor[j, j]
            weights[j + 1 :] -= factor[j, j + 1 : count, None] * errors[j]
        self.remaining[group.stop :] -= factor[:, count:].T @ errors
        return values


def _coordinate_descent(
    block: ColumnBlock,
    weights: np.ndarray,
    grids: np.ndarray,
    values: np.ndarray,
    to: Quantization,
    dtype: mx.Dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Refine grids (2, groups, R) and values (N, R) by coordinate descent on the cost d H dᵀ.

    Each pass goes over the groups, those with the largest inputs first: scale and bias by least
    squares, then one code after the other. H is shrunk and damped.

    Args:
        block: the columns.
        weights: original weights (N, R).
    """
    size = to.group_size
    max_code = 2**to.bits - 1
    share, diagonal = block.regularization()
    grids = grids.copy()
    values = values.copy()
    change = values - weights
    gradient = share * (block.hessian @ change) + diagonal[:, None] * change  # half of the cost's
    group_importance = block.hessian.diagonal().reshape(-1, size).sum(1)
    group_order = np.argsort(-group_importance, kind="stable").tolist()
    for index in DESCENT_PASSES * group_order:
        group = slice(index * size, (index + 1) * size)
        hessian = share * block.hessian[group, group] + np.diag(diagonal[group])
        current = values[group].copy()
        slope = gradient[group].copy()
        scale, bias = grids[:, index]
        codes = np.rint((current - bias) / np.where(scale == 0, np.float32(1), scale))
        grids[:, index] = _refit_grid(codes, slope, hessian, scale, bias, dtype)
        scale, bias = grids[:, index]
        slope += hessian @ (codes * scale + bias - current)
        current = codes * scale + bias
        divisor = np.where(scale == 0, np.float32(1), scale)
        for j in range(size):
            target = current[j] - slope[j] / hessian[j, j]
            code = np.clip(np.rint((target - bias) / divisor), 0, max_code)
            step = code * scale + bias - current[j]
            slope += hessian[:, j, None] * step
            current[j] += step
        change = current - values[group]
        gradient += share * (block.hessian[:, group] @ change)
        gradient[group] += diagonal[group, None] * change
        values[group] = current
    return grids, values


def _refit_grid(
    codes: np.ndarray,
    gradient: np.ndarray,
    hessian: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    dtype: mx.Dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales and biases (R,) of one group that minimize the cost for fixed codes.

    They are rounded to ``dtype``; where that does not reduce the cost, the given ones are kept.

    Args:
        codes: codes (group_size, R).
        gradient: half the gradient of the cost with respect to the values, (group_size, R).
        hessian: H of the group's columns, (group_size, group_size).
        scale: current scales, (R,).
        bias: current biases, (R,).
        dtype: type of stored scales and biases.
    """
    product = hessian @ codes
    scale_scale = (codes * product).sum(0)
    scale_bias = product.sum(0)
    bias_bias = hessian.sum()
    scale_gradient = (codes * gradient).sum(0)
    bias_gradient = gradient.sum(0)
    determinant = scale_scale * bias_bias - scale_bias * scale_bias
    # equal codes do not determine a scale
    regular = determinant > MIN_DETERMINANT * scale_scale * bias_bias
    numerator = scale_bias * bias_gradient - bias_bias * scale_gradient
    scale_step = np.where(regular, numerator / np.where(regular, determinant, 1), 0)
    new_scale = _cast(scale + scale_step, dtype)
    scale_step = new_scale - scale
    new_bias = _cast(bias - (bias_gradient + scale_bias * scale_step) / bias_bias, dtype)
    bias_step = new_bias - bias
    cost_change = (
        2 * (scale_gradient * scale_step + bias_gradient * bias_step)
        + scale_scale * scale_step**2
        + 2 * scale_bias * scale_step * bias_step
        + bias_bias * bias_step**2
    )
    better = (cost_change < 0) & (new_scale != 0)
    return np.where(better, new_scale, scale), np.where(better, new_bias, bias)


def _cast(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return np.asarray(mx.array(values).astype(dtype).astype(mx.float32))


def _search_column_grids(
    columns: np.ndarray, to: Quantization, dtype: mx.Dtype, importance: mx.array
) -> np.ndarray:
    """Search the grids of columns (N, R); return scales and biases (2, groups, R)."""
    grid = search_grids(mx.array(columns.T), to, dtype, importance).grid
    return np.stack([np.asarray(part)[..., 0].T for part in grid])


def round_values(weights: np.ndarray, to: Quantization, dtype: mx.Dtype) -> tuple[Grid, np.ndarray]:
    """Round rows (R, in) to the nearest of levels from each group's minimum to its maximum.

    Args:
        weights: rows (R, in).
        to: quantization format.
        dtype: type in which scales and biases are stored, for which codes are chosen.

    Returns:
        Scales and biases of each group, and the rounded values (R, in).
    """
    groups = mx.unflatten(mx.array(weights), -1, (-1, to.group_size))
    scales, biases = min_max_grid(groups, to.bits)
    grid = Grid(scales.astype(dtype).astype(mx.float32), biases.astype(dtype).astype(mx.float32))
    return grid, nearest_values(groups, grid, to.bits)
