"""Hessian of a matrix's inputs for GPTQ (arXiv:2210.17323): estimated, damped and factorized.

The Hessian of the squared error of a product with respect to a row of weights is, up to a factor,
H = E[x xᵀ], the second moments of the inputs x.
"""

import numpy as np

DAMPING = 0.1  # added to the diagonal of H, relative to its mean
SHRINKAGE_TOKENS = 2  # tokens per channel at which off-diagonal elements count half


class ColumnBlock:
    """Consecutive columns of a matrix, which compensate each other's errors, and their Hessian.

    Args:
        inputs: inputs of the whole matrix, (T, in).
        start: first column.
        width: number of columns, at most.

    Attributes:
        start: first column.
        stop: one past the last column.
        hessian: E[x xᵀ] of these columns, (N, N); zeros if an input is not finite.
    """

    def __init__(self, inputs: np.ndarray, start: int, width: int) -> None:
        x = inputs[:, start : start + width]
        self.start = start
        self.stop = start + x.shape[1]
        self._tokens = len(x)
        self.hessian = x.T @ x / np.float32(max(len(x), 1))
        if not np.isfinite(self.hessian).all():
            # caused by a weight that is not finite, which is reported when it is written
            self.hessian = np.zeros_like(self.hessian)
        self._ordered_factors = dict[int, tuple[np.ndarray, np.ndarray]]()

    def regularization(self) -> tuple[np.float32, np.ndarray]:
        """Return a factor s and a vector v (N,): the regularized Hessian is s H + diag(v).

        Off-diagonal elements of H are shrunk by s; v restores the diagonal and adds the damping.
        """
        diagonal = self.hessian.diagonal()
        share = _shrinkage(self._tokens, len(diagonal))
        return share, (1 - share) * diagonal + np.float32(_damping(diagonal))

    def ordered_factor(self, group_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns in the order of quantization, and U with Uᵀ U = H⁻¹ in that order.

        Columns with large inputs come first. Groups of ``group_size`` columns stay together.
        """
        if group_size not in self._ordered_factors:
            order = _activation_order(self.hessian.diagonal(), group_size)
            hessian = shrink_off_diagonal(self.hessian[np.ix_(order, order)], self._tokens)
            self._ordered_factors = {group_size: (self.start + order, inverse_factor(hessian))}
        return self._ordered_factors[group_size]


def _activation_order(squares: np.ndarray, group_size: int) -> np.ndarray:
    """Return column indices by decreasing mean square: groups first, then within each group."""
    groups = squares.reshape(-1, group_size)
    group_order = np.argsort(-groups.sum(1), kind="stable")
    within = np.argsort(-groups, axis=1, kind="stable")
    return (group_size * group_order[:, None] + within[group_order]).ravel()


def shrink_off_diagonal(moments: np.ndarray, samples: int) -> np.ndarray:
    """Shrink the off-diagonal elements of a moment matrix (N, N) estimated from few samples.

    The fewer samples, the more: they estimate the moments of single channels better than those of
    pairs.
    """
    shrunk = moments * _shrinkage(samples, len(moments))
    np.fill_diagonal(shrunk, moments.diagonal())
    return shrunk


def _shrinkage(samples: int, channels: int) -> np.float32:
    return np.float32(samples / (samples + SHRINKAGE_TOKENS * channels))


def _damping(diagonal: np.ndarray) -> float:
    return DAMPING * float(diagonal.mean()) or 1.0


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Return the upper triangular U with Uᵀ U = H⁻¹.

    Row j, divided by its diagonal element, says how later columns compensate column j.
    """
    return np.triu(np.linalg.inv(cholesky_upper(hessian)))


def cholesky_upper(moments: np.ndarray) -> np.ndarray:
    """Return the upper triangular R with R Rᵀ = H, for a damped H.

    Damping makes float32 precise enough. It is ``DAMPING`` times the mean diagonal, and grows
    tenfold until H is positive definite.
    """
    damped = moments.copy()
    damping = _damping(damped.diagonal())
    while True:
        np.fill_diagonal(damped, moments.diagonal() + damping)
        try:  # from the lower Cholesky factor of H with rows and columns reversed
            return np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10
