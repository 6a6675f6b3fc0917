"""Error feedback: what a column loses when it is packed, the columns behind it make up for as well as they can.

How well is told by H, the second moments of the inputs: the expected squared error of a product is d H dᵀ for a row
that is off by d. Source: arXiv:2210.17323. Its grids are those of ``search``, found group by group for the weights as
the feedback has left them; with grids from the smallest to the largest weight, feedback can do worse than rounding.
"""

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.quantize.rounding import affine, grid_of
from mlxarch.quantize.search import Grid, search, values_of

DAMPING = 0.1  # of the mean of H's diagonal, added to it
SHRINKAGE = 2  # tokens for each channel that leave half of what was seen of pairs of channels; more tokens leave more


class Feedback:
    """What the inputs (T, in) of a matrix say about all its rows."""

    def __init__(self, inputs: np.ndarray) -> None:
        tokens, channels = inputs.shape
        self.moments = inputs.T @ inputs / np.float32(max(tokens, 1))
        if not np.isfinite(self.moments).all():  # the weight that made them so is refused when it is written
            self.moments = np.zeros_like(self.moments)
        self.importance = mx.array(np.ascontiguousarray(self.moments.diagonal()))
        self.steps = _steps(shrunk(self.moments, tokens))

    def pack(
        self, rows: mx.array, to: Quantization, dtype: mx.Dtype
    ) -> tuple[dict[str, mx.array], np.ndarray, np.ndarray]:
        """Pack rows (R, in) as affine codes; a row that rounding serves better is rounded.

        Returns:
            The parts; the expected squared errors (R,) of the rows, and what they are rounded.
        """
        exact = np.array(rows.astype(mx.float32))
        plain = rounded_values(exact, to, dtype)
        found = self.choose(exact, to, dtype)
        error, rounded = (
            np.einsum("ri,ri->r", self.weigh(values - exact), values - exact) for _, values in (found, plain)
        )
        better = (mx.array(error) < mx.array(rounded))[:, None, None]
        grid = Grid(*(mx.where(better, a, b) for a, b in zip(found[0], plain[0], strict=True)))
        values = mx.where(better[..., 0], mx.array(found[1]), mx.array(plain[1]))
        parts = affine(mx.unflatten(values, -1, (-1, to.group_size)), grid, to.bits, dtype)
        return parts, np.minimum(error, rounded), rounded

    def choose(self, exact: np.ndarray, to: Quantization, dtype: mx.Dtype) -> tuple[Grid, np.ndarray]:
        """Grids for rows (R, in), and the values that come of them."""
        left, values = np.ascontiguousarray(exact.T), np.empty(exact.shape[::-1], np.float32)  # column by column
        grids, size = [], to.group_size
        for start in range(0, len(left), size):
            own, steps = left[start : start + size], self.steps[start : start + size, start:]
            found = search(mx.array(own.T), to, dtype, self.importance[start : start + size]).grid
            grids.append(found)
            scale, bias = (np.asarray(part).reshape(-1) for part in found)
            step = np.where(scale == 0, np.float32(1), scale)
            errors = np.empty_like(own)
            for j in range(size):
                codes = np.clip(np.rint((own[j] - bias) / step), 0, 2**to.bits - 1)
                values[start + j] = codes * scale + bias
                errors[j] = (own[j] - values[start + j]) / steps[j, j]
                own[j + 1 :] -= steps[j, j + 1 : size, None] * errors[j]
            left[start + size :] -= steps[:, size:].T @ errors
        return Grid(*(mx.concatenate([grid[part] for grid in grids], axis=1) for part in range(2))), values.T

    def _error(self, change: np.ndarray) -> np.ndarray:
        return np.einsum("ri,ri->r", self.weigh(change), change)

    def weigh(self, change: np.ndarray) -> np.ndarray:
        """(R, in) times H: its product with the change is the expected squared error."""
        return change @ self.moments


def shrunk(moments: np.ndarray, tokens: int) -> np.ndarray:
    """Less of what is off the diagonal: few tokens tell more of each channel than of pairs of them."""
    own = moments * np.float32(tokens / (tokens + SHRINKAGE * len(moments)))
    np.fill_diagonal(own, moments.diagonal())
    return own


def _steps(moments: np.ndarray) -> np.ndarray:
    """U, upper triangular with Uᵀ U = H⁻¹: row j tells how the columns behind j make up for its error."""
    exact = moments.astype(np.float64) if len(moments) <= 4096 else moments
    return np.triu(np.linalg.inv(factor_of(exact))).astype(np.float32)


def factor_of(moments: np.ndarray) -> np.ndarray:
    """R, upper triangular with R Rᵀ = H, which is damped; in the precision of H."""
    own = moments.copy()
    damping = DAMPING * float(own.diagonal().mean()) or 1.0
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
