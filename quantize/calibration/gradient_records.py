"""Records of the inputs and output gradients of matrices during a backward pass."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

MAX_OUTPUTS = 1 << 15  # outputs up to which a matrix keeps the gradients of every token


@dataclass
class GradientRecord:
    """Inputs and output gradients of one use of a matrix, or of a stack of matrices.

    g is the gradient of a token's log-likelihood with respect to one output, which is the product
    of one row of the matrix with the input.

    Attributes:
        squared_gradients: sum of g² over the tokens for each row, (rows,).
        inputs: input vectors of each matrix of the stack, (T, in).
        gradients: g of each token for each matrix of the stack, (T, rows); None where only sums are
            kept.
        row_ids: indices of the rows within the parameter, where they are not all of them in order.
        lookup_ids: row that each token reads from an embedding table, (T,); its gradient is 1 there
            and 0 elsewhere.
        windows: shape (n, B, L) of the T tokens, where the tokens of each of B windows are summed;
            None where each token counts alone.
    """

    squared_gradients: np.ndarray
    inputs: list[np.ndarray]
    gradients: list[np.ndarray] | None = None
    row_ids: np.ndarray | None = None
    lookup_ids: np.ndarray | None = None
    windows: tuple[int, int, int] | None = None

    def gradients_of_rows(self, index: int, rows: np.ndarray) -> np.ndarray | None:
        """Return the output gradients of some rows of one matrix of the stack.

        Args:
            index: matrix of the stack, 0 for a single matrix.
            rows: row indices within that matrix.

        Returns:
            Gradients (T, rows) of T tokens; None if the gradients of single tokens were not kept.
        """
        if self.lookup_ids is not None:
            return (self.lookup_ids[:, None] == rows).astype(np.float32)
        return self.gradients[index][:, rows] if self.gradients else None

    def append(self, other: "GradientRecord") -> None:
        """Add the inputs and gradients of further tokens."""
        self.squared_gradients = self.squared_gradients + other.squared_gradients
        self.inputs = [np.concatenate(pair) for pair in zip(self.inputs, other.inputs, strict=True)]
        if self.gradients and other.gradients:
            pairs = zip(self.gradients, other.gradients, strict=True)
            self.gradients = [np.concatenate(pair) for pair in pairs]


def linear_record(
    x: mx.array, gradient: np.ndarray, transpose: bool, windows: tuple[int, int, int] | None
) -> GradientRecord:
    """Return inputs and output gradients of a product with one matrix.

    Args:
        x: left factor (..., in), or (..., out) for the transposed product.
        gradient: gradient of the log-likelihood with respect to the product, of the same leading
            shape.
        transpose: true for x @ weight.T; false for x @ weight, where x takes the place of the
            output gradients and ``gradient`` that of the inputs.
        windows: shape (n, B, L) of the tokens, see ``GradientRecord``.
    """
    gradients = gradient.reshape(-1, gradient.shape[-1])
    inputs = np.asarray(x.astype(mx.float32)).reshape(-1, x.shape[-1])
    if not transpose:
        gradients, inputs = inputs, gradients
    squares = np.square(gradients).sum(0, dtype=np.float64)
    kept = [gradients] if gradients.shape[-1] <= MAX_OUTPUTS else None
    return GradientRecord(squares, [inputs], kept, windows=windows)


def per_head_record(
    x: mx.array,
    gradient: np.ndarray,
    transpose: bool,
    row_ids: np.ndarray,
    windows: tuple[int, int, int] | None,
) -> GradientRecord:
    """Return the record of a matrix per head, from x (B, 1 or H, L, …), gradient (B, H, L, …)."""
    wide = np.broadcast_to(np.asarray(x.astype(mx.float32)), (*gradient.shape[:-1], x.shape[-1]))
    heads = [
        linear_record(mx.array(wide[:, head]), gradient[:, head], transpose, windows)
        for head in range(gradient.shape[1])
    ]
    squares = np.concatenate([head.squared_gradients for head in heads])
    gradients = [g for head in heads for g in head.gradients or ()]
    inputs = [x for head in heads for x in head.inputs]
    return GradientRecord(squares, inputs, gradients, row_ids, windows=windows)


def expert_record(
    x: mx.array, gradient: np.ndarray, expert_ids: mx.array, experts: int
) -> GradientRecord:
    """Return the record of expert matrices.

    Args:
        x: inputs (..., 1, in).
        gradient: output gradients (..., 1, out).
        expert_ids: selected experts (...).
        experts: number of experts.
    """
    ids = np.asarray(expert_ids).ravel()
    wide = mx.broadcast_to(x, (*expert_ids.shape, *x.shape[-2:]))
    inputs = np.asarray(wide.astype(mx.float32)).reshape(len(ids), -1)
    flat = gradient.reshape(len(ids), -1)
    gradients = [flat[ids == expert] for expert in range(experts)]
    squares = np.concatenate([np.square(part).sum(0, dtype=np.float64) for part in gradients])
    return GradientRecord(squares, [inputs[ids == expert] for expert in range(experts)], gradients)


def sample_rows(weights: np.ndarray, count: int) -> np.ndarray:
    """Sample row indices in proportion to weights (rows,), by systematic sampling.

    Args:
        weights: such as the squared output gradients of each row.
        count: number of samples; rows of large weight may repeat.

    Returns:
        Row indices (count,), in ascending order.
    """
    cumulative = np.cumsum(weights, dtype=np.float64)
    points = (np.arange(count) + 0.5) / count * cumulative[-1]
    return np.minimum(np.searchsorted(cumulative, points), len(weights) - 1)
