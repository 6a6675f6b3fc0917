"""Asymmetric calibration: layers compensate the quantization error of earlier layers.

Quantized matrices change the hidden states. A matrix W whose product is added to the residual
stream can cancel the part of that error e that is linearly predictable from its inputs x̃ in the
quantized model: it is replaced by

    W + E[e x̃ᵀ] E[x̃ x̃ᵀ]⁻¹

before it is quantized. Matching the original model's activations with those of the quantized model:
GPTAQ, arXiv:2504.02692, which matches the product of each matrix; here the residual stream after
the addition is matched, which contains all errors so far.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.loading.resolve import Resolved
from mlxarch.quantize.calibration.layerwise import (
    LayerwiseModel,
    LazyMatmul,
    ignore_float_errors,
)
from mlxarch.quantize.calibration.numpy_attention import use_numpy_attention
from mlxarch.quantize.methods.residual_projections import ResidualProjection, residual_projections

# Ridge penalty, relative to the mean square of the inputs: a constant, and a factor of the
# channels per token
RIDGE = 1.0
RIDGE_PER_TOKEN_RATIO = 4.0
CORRECTION_SCALES = (1.0, 0.5, 0.25, 0.0)  # factors of the correction that are tried before a norm
MIN_NORM_WEIGHT = 0.05  # relative to the median: channels with smaller norm weights are left out

ReadByPath = Callable[[str], LazyTensor | None]
"""Return the quantized tensor of a parameter path, or None if it is not quantized yet."""


class AsymmetricCalibration:
    """Layer-wise forward passes of the original and the partly quantized model, side by side.

    Call ``start`` after the embedding tables are quantized; then, for each layer, ``correction``
    before a matrix is quantized, and ``advance`` after the whole layer is.

    Args:
        resolved: the original model.
        batches: token ids (B, L). They must not be the tokens that quantization is calibrated on,
            because on those the errors are smaller than on any others.
        read_quantized: returns quantized parameters, see ReadByPath.

    Attributes:
        layer_count: number of layers; 0 if the model has no matrix that can be corrected.
    """

    def __init__(
        self, resolved: Resolved, batches: Sequence[mx.array], read_quantized: ReadByPath
    ) -> None:
        self._tensors = {
            path: _CurrentTensor(path, tensor, read_quantized)
            for path, tensor in resolved.parameters.items()
        }
        self._original = _ForwardState(resolved, batches)
        self._quantized = _ForwardState(resolved, batches, self._tensors)
        model = self._original.layerwise.model
        names = {id(module): path for path, module in model.named_modules()}
        self._projections = [
            {
                projection.path: projection
                for projection in residual_projections(layer, names[id(layer)])
            }
            for layer in model.layers
        ]
        self.layer_count = len(model.layers) if any(self._projections) else 0
        self._index = 0

    def start(self) -> None:
        """Compute the hidden states before the first layer; embedding tables must be quantized."""
        if self.layer_count:
            self._original.start()
            self._quantized.start()

    def correction(self, path: str) -> np.ndarray | None:
        """Return what to add to a matrix of the current layer before it is quantized, (out, in).

        The correction is E[e x̃ᵀ] E[x̃ x̃ᵀ]⁻¹, damped: the linear prediction of the error e of the
        residual stream from the matrix's inputs x̃ in the partly quantized model. None if the
        product of the matrix is not added to the residual stream, or if nothing can be predicted.
        All parameters before it in the layer must be quantized.

        Args:
            path: parameter path of the matrix.
        """
        projection = None
        if self._index < self.layer_count:
            projection = self._projections[self._index].get(path)
        if projection is None:
            return None
        states, attention_inputs = self._run_original_layer()
        if projection.is_feed_forward:
            uncorrected, inputs = self._run_layer_with_original(projection)
            error = _flatten_tokens(states) - _flatten_tokens(uncorrected)
        else:
            inputs = self._quantized.run_to_matrix(self._index, path)
            error = _flatten_tokens(self._original.states) - _flatten_tokens(self._quantized.states)
            original_update = self._residual_update(projection, attention_inputs[path])
            error += original_update - self._residual_update(projection, inputs)
        target, weights = self._linearize_norm(projection, inputs, error)
        correction = _ridge_regression(inputs, target, weights)
        if correction is None or projection.norm is None:
            return correction
        return self._scale_correction(projection, inputs, error, correction)

    def advance(self) -> None:
        """Move both models past the current layer, all parameters of which must be quantized."""
        projections = self._projections[self._index].values()
        feed_forward = next((p for p in projections if p.is_feed_forward), None)
        if feed_forward is None:
            states, _ = self._quantized.run_layer(self._index, ())
        else:
            uncorrected, inputs = self._run_layer_with_original(feed_forward)
            quantized_update = self._residual_update(feed_forward, inputs, quantized=True)
            change = quantized_update - self._residual_update(feed_forward, inputs)
            tokens = [state.size // state.shape[-1] for state in uncorrected]
            parts = np.split(change, np.cumsum(tokens)[:-1])
            states = [
                state + mx.array(part).reshape(state.shape)
                for state, part in zip(uncorrected, parts, strict=True)
            ]
        self._original.advance(self._run_original_layer()[0])
        self._quantized.advance(states)
        self._index += 1

    def _run_original_layer(self) -> tuple[list[mx.array], dict[str, np.ndarray]]:
        """Return the original model's states after the layer and inputs of its attention output."""
        projections = self._projections[self._index].items()
        paths = [path for path, projection in projections if not projection.is_feed_forward]
        return self._original.run_layer(self._index, paths)

    def _run_layer_with_original(
        self, projection: ResidualProjection
    ) -> tuple[list[mx.array], np.ndarray]:
        """Run the quantized model's layer with one matrix unquantized.

        The hidden states of the next layer are derived from these, whether the matrix was quantized
        in this run or in an earlier one, so a resumed conversion computes the same numbers.

        Returns:
            The hidden states after the layer, and the inputs (T, in) of the matrix.
        """
        self._tensors[projection.path].use_original = True
        states, inputs = self._quantized.run_layer(self._index, (projection.path,))
        self._tensors[projection.path].use_original = False
        return states, inputs[projection.path]

    def _residual_update(
        self, projection: ResidualProjection, inputs: np.ndarray, quantized: bool = False
    ) -> np.ndarray:
        """Return what a matrix adds to the residual stream for inputs (T, in): (T, out).

        Without its bias; a matrix that has one is not followed by a norm.
        """
        tensor = self._tensors[projection.path]
        output = LazyMatmul(tensor if quantized else tensor.original)(mx.array(inputs))
        return np.asarray(self._apply_norm(projection, output))

    def _apply_norm(self, projection: ResidualProjection, x: mx.array) -> mx.array:
        if projection.norm is None:
            return x
        layerwise = self._original.layerwise
        with layerwise.loaded_parameters(self._index):
            normed = dict(layerwise.model.named_modules())[projection.norm](x)
            mx.eval(normed)
        return normed

    def _scale_correction(
        self,
        projection: ResidualProjection,
        inputs: np.ndarray,
        error: np.ndarray,
        correction: np.ndarray,
    ) -> np.ndarray | None:
        """Scale a correction by the best of ``CORRECTION_SCALES``; None if that is 0.

        It was computed from a linearized norm, which does not predict large steps.
        """
        output = np.asarray(LazyMatmul(self._tensors[projection.path].original)(mx.array(inputs)))
        step = inputs @ correction.T
        normed = np.asarray(self._apply_norm(projection, mx.array(output)))

        def remaining_error(scale: float) -> float:
            changed = mx.array(output + np.float32(scale) * step)
            update = np.asarray(self._apply_norm(projection, changed))
            return float(np.square(error + normed - update).sum())

        best = min(CORRECTION_SCALES, key=remaining_error)
        return np.float32(best) * correction if best else None

    def _linearize_norm(
        self, projection: ResidualProjection, inputs: np.ndarray, error: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Convert an error of the residual stream into one of the matrix product before the norm.

        A norm divides by the root mean square of x and multiplies by its weights; that slope is
        used.

        Returns:
            The error before the norm (T, out), and a weight (T,) for each token; without a norm,
            ``error`` and None.
        """
        if projection.norm is None:
            return error, None
        slopes = np.asarray(self._apply_norm(projection, mx.ones((1, error.shape[1]))))
        output = np.asarray(LazyMatmul(self._tensors[projection.path].original)(mx.array(inputs)))
        rms = np.sqrt(np.square(output).mean(1)) + np.finfo(np.float32).tiny
        used = np.abs(slopes) > MIN_NORM_WEIGHT * np.median(np.abs(slopes))
        before_norm = np.where(used, error / np.where(used, slopes, 1), 0) * rms[:, None]
        return before_norm, 1 / rms


class _ForwardState:
    """Hidden states before the current layer of a model, with access to inputs of its matrices.

    Attributes:
        layerwise: the model.
        states: hidden states before the current layer, one array (B, L, hidden_size) per batch.
    """

    def __init__(
        self,
        resolved: Resolved,
        batches: Sequence[mx.array],
        tensors: Mapping[str, LazyTensor] | None = None,
    ) -> None:
        self.layerwise = LayerwiseModel(resolved, batches, self._observe, tensors)
        use_numpy_attention(self.layerwise.model)
        self.states: list[mx.array] = []
        self._observed_paths: Collection[str] = ()
        self._stop_at_input = False
        self._inputs = dict[str, list[np.ndarray]]()
        self._result: tuple[list[mx.array], dict[str, np.ndarray]] | None = None

    def start(self) -> None:
        """Compute the hidden states before the first layer."""
        with ignore_float_errors():
            self.states = self.layerwise.embed()

    def advance(self, states: list[mx.array]) -> None:
        """Move to the next layer, before which the hidden states are ``states``."""
        self.states = states
        self._result = None

    def run_layer(
        self, index: int, paths: Collection[str]
    ) -> tuple[list[mx.array], dict[str, np.ndarray]]:
        """Return the hidden states after the layer and the inputs (T, in) of some matrices.

        The layer is run once; further calls return the same result.
        """
        if self._result is None:
            self._observed_paths = paths
            self._inputs = {}
            with ignore_float_errors():
                states = self.layerwise.run_layer(index, self.states)
            inputs = {path: np.concatenate(parts) for path, parts in self._inputs.items()}
            self._result = states, inputs
            self._observed_paths = ()
            self._inputs = {}
        return self._result

    def run_to_matrix(self, index: int, path: str) -> np.ndarray:
        """Run the layer up to a matrix; return the inputs (T, in) of that matrix."""
        self._observed_paths = (path,)
        self._inputs = {}
        self._stop_at_input = True
        layer = self.layerwise.model.layers[index]
        with ignore_float_errors(), self.layerwise.loaded_parameters(index):
            for state, context in zip(self.states, self.layerwise.contexts, strict=True):
                with suppress(_InputReached):
                    layer(state, context, None)
        self._observed_paths = ()
        self._stop_at_input = False
        return np.concatenate(self._inputs.pop(path))

    def _observe(self, path: str, x: mx.array, expert_ids: mx.array | None) -> None:
        if path in self._observed_paths:
            self._inputs.setdefault(path, []).append(_flatten_tokens([x]))
            if self._stop_at_input:
                raise _InputReached


class _InputReached(Exception):
    """Ends a forward pass once the inputs of the requested matrix are recorded."""


class _CurrentTensor(LazyTensor):
    """A parameter in its quantized form if it has one yet, else the original.

    Attributes:
        original: the unquantized parameter.
        use_original: read the original in any case.
    """

    def __init__(self, path: str, original: LazyTensor, read_quantized: ReadByPath) -> None:
        self.path = path
        self.original = original
        self.shape = original.shape
        self.dtype = original.dtype
        self.use_original = False
        self._read_quantized = read_quantized
        self._quantized: LazyTensor | None = None

    def read_rows(self, start: int, stop: int) -> mx.array:
        """Read rows ``start`` to ``stop`` (see LazyTensor)."""
        if self.use_original:
            return self.original.read_rows(start, stop)
        self._quantized = self._quantized or self._read_quantized(self.path)
        return (self._quantized or self.original).read_rows(start, stop)


def _flatten_tokens(states: Sequence[mx.array]) -> np.ndarray:
    """Concatenate all tokens in float32: arrays (B, L, hidden_size) -> (T, hidden_size)."""
    flat = [np.asarray(state.astype(mx.float32)).reshape(-1, state.shape[-1]) for state in states]
    return np.concatenate(flat)


def _ridge_regression(
    inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray | None
) -> np.ndarray | None:
    """Fit a matrix (out, in) from inputs (T, in) to targets (T, out) by ridge regression.

    Args:
        weights: factor of each token's inputs and targets, (T,).

    Returns:
        The matrix, or None if the inputs are zero or something is not finite.
    """
    tokens, channels = inputs.shape
    if weights is not None:
        inputs = inputs * weights[:, None]
        targets = targets * weights[:, None]
    mean_square = float(np.vdot(inputs, inputs)) / channels
    ridge = mean_square * (RIDGE + RIDGE_PER_TOKEN_RATIO * channels / max(tokens, 1))
    if not 0 < ridge < np.inf or not np.isfinite(targets).all():
        return None
    if tokens < channels:  # the dual form, with the smaller matrix
        gram = inputs @ inputs.T
        np.fill_diagonal(gram, gram.diagonal() + np.float32(ridge))
        return np.linalg.solve(gram, targets).T @ inputs
    moments = inputs.T @ inputs
    np.fill_diagonal(moments, moments.diagonal() + np.float32(ridge))
    return np.ascontiguousarray(np.linalg.solve(moments, inputs.T @ targets).T)
