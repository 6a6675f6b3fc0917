"""Sensitivity to quantization: the expected KL divergence of each matrix, by Fisher information.

The KL divergence of two similar models is half their squared distance in the Fisher metric
(arXiv:1412.1193). With the metric approximated by a block for each matrix and, within it, for each
row (arXiv:1503.05671), a change Δw of a row costs

    1/2 E[(Σ g (x · Δw))²]   nats per token,

where x is the input of the matrix at a token, g the gradient of the log-likelihood with respect to
the output of the row, and the sum runs over the tokens of a window. The tokens must be summed
before squaring: their inputs have much in common, so the errors that one Δw causes are correlated,
and summing the squares of single tokens would miss a fifth to a third of the divergence. The
gradients come from one backward pass with labels sampled from the model itself, which makes their
second moment the Fisher information; the inputs come from the forward pass.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxarch.blocks import Embedding
from mlxarch.blocks.linear import ExpertLinear, Matrix
from mlxarch.checkpoint.lazy_tensor import FLOAT_DTYPES
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress, silent
from mlxarch.quantization.scheme import Quantization, fit_group_size
from mlxarch.quantize.calibration.gradient_records import (
    GradientRecord,
    expert_record,
    linear_record,
    per_head_record,
    sample_rows,
)
from mlxarch.quantize.calibration.layerwise import LayerwiseModel
from mlxarch.quantize.calibration.numpy_attention import use_numpy_attention

SAMPLED_ROWS = 64  # rows sampled from a matrix, in proportion to their squared gradients
SAMPLED_ROWS_OUTSIDE_LAYERS = 512  # such matrices are few and cause a third of the divergence
MAX_LOGITS = 4 << 20  # logits computed at once; the backward pass holds several copies

RoundTrip = Callable[[str, int, mx.array, np.ndarray, Quantization], mx.array]
"""Quantize and dequantize some rows of a matrix.

Arguments: parameter path; index within a stack of matrices; rows (R, in); inputs (T, in) of the
    matrix; format.
Returns: the dequantized rows (R, in).
"""


def estimate_sensitivity(
    resolved: Resolved,
    tokens: mx.array,
    candidates: Sequence[Quantization],
    round_trip: RoundTrip,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, dict[Quantization, float]]:
    """Estimate the KL divergence that quantizing each matrix alone causes, in nats per token.

    The activations of one layer are in memory at a time; the hidden states between the layers are
    in a temporary file.

    Args:
        tokens: token ids (B, L), in range; 1,024 tokens in all are enough.
        candidates: quantization formats to evaluate.
        round_trip: quantizes and dequantizes rows, see RoundTrip.
        seed: seed of the sampled labels.
        progress: receives the weight bytes passed, forward and backward.

    Returns:
        Parameter path -> format -> nats per token.
    """
    return FisherPass(resolved, tokens, candidates, round_trip, seed, progress).run()


class FisherPass:
    """One forward and one backward pass that records inputs and output gradients of every matrix.

    The arguments are those of ``estimate_sensitivity``. Subclasses override what is recorded and
    what is made of it.
    """

    def __init__(
        self,
        resolved: Resolved,
        tokens: mx.array,
        candidates: Sequence[Quantization],
        round_trip: RoundTrip,
        seed: int,
        progress: Progress,
    ) -> None:
        self._tensors = resolved.parameters
        self._candidates = candidates
        self._round_trip = round_trip
        self._seed = seed
        self._progress = progress
        self._token_count = tokens.size
        self._layerwise = LayerwiseModel(resolved, [tokens])
        use_numpy_attention(self._layerwise.model)
        self._costs: dict[str, dict[Quantization, float]] = {}
        outside_layers = self._layerwise.parameter_paths(None)
        self._paths_in_layers = set(resolved.parameters).difference(outside_layers)
        self._records: dict[tuple[str, int], GradientRecord] = {}
        self._tokens_interact = False  # in layers, a token affects the labels of later tokens
        self._call_counts: Counter[str] | None = None  # per matrix; None outside a backward pass
        for path, module in self._layerwise.model.named_modules():
            if isinstance(module, Matrix) and module.quantizable:
                self._record_matrix(f"{path}.weight", module)

    def run(self, scratch: Path | None = None) -> dict[str, dict[Quantization, float]]:
        """Run both passes and return parameter path -> format -> nats per token.

        Args:
            scratch: folder of the temporary file with the hidden states of all layers; None for the
                system's default.
        """
        layerwise = self._layerwise
        layers = range(len(layerwise.model.layers))
        steps = 2 * len(layers) + 2
        total = 2 * sum(tensor.nbytes for tensor in self._tensors.values())  # read twice
        [context] = layerwise.contexts
        with tempfile.TemporaryFile(dir=scratch) as file:
            [state] = layerwise.embed()
            shared = []
            for index in layers:
                np.asarray(state).tofile(file)
                shared.append(dict(context.shared))
                [state] = layerwise.run_layer(index, [state])
                self._progress("measuring", total * (index + 1) // steps, total)
            gradient = self._head_backward(state)
            shared_gradients = [mx.zeros_like(leaf) for leaf in _float_leaves(context.shared)]
            self._tokens_interact = True
            for index in reversed(layers):
                file.seek(index * state.nbytes)
                state = mx.array(np.fromfile(file, np.float32, state.size).reshape(state.shape))
                gradient, shared_gradients = self._layer_backward(
                    index, state, shared.pop(), gradient, shared_gradients
                )
                self._progress("measuring", total * (steps - 1 - index) // steps, total)
        self._embedding_backward(gradient, shared_gradients)
        self._progress("measuring", total, total)
        return self._costs

    def _head_backward(self, state: mx.array) -> mx.array:
        """Return the gradient of the log-likelihood of sampled labels with respect to ``state``."""
        model = self._layerwise.model
        key = mx.random.key(self._seed)
        gradients = []
        flat = mx.flatten(state, 0, 1)[None]  # in the head, tokens are independent
        step = max(MAX_LOGITS // model.vocab_size, 1)
        with self._layerwise.loaded_parameters(None):
            for start in range(0, self._token_count, step):
                part = flat[:, start : start + step]
                key, part_key = mx.random.split(key)

                def log_likelihood(x: mx.array, key: mx.array = part_key) -> list[mx.array]:
                    logits = model.head(x)
                    labels = mx.stop_gradient(mx.random.categorical(logits, key=key))
                    chosen = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
                    return [chosen - mx.logsumexp(logits, axis=-1)]

                gradients += self._backward(log_likelihood, [part], [mx.ones(part.shape[:2])])
        self._evaluate_records()
        return mx.concatenate(gradients, axis=1).reshape(state.shape)

    def _layer_backward(
        self,
        index: int,
        state: mx.array,
        shared: dict[Hashable, Any],
        gradient: mx.array,
        shared_gradients: list[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        """Backpropagate through a layer.

        Args:
            index: layer index.
            state: hidden states before the layer.
            shared: entries of ``ForwardContext.shared`` before the layer.
            gradient: gradient with respect to the hidden states after the layer.
            shared_gradients: gradients with respect to the float arrays in ``shared`` after the
                layer.

        Returns:
            The gradients with respect to ``state`` and to the float arrays of ``shared``.
        """
        [context] = self._layerwise.contexts
        layer = self._layerwise.model.layers[index]

        def run(x: mx.array, *floats: mx.array) -> list[mx.array]:
            context.shared = _replace_float_leaves(shared, floats)
            return [layer(x, context, None), *_float_leaves(context.shared)]

        with self._layerwise.loaded_parameters(index):
            state_gradient, *others = self._backward(
                run, [state, *_float_leaves(shared)], [gradient, *shared_gradients]
            )
        self._evaluate_records()
        return state_gradient, others

    def _embedding_backward(self, gradient: mx.array, shared_gradients: list[mx.array]) -> None:
        """Backpropagate into embedding tables outside of layers; a row counts once per lookup."""
        layerwise = self._layerwise
        [context] = layerwise.contexts
        [tokens] = layerwise.batches
        modules = [(f"{path}.weight", module) for path, module in layerwise.model.named_modules()]
        outside = [(path, module) for path, module in modules if ".layers." not in path]
        tables = [(path, m, m.lookup) for path, m in outside if isinstance(m, Embedding)]
        lookup_ids: dict[str, mx.array] = {}

        def run(*offsets: mx.array) -> list[mx.array]:
            context.shared = {}
            for (path, table, original), offset in zip(tables, offsets, strict=True):

                def lookup(
                    tokens: mx.array,
                    path: str = path,
                    original: Any = original,
                    offset: mx.array = offset,
                ) -> mx.array:
                    lookup_ids[path] = tokens
                    return original(tokens) + offset

                table.lookup = lookup
            state = layerwise.model.embed(tokens, context)
            return [state, *_float_leaves(context.shared)]

        with layerwise.loaded_parameters(None):
            run(*(mx.zeros(1) for _ in tables))  # finds the ids that each table is asked for
            zeros = [
                mx.zeros((*lookup_ids[path].shape, table.weight.shape[-1]))
                for path, table, _ in tables
            ]
            gradients = self._backward(run, zeros, [gradient, *shared_gradients])
        self._evaluate_records()
        for (path, table, original), table_gradient in zip(tables, gradients, strict=True):
            table.lookup = original
            ids = np.asarray(lookup_ids[path]).ravel()
            counts = np.bincount(ids, minlength=table.weight.shape[0])
            vectors = np.asarray(table_gradient).reshape(-1, table_gradient.shape[-1])
            windows = self._window_shape(table_gradient.shape)
            self._evaluate(path, GradientRecord(counts, [vectors], lookup_ids=ids, windows=windows))

    def _backward(
        self, run: Callable[..., list[mx.array]], inputs: list[mx.array], gradients: list[mx.array]
    ) -> list[mx.array]:
        self._call_counts = Counter()
        try:
            _, input_gradients = mx.vjp(run, inputs, gradients)
            mx.eval(input_gradients)
        finally:
            self._call_counts = None
        return input_gradients

    def _record_matrix(self, path: str, matrix: Matrix) -> None:
        """Make a matrix record its inputs and output gradients during backward passes."""

        def record(y: mx.array, make_record: Callable[[np.ndarray], GradientRecord]) -> mx.array:
            if self._call_counts is None:
                return y
            key = path, self._call_counts[path]
            self._call_counts[path] += 1

            def on_gradient(y: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
                new = make_record(np.asarray(gradient.astype(mx.float32)))
                if key in self._records:
                    self._records[key].append(new)
                else:
                    self._records[key] = new
                return gradient

            identity: Any = mx.custom_function(lambda y: y)
            identity.vjp(on_gradient)
            return identity(y)

        if isinstance(matrix, ExpertLinear):
            gather_matmul = matrix.gather_matmul
            experts = matrix.weight.shape[0]

            def recorded_gather_matmul(
                x: mx.array, chosen: mx.array, sorted: bool, arrays: dict[str, Any]
            ) -> mx.array:
                y = gather_matmul(x, chosen, sorted, arrays)
                return record(y, lambda gradient: expert_record(x, gradient, chosen, experts))

            matrix.gather_matmul = recorded_gather_matmul
        else:
            matmul = matrix.matmul

            def recorded_matmul(
                x: mx.array, arrays: Any = None, transpose: bool = True
            ) -> mx.array:
                y = matmul(x, arrays, transpose)
                if arrays is None:
                    windows = self._window_shape(x.shape)
                    return record(y, lambda g: linear_record(x, g, transpose, windows))
                row_ids = self._head_row_ids(path, arrays["weight"].shape)
                windows = self._window_shape((x.shape[0], *x.shape[2:]))
                return record(y, lambda g: per_head_record(x, g, transpose, row_ids, windows))

            matrix.matmul = recorded_matmul

    def _head_row_ids(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return which rows of a per-head matrix the current product uses.

        One pass uses the parts of every head's rows in consecutive products.

        Args:
            path: parameter path of the whole matrix.
            shape: shape (heads, rows per head, in) of the part in use.
        """
        heads, part_rows, _ = shape
        ids = np.arange(prod(self._tensors[path].shape[:-1])).reshape(heads, -1)
        first = part_rows * self._call_counts[path] if self._call_counts else 0
        if first + part_rows <= ids.shape[1]:
            return ids[:, first : first + part_rows].ravel()
        return ids[:, -part_rows:].ravel()

    def _window_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Return the shape (n, B, L) for ``GradientRecord.windows`` of inputs (..., B, L, in).

        None before the head, where a token affects its own label only.
        """
        count, length = self._layerwise.batches[0].shape
        if not self._tokens_interact or shape[-3:-1] != (count, length):
            return None
        return prod(shape[:-3]), count, length

    def _evaluate_records(self) -> None:
        for (path, _), record in self._records.items():
            self._evaluate(path, record)
        self._records.clear()

    def _evaluate(self, path: str, record: GradientRecord) -> None:
        """Add the cost of one use of a matrix; a tied embedding table has two uses."""
        tensor = self._tensors[path]
        mean_squares = record.squared_gradients / self._token_count
        costs = self._costs.setdefault(path, dict.fromkeys(self._candidates, 0.0))
        if not mean_squares.any():
            return
        count = SAMPLED_ROWS if path in self._paths_in_layers else SAMPLED_ROWS_OUTSIDE_LAYERS
        sampled = sample_rows(mean_squares, count)
        rows_per_matrix = len(mean_squares) // len(record.inputs)
        for index in np.unique(sampled // rows_per_matrix).tolist():
            own = sampled[sampled // rows_per_matrix == index]
            x = record.inputs[index]
            ids = own if record.row_ids is None else record.row_ids[own]
            rows = mx.concatenate([tensor.read_rows(row, row + 1) for row in ids.tolist()])
            rows = rows.astype(mx.float32)
            gradients = record.gradients_of_rows(index, own % rows_per_matrix)
            norm = len(x) if gradients is None else np.square(gradients).sum(0)
            weight = 0.5 * mean_squares.sum() / len(sampled) / norm
            independent = dict[Quantization, float]()  # tokens summed after squaring
            ratios = []  # tokens of a window summed before squaring, relative to that
            for candidate in self._candidates:
                fitted = fit_group_size(candidate, rows.shape[-1])
                if fitted is None:
                    continue  # the matrix stays as it is
                change = np.asarray(self._round_trip(path, index, rows, x, fitted) - rows)
                effect = x @ change.T
                effect = effect if gradients is None else gradients * effect
                cost = float((weight * np.square(effect).sum(0)).sum())
                independent[candidate] = cost
                if record.windows is not None and gradients is not None and cost > 0:
                    sums = effect.reshape(*record.windows, -1).sum((0, 2), dtype=np.float64)
                    ratios.append(float((weight * np.square(sums).sum(0)).sum()) / cost)
            # the ratio depends on the inputs, so the mean over candidates estimates it better
            ratio = float(np.mean(ratios)) if ratios else 1
            for candidate, cost in independent.items():
                costs[candidate] += cost * ratio


def _float_leaves(shared: dict[Hashable, Any]) -> list[mx.array]:
    values = list(shared.values())
    leaves: list[tuple[str, Any]] = tree_flatten(values)  # pyright: ignore[reportAssignmentType]
    return [leaf for _, leaf in leaves if _is_float_array(leaf)]


def _replace_float_leaves(
    shared: dict[Hashable, Any], floats: Iterable[mx.array]
) -> dict[Hashable, Any]:
    """Return ``shared`` with its float arrays replaced, in the order of ``_float_leaves``."""
    replacements = iter(floats)
    values = tree_map(
        lambda leaf: next(replacements) if _is_float_array(leaf) else leaf, list(shared.values())
    )
    return dict(zip(shared, values, strict=True))


def _is_float_array(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and leaf.dtype in FLOAT_DTYPES
