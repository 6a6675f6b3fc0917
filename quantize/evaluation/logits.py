"""Logits of a model for every token of the evaluation passages, computed layer by layer in float32.

The weights of one layer are in memory at a time, so the model need not fit into memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx
import numpy as np

from mlxarch.errors import InvalidInput, NonFiniteLogits
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress
from mlxarch.quantize.calibration import numpy_attention
from mlxarch.quantize.calibration.layerwise import LayerwiseModel
from mlxarch.quantize.calibration.texts import Passage

# logits computed by one product with the output matrix, which is read again for the next ones
HEAD_LOGITS = 64 << 20
# logits yielded at once; in float64 and with the arrays derived from them they take some 100 MB
YIELDED_LOGITS = 4 << 20


@dataclass(frozen=True)
class LogitsBlock:
    """Logits for R consecutive tokens of the passages.

    Attributes:
        logits: (R, V) in float32; row i predicts ``targets[i]``.
        targets: (R,) ids of the tokens that follow in the text.
        first_row: number of predicted tokens before this block.
    """

    logits: np.ndarray
    targets: np.ndarray
    first_row: int


def passage_logits(
    resolved: Resolved, passages: Sequence[Passage], batch_size: int, progress: Progress, label: str
) -> Iterator[LogitsBlock]:
    """Compute the logits of every window of every passage, in order, in float32.

    Args:
        resolved: the model, with its weights open.
        passages: texts cut into windows of tokens.
        batch_size: windows computed at once; the weights are read once for each batch.
        progress: called with ``label`` and the bytes of weights read so far.
        label: label of the progress report.

    Raises:
        InvalidInput: a window is longer than the model's context, or a token id exceeds its
            vocabulary.
        NonFiniteLogits: a logit is NaN or infinite.
    """
    windows = [window for passage in passages for window in passage.windows]
    _check_windows(windows, resolved)
    batches = [
        group[start : start + batch_size]
        for group in _runs_of_equal_length(windows)
        for start in range(0, len(group), batch_size)
    ]
    layerwise = LayerwiseModel(resolved, [mx.array(batch) for batch in batches])
    numpy_attention.use_numpy_attention(layerwise.model)
    total = sum(tensor.nbytes for tensor in resolved.parameters.values())
    layers = len(layerwise.model.layers)
    states = layerwise.embed()
    for index in range(layers):
        progress(label, total * index // layers, total)
        states = layerwise.run_layer(index, states)
    first_row = 0
    with layerwise.loaded_parameters(None):
        for batch, state in zip(batches, states, strict=True):
            targets = np.asarray(batch)[:, 1:].reshape(-1)
            state = state[:, :-1]
            state = state.reshape(1, -1, *state.shape[2:])
            yield from _head_logits(layerwise, state, targets, first_row)
            first_row += len(targets)
    progress(label, total, total)


def _head_logits(
    layerwise: LayerwiseModel, state: mx.array, targets: np.ndarray, first_row: int
) -> Iterator[LogitsBlock]:
    """Apply the output head to hidden states (1, N, d), a few tokens at a time."""
    head_rows = max(HEAD_LOGITS // layerwise.model.vocab_size, 1)
    yielded_rows = max(YIELDED_LOGITS // layerwise.model.vocab_size, 1)
    for start in range(0, len(targets), head_rows):
        logits = np.asarray(layerwise.model.head(state[:, start : start + head_rows])[0])
        for offset in range(0, len(logits), yielded_rows):
            block = logits[offset : offset + yielded_rows]
            if np.isnan(block).any() or not np.isfinite(block.max(-1)).all():
                raise NonFiniteLogits(
                    "the model's output is not finite: a weight is damaged; download or quantize "
                    "the model again"
                )
            position = start + offset
            block_targets = targets[position : position + len(block)]
            yield LogitsBlock(block, block_targets, first_row + position)


def _runs_of_equal_length(windows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Group consecutive windows of the same length."""
    return (list(group) for _, group in groupby(windows, len))


def _check_windows(windows: list[list[int]], resolved: Resolved) -> None:
    model = resolved.model
    longest = max(map(len, windows))
    highest = max(map(max, windows))
    if longest > model.context_length:
        raise InvalidInput(
            f"windows of {longest} tokens: the model's context has {model.context_length}; "
            "take fewer"
        )
    if highest >= model.vocab_size:
        raise InvalidInput(
            f"token {highest} lies outside of the model's vocabulary, 0 … "
            f"{model.vocab_size - 1}; tokenizer and weights belong to different models"
        )
