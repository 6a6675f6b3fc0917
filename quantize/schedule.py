"""Quantization methods by name, and the order in which the parameters of a model are quantized."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.errors import QuantizationError
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress, silent
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.calibration.calibration import CalibrationTokens
from mlxarch.quantize.calibration.embedding_stats import (
    BACKWARD_TOKENS,
    EmbeddingStats,
    collect_embedding_stats,
    hidden_state_bytes,
)
from mlxarch.quantize.calibration.input_stats import InputCollector, InputStats
from mlxarch.quantize.calibration.output_gradients import OutputGradients, bytes_per_token
from mlxarch.quantize.calibration.vocab_clusters import VocabClusters
from mlxarch.quantize.methods.asymmetric_calibration import AsymmetricCalibration
from mlxarch.quantize.methods.matrix_quantizer import FeedbackCache, MatrixQuantizer
from mlxarch.quantize.methods.row_chunks import QuantizeRows, round_rows

Method = Literal["search", "gptq", "round"]
METHODS: dict[Method, str] = {
    "search": "scales and biases searched for by the importance of the input channels, "
    "then error feedback",
    "gptq": "error feedback and the search for scales and biases in turn",
    "round": "rounded to nearest",
}

ReadQuantized = Callable[[str], LazyTensor | None]
"""Return a parameter as it was quantized, by its checkpoint name; None if it was not quantized."""

MAX_GRADIENT_BYTES = 4 << 30  # file of output gradients that may hold more than BACKWARD_TOKENS


def check_method(
    method: str | None, wanted: Quantization | None, calibration: object = None
) -> Method:
    """Return the method to use, by default "search" in affine mode and "round" in others.

    Args:
        method: name of a method, or None.
        wanted: quantization format; None if nothing is quantized.
        calibration: calibration text, if one was given.

    Raises:
        QuantizationError: the method does not exist or does not support the format, or it takes no
            calibration text.
    """
    affine = wanted is not None and wanted.mode == "affine"
    known: list[Method] = list(METHODS)
    if method is None:
        chosen: Method = "search" if affine else "round"
    elif method not in known:
        raise QuantizationError(f"method {method!r} does not exist; allowed: {', '.join(known)}")
    else:
        chosen = known[known.index(method)]
    if chosen != "round" and not affine:
        raise QuantizationError(
            f"method {chosen!r} chooses scales and biases, which only mode affine has; leave it out"
        )
    if chosen == "round" and calibration is not None:
        raise QuantizationError(
            "rounding looks at no text; leave out the calibration, or choose method search or gptq"
        )
    return chosen


class ScheduledParameter(NamedTuple):
    """A parameter that is next to be quantized.

    Attributes:
        name: name in the checkpoint.
        quantize_rows: quantizes consecutive rows.
        unrouted_experts: indices of its experts to which no calibration token was routed.
        block_rows: rows of a matrix, counted from its first, that must be passed to
            ``quantize_rows`` in one call.
    """

    name: str
    quantize_rows: QuantizeRows
    unrouted_experts: Sequence[int] = ()
    block_rows: int = 1


def schedule_parameters(
    resolved: Resolved,
    method: Method,
    tokens: CalibrationTokens,
    names: Collection[str],
    progress: Progress = silent,
    read_quantized: ReadQuantized | None = None,
    scratch: Path | None = None,
) -> Iterator[ScheduledParameter]:
    """Yield parameters in the order in which they should be quantized, each with its quantizer.

    Method "round" keeps the order of ``names``. The others start with the embedding tables, after
    one backward pass that collects their statistics; then they go layer by layer in the order of
    the products, because the inputs of a layer are computed by the layers before it.

    Args:
        resolved: the model.
        method: quantization method.
        tokens: calibration tokens.
        names: checkpoint names of the parameters to quantize.
        progress: receives the weight bytes passed during calibration.
        read_quantized: returns parameters that were quantized before. If given, errors are also fed
            back across rows and columns, and later layers compensate earlier ones (see
            ``asymmetric_calibration``); the backward pass then collects the output gradients of all
            matrices. The caller must quantize each parameter before it asks for the next.
        scratch: folder for temporary files, see ``scratch_bytes``; None for the system's default.
    """
    remaining = dict.fromkeys(names)
    if method == "round" or not remaining:
        yield from (ScheduledParameter(name, round_rows) for name in remaining)
        return
    with tempfile.TemporaryFile(dir=scratch) as file:
        schedule = _CalibratedSchedule(
            resolved, method, tokens, remaining, read_quantized, OutputGradients(file)
        )
        yield from schedule.embeddings(progress, scratch)
        yield from schedule.layers(progress)


class _CalibratedSchedule:
    """Order of quantization for methods with calibration: embeddings, then layer by layer.

    Args:
        resolved: the model.
        method: "search" or "gptq".
        tokens: calibration tokens.
        remaining: checkpoint names still to be quantized, in order; emptied by the schedule.
        read_quantized: returns parameters that were quantized before; None turns off feedback
            across rows and layers.
        output_gradients: empty store for the gradients of all matrix outputs.
    """

    def __init__(
        self,
        resolved: Resolved,
        method: Method,
        tokens: CalibrationTokens,
        remaining: dict[str, None],
        read_quantized: ReadQuantized | None,
        output_gradients: OutputGradients,
    ) -> None:
        self._resolved = resolved
        self._method = method
        self._tokens = tokens
        self._remaining = remaining
        self._read_quantized = read_quantized
        self._output_gradients = output_gradients
        self._feedback_cache = FeedbackCache()
        self._embedding_stats: dict[str, EmbeddingStats] = {}

    def embeddings(self, progress: Progress, scratch: Path | None) -> Iterator[ScheduledParameter]:
        """Run the backward passes, then yield the embedding tables."""
        resolved = self._resolved
        feedback = self._read_quantized is not None
        self._embedding_stats = collect_embedding_stats(
            resolved,
            self._tokens.inputs,
            progress=progress,
            output_gradients=self._output_gradients if feedback else None,
            scratch=scratch,
            max_tokens=backward_token_count(resolved) if feedback else BACKWARD_TOKENS,
        )
        for path, stats in self._embedding_stats.items():
            if resolved.architecture.published_name(path) in self._remaining:
                # channel weights alone cannot represent both uses of a tied table
                keep = self._method == "gptq" or len(stats.inputs) > 1
                clusters = None
                if feedback and keep:
                    clusters = stats.cluster_rows(resolved.tensors[path].shape[0])
                inputs = InputStats.from_inputs(np.concatenate(stats.inputs), keep=keep)
                yield self._schedule(path, inputs, clusters=clusters)

    def layers(self, progress: Progress) -> Iterator[ScheduledParameter]:
        """Yield each parameter with the method to quantize it, layer by layer, then those outside.

        Args:
            progress: called with the bytes of weights read so far.
        """
        feedback = self._read_quantized is not None
        collector = InputCollector(self._resolved, self._tokens.inputs, keep=feedback)
        asymmetric = None
        if feedback and self._tokens.asymmetric:
            asymmetric = AsymmetricCalibration(
                self._resolved, self._tokens.asymmetric, self._read_by_path
            )
            asymmetric.start()
        for index, (paths, stats) in enumerate(collector.collect(progress)):
            without_stats = [path for path in paths if path not in stats]
            for path in without_stats + list(stats):
                if self._resolved.architecture.published_name(path) in self._remaining:
                    inputs = stats.pop(path, None)
                    correction = asymmetric.correction(path) if asymmetric else None
                    yield self._schedule(path, inputs, correction)
            self._feedback_cache.clear()
            if asymmetric and index < asymmetric.layer_count:
                asymmetric.advance()
            if not self._remaining:
                return
        yield from (ScheduledParameter(name, round_rows) for name in self._remaining)

    def _schedule(
        self,
        path: str,
        inputs: InputStats | None,
        correction: np.ndarray | None = None,
        clusters: VocabClusters | None = None,
    ) -> ScheduledParameter:
        name = self._resolved.architecture.published_name(path)
        del self._remaining[name]
        if inputs is None:
            return ScheduledParameter(name, round_rows)
        quantizer = MatrixQuantizer(
            inputs,
            out_features=prod(self._resolved.tensors[path].shape[-2:-1]),
            output_gradients=partial(self._output_gradients.read, path),
            static_groups=self._method == "search" and path not in self._embedding_stats,
            correction=correction,
            feedback_cache=self._feedback_cache,
            clusters=clusters,
        )
        block_rows = quantizer.coupled_rows if path in self._output_gradients else 1
        return ScheduledParameter(
            name, quantizer.quantize_rows, inputs.unrouted_experts, block_rows
        )

    def _read_by_path(self, path: str) -> LazyTensor | None:
        name = self._resolved.architecture.published_name(path)
        if self._read_quantized is None or name in self._remaining:
            return None
        return self._read_quantized(name)


def backward_token_count(resolved: Resolved) -> int:
    """Return for how many tokens, at most, the gradients of all matrix outputs are computed.

    As many as ``MAX_GRADIENT_BYTES`` of disk can hold, but at least ``BACKWARD_TOKENS``.
    """
    return max(MAX_GRADIENT_BYTES // bytes_per_token(resolved), BACKWARD_TOKENS)


def scratch_bytes(resolved: Resolved, method: Method, batches: Sequence[mx.array]) -> int:
    """Return the bytes of temporary disk space that calibration takes.

    They hold the output gradients, and the hidden states of one backward pass.

    Args:
        resolved: the model.
        method: quantization method; rounding needs no calibration.
        batches: calibration tokens (B, L).
    """
    if method == "round" or not batches:
        return 0
    count = backward_token_count(resolved)
    available = sum(batch.size for batch in batches)
    gradients = min(count, available) * bytes_per_token(resolved)
    return gradients + hidden_state_bytes(resolved, batches, count)
