"""Error feedback: what a column loses when it is packed, the columns behind it make up for as well as they can.

How well is told by H, the second moments of the inputs: the expected squared error of a product is d H dᵀ for a row
that is off by d. Source: arXiv:2210.17323. Columns with large inputs are taken first, for what these lose costs most,
and more columns are left to make up for it. Grids are those of ``search``, found group by group for the weights as the
feedback has left them, the columns of a group one after the other then (arXiv:2505.14638), or ahead of it; with grids
from the smallest to the largest weight, feedback can do worse than rounding. Grids found on the way settle in the end:
each by least squares for its codes, then each of these for all others, group after group.
"""

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.quantize.rounding import affine, grid_of
from mlxarch.quantize.search import Grid, search, values_of

DAMPING = 0.1  # of the mean of H's diagonal, added to it
WIDTH = 1024  # columns that make up for each other's errors where grids are found ahead: H of more takes its memory
PASSES = 2  # over all groups, until they are taken as settled: the first wins 4 % of the error, the second 1 %
DISTINCT = 1e-5  # a determinant over the product of its diagonal, above which two unknowns are told apart
SHRINKAGE = 2  # tokens for each channel that leave half of what was seen of pairs of channels; more tokens leave more


class Feedback:
    """What the inputs (T, in) of a matrix say about all its rows.

    Args:
        ahead: whether all grids are found before any error is fed back, and stay as they are, for a third of the time
            and some 8 % of divergence more, and errors are fed back within ``WIDTH`` columns only.
    """

    def __init__(self, inputs: np.ndarray, ahead: bool = False) -> None:
        width = WIDTH if ahead else inputs.shape[1]
        self.ahead = ahead
        self.blocks = [_Block(inputs, start, width) for start in range(0, inputs.shape[1], width)]
        self.importance = mx.array(np.concatenate([block.moments.diagonal() for block in self.blocks]))

    def choose(self, exact: np.ndarray, to: Quantization, dtype: mx.Dtype) -> tuple[Grid, np.ndarray]:
        """Grids for rows (R, in), and the values that come of them."""
        return _chosen([(self, slice(None))], exact, to, dtype)

    def weigh(self, change: np.ndarray) -> np.ndarray:
        """(R, in) times H: its product with the change is the expected squared error."""
        return np.concatenate([change[:, block.start : block.stop] @ block.moments for block in self.blocks], axis=1)

    def errors(self, inputs: np.ndarray) -> float:
        """The squared error of a row's products with inputs (T, in), summed, to be expected where grids are found ahead
        and every column is off by one when its turn comes; without feedback it is the sum of the inputs' squares.
        """
        total = 0.0
        for block in self.blocks:
            columns, steps = block.ordered(len(block.moments))
            moved = inputs[:, columns] @ (steps / steps.diagonal()[:, None]).T  # by each column and those behind it
            total += float(np.vdot(moved, moved))
        return total


class Several:
    """Feedback for rows (R, in) of which each has one of its own among some: of like shape, all not ``ahead``."""

    def __init__(self, feedbacks: Sequence[Feedback], which: np.ndarray) -> None:
        self._order = np.argsort(which, kind="stable")
        self._back = np.argsort(self._order)
        numbers, starts = np.unique(which[self._order], return_index=True)
        spans = pairwise([*starts.tolist(), len(which)])
        self._parts = [(feedbacks[number], slice(*span)) for number, span in zip(numbers, spans, strict=True)]

    def choose(self, exact: np.ndarray, to: Quantization, dtype: mx.Dtype) -> tuple[Grid, np.ndarray]:
        """See ``Feedback``."""
        grid, values = _chosen(self._parts, exact[self._order], to, dtype)
        return Grid(*(part[mx.array(self._back)] for part in grid)), values[self._back]

    def weigh(self, change: np.ndarray) -> np.ndarray:
        """See ``Feedback``."""
        change = change[self._order]
        return np.concatenate([feedback.weigh(change[rows]) for feedback, rows in self._parts])[self._back]


def pack_fed(
    method: Feedback | Several, rows: mx.array, to: Quantization, dtype: mx.Dtype
) -> tuple[dict[str, mx.array], np.ndarray, np.ndarray]:
    """Pack rows (R, in) as affine codes; a row that rounding serves better is rounded.

    Returns:
        The parts; the expected squared errors (R,) of the rows, and what they are rounded.
    """
    exact = np.array(rows.astype(mx.float32))
    plain = rounded_values(exact, to, dtype)
    found = method.choose(exact, to, dtype)
    error, rounded = (
        np.einsum("ri,ri->r", method.weigh(values - exact), values - exact) for _, values in (found, plain)
    )
    better = (mx.array(error) < mx.array(rounded))[:, None, None]
    grid = Grid(*(mx.where(better, a, b) for a, b in zip(found[0], plain[0], strict=True)))
    values = mx.where(better[..., 0], mx.array(found[1]), mx.array(plain[1]))
    parts = affine(mx.unflatten(values, -1, (-1, to.group_size)), grid, to.bits, dtype)
    return parts, np.minimum(error, rounded), rounded


def _chosen(
    parts: Sequence[tuple[Feedback, slice]], exact: np.ndarray, to: Quantization, dtype: mx.Dtype
) -> tuple[Grid, np.ndarray]:
    """Grids and values of rows (R, in), by the feedback of each part of them."""
    size, first = to.group_size, parts[0][0]
    values = np.empty(exact.shape[::-1], np.float32)
    grids = np.empty((2, exact.shape[1] // size, len(exact)), np.float32)
    if first.ahead:
        grids[:] = _searched(exact.T, to, dtype, first.importance)
    for number in range(len(first.blocks)):
        runs = [_Run(feedback, number, exact[rows], size) for feedback, rows in parts]
        for start in range(0, len(runs[0].columns), size):
            now = slice(start, start + size)
            if not first.ahead:
                left = np.concatenate([run.left[now] for run in runs], axis=1)
                each = [run.importance(now) for run in runs]
                found = _searched(left, to, dtype, mx.concatenate(each) if len(each) > 1 else each[0][0])
                for run, (_, rows) in zip(runs, parts, strict=True):
                    grids[:, run.columns[start] // size, rows] = found[:, 0, rows]
            for run, (_, rows) in zip(runs, parts, strict=True):
                columns = run.columns[now]
                values[columns, rows] = run.feed(now, grids[:, :, rows][:, columns // size], 2**to.bits - 1)
    if not first.ahead:
        for feedback, rows in parts:
            own = grids[:, :, rows], values[:, rows]
            grids[:, :, rows], values[:, rows] = _settled(feedback.blocks[0], exact[rows].T, *own, to, dtype)
    return Grid(*(mx.array(np.ascontiguousarray(part.T))[..., None] for part in grids)), values.T


class _Block:
    """Columns that make up for each other's errors: from ``start`` to ``stop`` of those of inputs (T, in)."""

    def __init__(self, inputs: np.ndarray, start: int, width: int) -> None:
        own = inputs[:, start : start + width]
        self.start, self.stop, self._tokens = start, start + own.shape[1], len(own)
        self.moments = own.T @ own / np.float32(max(len(own), 1))
        if not np.isfinite(self.moments).all():  # the weight that made them so is refused when it is written
            self.moments = np.zeros_like(self.moments)
        self._ordered = dict[int, tuple[np.ndarray, np.ndarray]]()

    def parts(self) -> tuple[np.float32, np.ndarray]:
        """How much of its moments H counts, and what is to be added to their diagonal: H as it is shrunk and damped."""
        own = self.moments.diagonal()
        share = _share(self._tokens, len(own))
        return share, (1 - share) * own + np.float32(_damping(own))

    def ordered(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Its columns in the order in which they are taken, groups of so many together, and their steps."""
        if size not in self._ordered:
            order = _order(self.moments.diagonal(), size)
            steps = _steps(shrunk(self.moments[np.ix_(order, order)], self._tokens))
            self._ordered = {size: (self.start + order, steps)}
        return self._ordered[size]


class _Run:
    """Rows (R, in) on their way through a block.

    Attributes:
        columns: of the matrix, in the order in which they are taken.
        left: the rows there, (columns, R), as the feedback has left them.
    """

    def __init__(self, feedback: Feedback, number: int, exact: np.ndarray, size: int) -> None:
        block = feedback.blocks[number]
        self.columns, self._steps = block.ordered(len(block.moments) if feedback.ahead else size)
        self.left = np.ascontiguousarray(exact.T[self.columns])
        self._importance = feedback.importance

    def importance(self, now: slice) -> mx.array:
        """Of each row, (R, columns)."""
        own = self._importance[mx.array(self.columns[now])]
        return mx.broadcast_to(own, (self.left.shape[1], len(own)))

    def feed(self, now: slice, grids: np.ndarray, highest: int) -> np.ndarray:
        """Values of some columns, by their scales and biases (2, columns, R); those behind them in ``left`` follow."""
        own, steps, (scales, biases) = self.left[now], self._steps[now, now.start :], grids
        values, errors, count = np.empty_like(own), np.empty_like(own), len(own)
        divisors = np.where(scales == 0, np.float32(1), scales)
        for j in range(count):
            codes = np.clip(np.rint((own[j] - biases[j]) / divisors[j]), 0, highest)
            values[j] = codes * scales[j] + biases[j]
            errors[j] = (own[j] - values[j]) / steps[j, j]
            own[j + 1 :] -= steps[j, j + 1 : count, None] * errors[j]
        self.left[now.stop :] -= steps[:, count:].T @ errors
        return values


def _settled(
    block: _Block, exact: np.ndarray, grids: np.ndarray, values: np.ndarray, to: Quantization, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Better grids (2, groups, R) and values (N, R) for columns (N, R), by coordinate descent on what they cost."""
    size, highest, (share, alone) = to.group_size, 2**to.bits - 1, block.parts()
    grids, values, change = grids.copy(), values.copy(), values - exact
    slopes = share * (block.moments @ change) + alone[:, None] * change  # half of the cost's
    for group in PASSES * np.argsort(-block.moments.diagonal().reshape(-1, size).sum(1), kind="stable").tolist():
        now = slice(group * size, (group + 1) * size)
        near = share * block.moments[now, now] + np.diag(alone[now])
        own, slope, (scale, bias) = values[now].copy(), slopes[now].copy(), grids[:, group]
        codes = np.rint((own - bias) / np.where(scale == 0, np.float32(1), scale))
        scale, bias = grids[:, group] = _fitted(codes, slope, near, scale, bias, dtype)
        slope += near @ (codes * scale + bias - own)
        own = codes * scale + bias
        divisor = np.where(scale == 0, np.float32(1), scale)
        for j in range(size):
            code = np.clip(np.rint((own[j] - slope[j] / near[j, j] - bias) / divisor), 0, highest)
            moved = code * scale + bias - own[j]
            slope += near[:, j, None] * moved
            own[j] += moved
        change = own - values[now]
        slopes += share * (block.moments[:, now] @ change)
        slopes[now] += alone[now, None] * change
        values[now] = own
    return grids, values


def _fitted(
    codes: np.ndarray, slope: np.ndarray, moments: np.ndarray, scale: np.ndarray, bias: np.ndarray, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The scales and biases (R,) that cost least with codes (size, R), as ``dtype`` has them, or those there are."""
    weighed = moments @ codes
    both, mixed, one = (codes * weighed).sum(0), weighed.sum(0), moments.sum()
    of_scale, of_bias = (codes * slope).sum(0), slope.sum(0)
    determinant = both * one - mixed * mixed
    apart = determinant > DISTINCT * both * one  # codes that are all the same tell no scale
    step = np.where(apart, (mixed * of_bias - one * of_scale) / np.where(apart, determinant, 1), 0)
    new_scale = _as_stored(scale + step, dtype)
    step = new_scale - scale
    new_bias = _as_stored(bias - (of_bias + mixed * step) / one, dtype)
    shift = new_bias - bias
    cost = 2 * (of_scale * step + of_bias * shift) + both * step**2 + 2 * mixed * step * shift + one * shift**2
    better = (cost < 0) & (new_scale != 0)
    return np.where(better, new_scale, scale), np.where(better, new_bias, bias)


def _as_stored(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return np.asarray(mx.array(values).astype(dtype).astype(mx.float32))


def _order(squares: np.ndarray, size: int) -> np.ndarray:
    """Columns with large inputs first: groups of so many, and within them."""
    groups = squares.reshape(-1, size)
    first, within = np.argsort(-groups.sum(1), kind="stable"), np.argsort(-groups, axis=1, kind="stable")
    return (size * first[:, None] + within[first]).ravel()


def _searched(columns: np.ndarray, to: Quantization, dtype: mx.Dtype, importance: mx.array) -> np.ndarray:
    """Scales and biases for columns (N, R), (2, groups, R)."""
    return np.stack([np.asarray(part)[..., 0].T for part in search(mx.array(columns.T), to, dtype, importance).grid])


def shrunk(moments: np.ndarray, tokens: int) -> np.ndarray:
    """Less of what is off the diagonal: few tokens tell more of each channel than of pairs of them."""
    own = moments * _share(tokens, len(moments))
    np.fill_diagonal(own, moments.diagonal())
    return own


def _share(tokens: int, channels: int) -> np.float32:
    return np.float32(tokens / (tokens + SHRINKAGE * channels))


def _damping(diagonal: np.ndarray) -> float:
    return DAMPING * float(diagonal.mean()) or 1.0


def _steps(moments: np.ndarray) -> np.ndarray:
    """U, upper triangular with Uᵀ U = H⁻¹: row j tells how the columns behind j make up for its error."""
    return np.triu(np.linalg.inv(factor_of(moments)))


def factor_of(moments: np.ndarray) -> np.ndarray:
    """R, upper triangular with R Rᵀ = H, which is damped, and so needs no more than float32."""
    own = moments.copy()
    damping = _damping(own.diagonal())
    while True:
        np.fill_diagonal(own, moments.diagonal() + damping)
        try:  # from the Cholesky factor of H with rows and columns reversed
            return np.linalg.cholesky(own[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10


def rounded_values(exact: np.ndarray, to: Quantization, dtype: mx.Dtype) -> tuple[Grid, np.ndarray]:
    """The grid of rounding, as ``dtype`` has it, and the rows (R, in) rounded to it."""
    groups = mx.unflatten(mx.array(exact), -1, (-1, to.group_size))
    grid = Grid(*(part.astype(dtype).astype(mx.float32) for part in grid_of(groups, to.bits)))
    return grid, values_of(groups, grid, to.bits)
