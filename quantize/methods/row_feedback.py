"""Error feedback across the rows of a matrix, weighted by the gradients of its outputs.

An error e of a token's outputs costs (g · e)² / 2 of its log-likelihood, with g the gradient with
respect to the outputs; errors of rows whose gradients are correlated add up or cancel. With
gradients g and inputs x taken as independent, a matrix error D (R, in) costs tr(G D H Dᵀ) / 2 in
expectation, with G = E[g gᵀ] and H = E[x xᵀ], the Kronecker-factored Fisher information. GPTQ,
which looks at inputs only, sets G to the identity. Source of the two-sided error: arXiv:2505.22988.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxarch.quantize.calibration.layerwise import ignore_float_errors
from mlxarch.quantize.methods.hessian import cholesky_upper, shrink_off_diagonal
from mlxarch.quantize.methods.scale_search import Grid

MIN_BLOCK_ROWS = 16  # rows quantized at once, without feedback among themselves
MAX_BLOCK_ROWS = 64
TARGET_BLOCKS = 8  # number of blocks aimed at within those limits
MAX_NORM_RATIO = 2  # gradient norms are clipped at this multiple of the median: the first tokens
# of a text may have gradients larger than all others together

QuantizeBlock = Callable[[np.ndarray], tuple[Grid, np.ndarray]]
"""Quantize rows (N, in): returns their grids and their dequantized values (N, in)."""


class RowFeedback:
    """Quantization of rows block by block, each compensating the errors of earlier blocks.

    A change D (R, in) of R rows costs tr(G D H Dᵀ) / 2 in log-likelihood, with G = E[g gᵀ] the
    second moments of the output gradients and H = E[x xᵀ] those of the inputs.

    Args:
        gradients: output gradients (T, R) of T tokens.

    Attributes:
        fisher: G, the second moments of the gradients, (R, R), of mean 1 on the diagonal.
    """

    def __init__(self, gradients: np.ndarray) -> None:
        self.fisher = _gradient_moments(gradients)
        self._blocks = _interleaved_blocks(len(self.fisher))
        self._order = np.concatenate(self._blocks)
        self._inverse_order = np.argsort(self._order)
        self._factor = cholesky_upper(self.fisher[np.ix_(self._order, self._order)])

    def quantize(
        self, weights: np.ndarray, quantize_block: QuantizeBlock
    ) -> tuple[Grid, np.ndarray]:
        """Quantize rows (R, in) block by block; return their grids and dequantized values (R, in).

        With G = F Fᵀ and F upper triangular, errors D cost the squared norm of Fᵀ D. Before a block
        is quantized, it is shifted by what cancels the contribution of earlier blocks to its rows
        of Fᵀ D; later rows remain free.
        """
        exact = weights[self._order]
        errors = np.empty_like(exact)
        grids = list[Grid]()
        start = 0
        for block in self._blocks:
            rows = slice(start, start + len(block))
            correction = np.linalg.solve(
                self._factor[rows, rows].T, self._factor[:start, rows].T @ errors[:start]
            )
            grid, values = quantize_block(exact[rows] - correction)
            errors[rows] = values - exact[rows]
            grids.append(grid)
            start = rows.stop
        inverse = mx.array(self._inverse_order)
        grid = Grid(
            mx.concatenate([grid.scales for grid in grids])[inverse],
            mx.concatenate([grid.biases for grid in grids])[inverse],
        )
        return grid, (exact + errors)[self._inverse_order]


def _gradient_moments(gradients: np.ndarray) -> np.ndarray:
    """Estimate the second moments (R, R) of gradients (T, R), scaled to mean 1 on the diagonal.

    Token norms are clipped and correlations shrunk. Returns the identity if the gradients are zero
    or not finite.
    """
    with ignore_float_errors():
        gradients = gradients / np.abs(gradients).max()  # squares of small ones would underflow
        norms = np.linalg.norm(gradients, axis=1)
    positive = norms[norms > 0]
    if not np.isfinite(norms).all() or not positive.size:
        return np.eye(gradients.shape[1], dtype=np.float32)
    limit = MAX_NORM_RATIO * np.median(positive)
    gradients *= np.minimum(1, limit / np.maximum(norms, positive.min()))[:, None]
    gradients /= np.sqrt(np.vdot(gradients, gradients) / gradients.shape[1])
    return shrink_off_diagonal(gradients.T @ gradients, len(positive))


def _interleaved_blocks(rows: int) -> list[np.ndarray]:
    """Return the row indices of each block: every n-th row, as neighbors are most correlated."""
    block_rows = min(max(rows // TARGET_BLOCKS, MIN_BLOCK_ROWS), MAX_BLOCK_ROWS)
    count = -(-rows // block_rows)
    return [np.arange(first, rows, count) for first in range(count)]
