"""Predicted gain of error feedback: the fraction of the quantization error that remains.

Error feedback (GPTQ, arXiv:2210.17323) quantizes a matrix W column by column. After each column it
adjusts the columns still to come, so that their products with the inputs x cancel part of the error
that the quantized column causes in W x. If the rounding errors of the columns are independent and
of equal variance, the part that cancels depends on the inputs alone. It can therefore be predicted
for every matrix from activations, before anything is quantized.

Bit allocation uses this prediction: it multiplies the KL divergence expected of each matrix without
feedback by the fraction that remains.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress, silent
from mlxarch.quantize.calibration.input_stats import InputCollector, InputStats
from mlxarch.quantize.calibration.layerwise import ignore_float_errors
from mlxarch.quantize.methods.matrix_quantizer import FeedbackCache, has_enough_tokens


def remaining_error_fractions(
    resolved: Resolved,
    calibration_batches: Sequence[mx.array],
    evaluation_batches: Sequence[mx.array],
    progress: Progress = silent,
) -> dict[str, float]:
    """Predict the fraction of each matrix's quantization error that remains after error feedback.

    The error of a matrix W (out, in) is the expected squared error of its outputs W x, summed over
    the inputs x that reach W on the evaluation tokens. The fraction is this error with feedback
    divided by the error without: about 0.3 to 1, where 1 means that feedback does not help. The
    activations of one layer are in memory at a time.

    Args:
        resolved: the original model, with its weights open.
        calibration_batches: token ids (B, L). The second moments of their activations determine by
            how much later columns are adjusted.
        evaluation_batches: other token ids (B, L), for which the errors are computed. On the
            calibration tokens themselves the gain would be overestimated.
        progress: called with the bytes of the weights read so far.

    Returns:
        path -> fraction, for every matrix that is multiplied by inputs; embedding tables, which are
        looked up, are missing.
    """
    calibration = InputCollector(resolved, calibration_batches, keep=True)
    evaluation = InputCollector(resolved, evaluation_batches, keep=True)
    fractions: dict[str, float] = {}
    feedback_cache = FeedbackCache()
    layers = zip(calibration.collect(progress), evaluation.collect(), strict=True)
    for (_, calibration_inputs), (_, evaluation_inputs) in layers:
        for path, inputs in calibration_inputs.items():
            with ignore_float_errors():
                fractions[path] = _remaining_error_fraction(
                    inputs, evaluation_inputs[path], feedback_cache
                )
        feedback_cache.clear()
    return fractions


def _remaining_error_fraction(
    calibration: InputStats, evaluation: InputStats, feedback_cache: FeedbackCache
) -> float:
    """Fraction of one matrix's squared output error that remains after error feedback.

    For a stack of expert matrices, errors are added over the experts. An expert with too few
    calibration inputs is quantized without feedback.

    Args:
        calibration: inputs that determine the feedback.
        evaluation: inputs for which the errors are computed.
        feedback_cache: feedback of the previous matrix, reused if this one has the same inputs.
    """
    error_with_feedback = 0.0
    error_without = 0.0
    experts = zip(calibration.inputs, evaluation.inputs, calibration.counts, strict=True)
    for calibration_rows, evaluation_rows, count in experts:
        x = np.concatenate(evaluation_rows)
        without = float(np.vdot(x, x))  # every weight off by 1, independently
        with_feedback = without
        if has_enough_tokens(count, x.shape[1], static_groups=True):
            with_feedback = feedback_cache.get(calibration_rows, static_groups=True).expected_error(
                x
            )
        error_with_feedback += with_feedback
        error_without += without
    if 0 < error_without < np.inf and np.isfinite(error_with_feedback):
        return error_with_feedback / error_without
    return 1.0
