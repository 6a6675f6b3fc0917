"""Quantization of one matrix by its input statistics and output gradients."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.calibration.input_stats import InputStats
from mlxarch.quantize.calibration.layerwise import ignore_float_errors
from mlxarch.quantize.calibration.vocab_clusters import VocabClusters
from mlxarch.quantize.methods.gptq import (
    BLOCK_WIDTH,
    ClusteredFeedback,
    ColumnFeedback,
    quantize_with_feedback,
    round_values,
)
from mlxarch.quantize.methods.rounding import encode_affine
from mlxarch.quantize.methods.row_chunks import ErrorStats
from mlxarch.quantize.methods.row_feedback import RowFeedback
from mlxarch.quantize.methods.scale_search import Grid, nearest_values, search_grids

# Channels per token up to which method search feeds errors back: beyond, shrinkage leaves at most
# a ninth of the correlations
MAX_CHANNELS_PER_TOKEN = 4
MAX_COUPLED_ROWS = 1536  # rows that compensate each other's errors
MAX_COUPLED_BYTES = 8 << 20  # size of these rows in float32


class GridMethod(Protocol):
    """Method that quantizes rows of a matrix by what is known of its inputs x."""

    def quantize(
        self, weights: np.ndarray, to: Quantization, dtype: mx.Dtype
    ) -> tuple[Grid, np.ndarray]:
        """Quantize rows (R, in) to affine codes.

        Args:
            weights: the rows, (R, in).
            to: quantization format.
            dtype: type in which scales and biases are stored.

        Returns:
            Scales and biases of each group, and the dequantized values (R, in).
        """
        ...

    def apply_hessian(self, change: np.ndarray) -> np.ndarray:
        """Return change @ H for a change (R, in), with the method's model of H = E[x xᵀ].

        The inner product with the change d of a row, d H dᵀ, is the expected squared error of the
        row's product with an input.
        """
        ...


class ScaleSearch:
    """Scale search without error feedback: H is diagonal.

    Args:
        importance: mean square of each input channel, (in,).
    """

    def __init__(self, importance: np.ndarray) -> None:
        self.importance = importance.astype(np.float32)

    def quantize(
        self, weights: np.ndarray, to: Quantization, dtype: mx.Dtype
    ) -> tuple[Grid, np.ndarray]:
        """Quantize rows (R, in) by scale search; return their grids and dequantized values."""
        rows = mx.array(weights)
        grid = search_grids(rows, to, dtype, mx.array(self.importance)).grid
        groups = mx.unflatten(rows, -1, (-1, to.group_size))
        return grid, nearest_values(groups, grid, to.bits)

    def apply_hessian(self, change: np.ndarray) -> np.ndarray:
        """Return change @ H for a change (R, in), with the importance on the diagonal of H."""
        return change * self.importance


@dataclass
class FeedbackCache:
    """Most recent ColumnFeedback, reused by matrices with the same input, such as q, k and v.

    Attributes:
        inputs: input vectors that ``feedback`` was computed from, in arrays (T, in).
        feedback: the feedback, or None.
    """

    inputs: list[np.ndarray] = field(default_factory=list)
    feedback: ColumnFeedback | None = None

    def get(self, inputs: list[np.ndarray], static_groups: bool) -> ColumnFeedback:
        """Return the feedback for inputs (T, in), cached if they are the same array objects."""
        cached = len(inputs) == len(self.inputs) and all(
            new is old for new, old in zip(inputs, self.inputs, strict=True)
        )
        if self.feedback is None or not cached or self.feedback.static_groups != static_groups:
            self.clear()
            joined = np.concatenate(inputs) if len(inputs) > 1 else inputs[0]
            self.feedback = ColumnFeedback(joined, static_groups)
            self.inputs = list(inputs)
        return self.feedback

    def clear(self) -> None:
        """Drop the feedback and free its memory."""
        self.inputs = []
        self.feedback = None


def has_enough_tokens(tokens: int, channels: int, static_groups: bool) -> bool:
    """Return whether there are enough tokens for error feedback across columns.

    With static groups (method search) one token for ``MAX_CHANNELS_PER_TOKEN`` channels of a block,
    else any token.
    """
    required = min(channels, BLOCK_WIDTH) // MAX_CHANNELS_PER_TOKEN if static_groups else 1
    return tokens >= max(required, 1)


class MatrixQuantizer:
    """Quantizer for the rows of a matrix, or of a stack of expert matrices, in consecutive chunks.

    Args:
        inputs: input statistics. If they include the input vectors, errors are fed back across
            columns.
        out_features: rows of a matrix; a stack has that many for each expert.
        output_gradients: (expert, start, stop) -> gradients (T, stop − start) of these outputs; T
            is 0 if there are none. With gradients, errors are also fed back across rows.
        static_groups: find grids before error feedback, see ``ColumnFeedback``.
        correction: added to the weights before quantization, (rows, in), see
            ``asymmetric_calibration``.
        feedback_cache: cache shared by the matrices of a layer.
        clusters: clusters of the rows of an LM head, each with a Hessian of its own.

    Attributes:
        coupled_rows: rows that compensate each other's errors, counted from the first row of a
            matrix; a chunk should hold a multiple of them.
    """

    def __init__(
        self,
        inputs: InputStats,
        out_features: int,
        output_gradients: Callable[[int, int, int], np.ndarray],
        static_groups: bool = False,
        correction: np.ndarray | None = None,
        feedback_cache: FeedbackCache | None = None,
        clusters: VocabClusters | None = None,
    ) -> None:
        self._inputs = inputs
        self._out_features = out_features
        self._output_gradients = output_gradients
        self._static_groups = static_groups
        self._correction = correction
        self._importance = inputs.importance()
        self._feedback_cache = feedback_cache or FeedbackCache()
        self._clusters = clusters
        self._cluster_feedbacks = list[ColumnFeedback]()
        self._current: tuple[int, GridMethod] | None = None  # expert and its method
        row_bytes = 4 * self._importance.shape[1]
        self.coupled_rows = max(min(MAX_COUPLED_ROWS, MAX_COUPLED_BYTES // row_bytes), 1)

    @ignore_float_errors()
    def quantize_rows(
        self, rows: mx.array, start: int, to: Quantization, dtype: mx.Dtype, stats: ErrorStats
    ) -> dict[str, mx.array]:
        """Quantize consecutive rows of the matrix or stack.

        Args:
            rows: weights (R, in).
            start: index of the first row among all rows of the stack.
            to: quantization format of mode affine.
            dtype: type of scales and biases.
            stats: receives the weighted errors of the method and of rounding to nearest.

        Returns:
            The arrays of ``mx.quantize``: "weight" with packed codes, "scales" and "biases".
        """
        if self._correction is not None:
            correction = mx.array(self._correction[start : start + len(rows)])
            rows = rows.astype(mx.float32) + correction
        chunks = [
            self._quantize_chunk(
                rows[first - start : stop - start], expert, first, to, dtype, stats
            )
            for expert, first, stop in self._coupled_ranges(start, start + len(rows))
        ]
        return {name: mx.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _quantize_chunk(
        self,
        rows: mx.array,
        expert: int,
        start: int,
        to: Quantization,
        dtype: mx.Dtype,
        stats: ErrorStats,
    ) -> dict[str, mx.array]:
        """Quantize rows of one matrix that may compensate each other's errors."""
        first_output = start % self._out_features
        gradients = self._output_gradients(expert, first_output, first_output + len(rows))
        if self._clusters:
            method = self._clustered_method(self._clusters, start, start + len(rows))
        else:
            method = self._method_of_expert(expert)
        if len(gradients):
            feedback = RowFeedback(gradients)
            return _quantize_with_row_feedback(rows, to, dtype, stats, method, feedback)
        if isinstance(method, (ColumnFeedback, ClusteredFeedback)):
            arrays, error, rounding_error = quantize_with_feedback(method, rows, to, dtype)
            stats.add_weighted(error, rounding_error)
            return arrays
        found = search_grids(rows, to, dtype, mx.array(self._importance[expert]))
        stats.add_weighted(np.asarray(found.error), np.asarray(found.rounding_error))
        groups = mx.unflatten(rows.astype(mx.float32), -1, (-1, to.group_size))
        return encode_affine(groups, found.grid, to.bits, dtype)

    def _coupled_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (expert, start, stop) of ranges of ``coupled_rows`` at most, each in one matrix."""
        stacked = len(self._importance) > 1
        while start < stop:
            expert = start // self._out_features if stacked else 0
            end = (expert + 1) * self._out_features if stacked else stop
            range_end = min(start + self.coupled_rows, end, stop)
            yield expert, start, range_end
            start = range_end

    def _method_of_expert(self, expert: int) -> GridMethod:
        if self._current is None or self._current[0] != expert:
            tokens = self._inputs.counts[expert]
            channels = self._importance.shape[1]
            method: GridMethod = ScaleSearch(self._importance[expert])
            if self._inputs.inputs and has_enough_tokens(tokens, channels, self._static_groups):
                inputs = self._inputs.inputs[expert]
                method = self._feedback_cache.get(inputs, self._static_groups)
            self._current = expert, method
        return self._current[1]

    def _clustered_method(self, clusters: VocabClusters, start: int, stop: int) -> GridMethod:
        if not self._cluster_feedbacks:
            [[inputs]] = self._inputs.inputs
            position_weights = np.sqrt(clusters.position_weights)
            lookup_weights = np.sqrt(clusters.lookup_weights)
            for of_positions, of_lookups in zip(position_weights, lookup_weights, strict=True):
                lookups = len(inputs) - len(of_positions)
                weights = np.concatenate([of_positions, np.full(lookups, of_lookups)])
                self._cluster_feedbacks.append(ColumnFeedback(inputs * weights[:, None]))
        return ClusteredFeedback(self._cluster_feedbacks, clusters.assignments[start:stop])


def _quantize_with_row_feedback(
    rows: mx.array,
    to: Quantization,
    dtype: mx.Dtype,
    stats: ErrorStats,
    method: GridMethod,
    feedback: RowFeedback,
) -> dict[str, mx.array]:
    """Quantize rows (R, in) with error feedback across rows.

    If that costs more than rounding to nearest, the method without row feedback is tried, and then
    rounding is taken. The cost of a change D is tr(G D H Dᵀ).
    """
    weights = np.array(rows.astype(mx.float32))

    def cost(values: np.ndarray) -> np.ndarray:
        change = values - weights
        product = method.apply_hessian(change)
        return np.einsum("ri,ri->", feedback.fisher @ change, product).reshape(1)

    def quantize_block(block: np.ndarray) -> tuple[Grid, np.ndarray]:
        return method.quantize(block, to, dtype)

    rounded = round_values(weights, to, dtype)
    rounding_cost = cost(rounded[1])
    for quantize in (
        lambda: feedback.quantize(weights, quantize_block),
        lambda: quantize_block(weights),
        lambda: rounded,
    ):
        grid, values = quantize()
        error = cost(values)
        if error < rounding_cost:
            break
    stats.add_weighted(np.minimum(error, rounding_cost), rounding_cost)
    groups = mx.unflatten(mx.array(values), -1, (-1, to.group_size))
    return encode_affine(groups, grid, to.bits, dtype)
