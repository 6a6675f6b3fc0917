"""Forecast of a quantized model's KL divergence, and the bit allocation that follows from it.

The forecast is made before any output is written. For every matrix and every candidate number of
bits, a sensitivity analysis (``calibration.sensitivity``) estimates the KL divergence in nats per
token that quantizing this matrix alone would cause. It measures how far some quantized rows move
their outputs and how strongly the model's log-likelihood reacts, by the Fisher information of the
outputs. Where the method feeds errors back between columns, each estimate is multiplied by the
fraction of the error that remains (``feedback_gain``). The divergence of the whole model is
forecast as the sum over its matrices, and ``bit_allocation`` chooses the bits by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.lazy_tensor import DTYPES, FLOAT_DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import CheckpointSource
from mlxarch.errors import InvalidInput
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress, silent
from mlxarch.quantization.scheme import Quantization, fit_group_size, stored_arrays
from mlxarch.quantize.calibration.calibration import Calibration, CalibrationTokens, load_tokenizer
from mlxarch.quantize.calibration.sensitivity import RoundTrip, estimate_sensitivity
from mlxarch.quantize.calibration.texts import Text, bundled_texts, window_prefix
from mlxarch.quantize.methods.gptq import ColumnFeedback, quantize_with_feedback
from mlxarch.quantize.methods.row_chunks import ErrorStats
from mlxarch.quantize.mixed_precision.bit_allocation import (
    CANDIDATE_BITS,
    BitAllocation,
    Target,
    allocate_bits,
    check_byte_budget,
    group_options,
    shared_input_groups,
)
from mlxarch.quantize.mixed_precision.feedback_gain import remaining_error_fractions
from mlxarch.quantize.schedule import Method, schedule_parameters
from mlxarch.tokenizer.tokenizer import Tokenizer

TOKENS = 2048  # read for the forecast, of all texts together
WINDOW = 256  # tokens per window; windows are read independently
SEARCH_KL_CORRECTION = 1.2  # measured / expected KL of method "search"; see ``estimate_kl_costs``


def allocate_for_target(
    source: CheckpointSource,
    resolved: Resolved,
    target: Target,
    byte_budget: int | None,
    *,
    method: Method = "search",
    group_size: int = 64,
    dtype: mx.Dtype | None = None,
    calibration: Calibration | None = None,
    texts: Sequence[Text] | None = None,
    progress: Progress = silent,
) -> BitAllocation:
    """Choose the bits of every matrix for a target, and forecast the KL divergence of the result.

    Args:
        source: the original checkpoint, with its tokenizer.
        resolved: the same, resolved to a model.
        target: limit on size, bits per weight or KL divergence.
        byte_budget: bytes that the matrices may take; used if the target is a size.
        method: method that will quantize the matrices.
        group_size: weights that share a scale.
        dtype: dtype of scales and biases; None keeps the source's.
        calibration: tokens that the method will use.
        texts: over which the divergence is forecast; None takes the texts of this package. Their
            second halves are read, because ``evaluate`` measures on their beginnings.
        progress: called with the work done.

    Returns:
        Published path of each matrix -> its quantization, with the expected KL divergence and the
        bytes.

    Raises:
        QuantizationError: the target is out of reach.
        InvalidInput: a text is too short.
        TokenizerError: the source has no tokenizer.
    """
    texts = bundled_texts() if texts is None else texts
    tokens = held_out_windows(texts, load_tokenizer(source), resolved.model.context_length)
    candidates = [Quantization(bits, group_size) for bits in CANDIDATE_BITS]

    def stored_bytes(path: str, quantization: Quantization) -> int:
        return _stored_bytes(resolved.parameters[path], quantization, dtype)

    matrices = _divisible_matrices(resolved, candidates[0])
    elements = sum(prod(resolved.parameters[path].shape) for path in matrices)
    if target.bits is not None:
        byte_budget = int(target.bits * elements / 8)
    if byte_budget is not None:  # checked before minutes of computation
        smallest = sum(stored_bytes(path, candidates[0]) for path in matrices)
        largest = sum(stored_bytes(path, candidates[-1]) for path in matrices)
        check_byte_budget(target, byte_budget, smallest, largest, elements)
    kl_costs = estimate_kl_costs(resolved, tokens, candidates, method, dtype, calibration, progress)
    measured = [path for path in resolved.parameters if path in kl_costs and path in matrices]
    groups = shared_input_groups(resolved.model, measured)
    options = group_options(groups, kl_costs, stored_bytes)
    allocation = allocate_bits(options, byte_budget, target.kl)
    published = resolved.architecture.published_name
    quantizations = {published(path): to for path, to in allocation.quantizations.items()}
    return replace(allocation, quantizations=quantizations)


def estimate_kl_costs(
    resolved: Resolved,
    tokens: mx.array,
    candidates: Sequence[Quantization],
    method: Method,
    dtype: mx.Dtype | None = None,
    calibration: Calibration | None = None,
    progress: Progress = silent,
) -> dict[str, dict[Quantization, float]]:
    """Estimate the KL divergence that each candidate quantization of each matrix alone causes.

    It is KL(original || quantized) between the next-token distributions of the original model and
    of the model with this one matrix quantized, averaged over tokens.

    Estimates for method "search" are multiplied by the fraction of the error that remains after
    error feedback and by ``SEARCH_KL_CORRECTION``, the ratio of measured to expected divergence on
    three models at 3.5 to 5.7 bits. They would be too low otherwise: bit allocation prefers the
    matrices whose cost is underestimated, and feedback cannot move codes of few bits beyond the
    ends of their range. Feedback between rows and layers makes up for part of it.

    Args:
        resolved: the original model, with its weights open.
        tokens: held-out token ids (B, L), over which the divergence is estimated.
        candidates: quantizations to estimate.
        method: method that will quantize the matrices.
        dtype: dtype of scales and biases; None keeps the source's.
        calibration: tokens that the method will use; only "search" needs them.
        progress: called with the work done.

    Returns:
        path -> quantization -> nats per token.
    """
    calibration_batches: list[mx.array] = []
    remaining: Mapping[str, float] = {}
    correction = 1.0
    if calibration and method == "search":
        calibration_batches = calibration.generate_tokens(
            resolved, progress, asymmetric=False
        ).inputs
    if calibration_batches:
        remaining = remaining_error_fractions(resolved, calibration_batches, [tokens], progress)
        correction = SEARCH_KL_CORRECTION
    round_trip = make_round_trip(resolved, method, calibration_batches, dtype, progress)
    uncorrected = estimate_sensitivity(resolved, tokens, candidates, round_trip, progress=progress)
    return {
        path: {to: correction * remaining.get(path, 1) * kl for to, kl in by_quantization.items()}
        for path, by_quantization in uncorrected.items()
    }


def make_round_trip(
    resolved: Resolved,
    method: Method,
    calibration_batches: list[mx.array],
    dtype: mx.Dtype | None = None,
    progress: Progress = silent,
) -> RoundTrip:
    """Return a function that quantizes some rows of a matrix and dequantizes them again.

    The sensitivity analysis calls it to see how far quantization moves each row. Rows are quantized
    as the conversion will do it, with one exception: a search chooses scales by the calibration
    tokens but feeds no errors back in the layers, because the activations of all layers would not
    fit into memory at once; ``feedback_gain`` accounts for the difference. "gptq" does feed errors
    back, by every second of the inputs for which the divergence is estimated.

    Args:
        resolved: the original model, with its weights open.
        method: method that will quantize the matrices.
        calibration_batches: token ids (B, L) by which a search chooses scales; empty for other
            methods.
        dtype: dtype of scales and biases; None keeps the source's.
        progress: called with the work done while calibration statistics are gathered.
    """
    matrices = resolved.published_matrices
    scheduled = "search" if calibration_batches else "round"
    parameters = schedule_parameters(
        resolved, scheduled, CalibrationTokens(calibration_batches, []), matrices, progress
    )
    quantizers = {parameter.name: parameter.quantize_rows for parameter in parameters}

    def round_trip(
        path: str, index: int, rows: mx.array, inputs: np.ndarray, to: Quantization
    ) -> mx.array:
        tensor = resolved.parameters[path]
        scale_dtype = _scale_dtype(tensor, dtype)
        if method == "gptq":
            parts, _, _ = quantize_with_feedback(ColumnFeedback(inputs[::2]), rows, to, scale_dtype)
            return _dequantize(parts, to)
        quantize = quantizers[resolved.architecture.published_name(path)]
        matrix_rows = tensor.shape[-2]
        pieces = []
        # a quantizer takes at most the rows of one matrix, and more may be sampled with repetition
        for start in range(0, len(rows), matrix_rows):
            piece = rows[start : start + matrix_rows]
            parts = quantize(piece, index * matrix_rows, to, scale_dtype, ErrorStats())
            pieces.append(_dequantize(parts, to))
        return mx.concatenate(pieces)

    return round_trip


def _dequantize(parts: dict[str, mx.array], quantization: Quantization) -> mx.array:
    """Dequantize affine codes, (R, columns) in float32."""
    scales = parts["scales"].astype(mx.float32)
    biases = parts["biases"].astype(mx.float32)
    return mx.dequantize(
        parts["weight"], scales, biases, quantization.group_size, quantization.bits
    )


def _divisible_matrices(resolved: Resolved, quantization: Quantization) -> set[str]:
    """Paths of the matrices whose row length a supported group size divides."""
    return {
        path
        for path in resolved.matrices
        if fit_group_size(quantization, resolved.parameters[path].shape[-1]) is not None
    }


def _stored_bytes(tensor: LazyTensor, quantization: Quantization, dtype: mx.Dtype | None) -> int:
    """Bytes of a quantized matrix in the output, scales and biases included."""
    scale_name = "F32" if _scale_dtype(tensor, dtype) == mx.float32 else "BF16"
    fit = fit_group_size(quantization, tensor.shape[-1]) or quantization
    arrays = stored_arrays(fit, tensor.shape, scale_name)
    return sum(prod(shape) * DTYPES[name].size for name, shape in arrays.values())


def _scale_dtype(tensor: LazyTensor, dtype: mx.Dtype | None) -> mx.Dtype:
    """Dtype of the scales and biases in the output: ``dtype``, or that of the source."""
    if dtype is None:
        dtype = (
            tensor.components["scales"].dtype
            if isinstance(tensor, QuantizedTensor)
            else tensor.dtype
        )
    return dtype if dtype in FLOAT_DTYPES else mx.float32


def held_out_windows(texts: Sequence[Text], tokenizer: Tokenizer, context_length: int) -> mx.array:
    """Cut evenly spaced windows of tokens from the second halves of texts.

    ``evaluate`` measures on the beginnings of the texts, so these windows are held out from it.

    Args:
        texts: texts, from each of which the same number of windows is taken.
        tokenizer: tokenizer of the model.
        context_length: maximum number of tokens of a window.

    Returns:
        Token ids (B, L); with the BOS token first, for models that use one.

    Raises:
        InvalidInput: a text is too short.
    """
    prefix = window_prefix(tokenizer)
    tokens_per_text = max(TOKENS // len(texts), WINDOW // 8)
    bodies = [tokenizer.encode(text.content, add_special_tokens=False) for text in texts]
    shortest_half = min(len(body) // 2 for body in bodies)
    length = min(WINDOW, tokens_per_text, shortest_half, context_length - len(prefix))
    if length < 2:
        lengths = list(map(len, bodies))
        shortest = texts[lengths.index(min(lengths))]
        raise InvalidInput(
            f"text {shortest.name} is too short to forecast a divergence by; name a longer one"
        )
    windows_per_text = tokens_per_text // length
    windows = []
    for body in bodies:
        spare = len(body) // 2 - length
        for number in range(windows_per_text):
            start = len(body) - length - spare * number // windows_per_text
            windows.append([*prefix, *body[start : start + length]])
    return mx.array(windows)
