"""Input statistics of embedding tables, from a few backward passes.

A row that is looked up adds its error d to a hidden state, which changes the log-likelihood by g ·
d, with g the gradient with respect to the embedding. In a table that also serves as the LM head, d
changes a logit by h · d, with h the last hidden state. Either way the expected cost of an error is
d H dᵀ, as for other matrices: H is E[g gᵀ] of the lookups plus, for an LM head, E[h hᵀ] weighted by
one minus the probability that two sampled labels agree. The same backward passes yield the most
probable tokens at each position, by which the rows of the head are clustered; see
``vocab_clusters``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Embedding, ForwardContext
from mlxarch.blocks.linear import Matrix
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress, silent
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.calibration.gradient_records import GradientRecord
from mlxarch.quantize.calibration.layerwise import ignore_float_errors
from mlxarch.quantize.calibration.output_gradients import OutputGradients
from mlxarch.quantize.calibration.self_generated import sample_token
from mlxarch.quantize.calibration.sensitivity import FisherPass
from mlxarch.quantize.calibration.vocab_clusters import (
    TopTokens,
    VocabClusters,
    cluster_vocabulary,
    max_clusters,
)

BACKWARD_TOKENS = 1024  # default number of tokens
MAX_LOGITS = 2 << 20  # logits computed at once
BATCH_TOKENS = 256  # tokens per pass: backward holds the activations of a layer several times


@dataclass
class EmbeddingStats:
    """Vectors whose second moments weight quantization errors of an embedding table's rows.

    An error d (in,) of a row costs d H dᵀ in log-likelihood, with H the sum over all uses of E[v
    vᵀ]: the vectors v are gradients for lookups, and weighted last hidden states for an LM head.

    Attributes:
        inputs: the vectors v, one array (N, in) per use of the table, the LM head first.
        top_tokens: the most probable tokens at the positions of the head's inputs; None for a table
            that is no LM head.
    """

    inputs: list[np.ndarray]
    top_tokens: TopTokens | None = None

    def cluster_rows(self, vocab_size: int) -> VocabClusters | None:
        """Cluster the rows of an LM head by the hidden states at which their tokens are probable.

        Each cluster is quantized with a Hessian of its own. Returns None for a table that is no LM
        head, and if the memory limit allows fewer than two clusters.
        """
        count = max_clusters(self.inputs[0].shape[1])
        if self.top_tokens is None or count < 2:
            return None
        return cluster_vocabulary(self.inputs[0], self.top_tokens, vocab_size, count)


def collect_embedding_stats(
    resolved: Resolved,
    batches: Sequence[mx.array],
    seed: int = 0,
    progress: Progress = silent,
    output_gradients: OutputGradients | None = None,
    scratch: Path | None = None,
    max_tokens: int = BACKWARD_TOKENS,
) -> dict[str, EmbeddingStats]:
    """Collect the statistics of every embedding table: parameter path -> statistics.

    Args:
        batches: token ids (B, L), all of the same L; evenly spaced windows of them are used.
        seed: seed of the sampled labels.
        progress: receives the weight bytes passed, forward and backward.
        output_gradients: receives the output gradients of all other matrices.
        scratch: folder for temporary files; None for the system's default.
        max_tokens: number of tokens to use, at most, but at least one window.
    """
    windows = mx.concatenate(list(batches))
    passes = _plan_passes(len(windows), windows.shape[1], max_tokens)
    collected = dict[str, list[EmbeddingStats]]()
    for number, ids in enumerate(ids for ids in passes if len(ids)):
        embedding_pass = _EmbeddingPass(
            output_gradients,
            resolved,
            windows[mx.array(ids)],
            (),
            _unchanged,
            seed + number,
            partial(_report_progress, progress, number, len(passes)),
        )
        with ignore_float_errors():
            embedding_pass.run(scratch)
        for path, stats in embedding_pass.stats.items():
            collected.setdefault(path, []).append(stats)
    return {path: _concatenate_stats(parts) for path, parts in collected.items()}


def _plan_passes(count: int, length: int, max_tokens: int) -> list[np.ndarray]:
    """Choose evenly spaced ones of ``count`` windows, and split them into passes."""
    used = min(max(max_tokens // length, 1), count)
    selected = np.linspace(0, count - 1, used).astype(int)
    return np.array_split(selected, -(-used * length // BATCH_TOKENS))


def hidden_state_bytes(resolved: Resolved, batches: Sequence[mx.array], max_tokens: int) -> int:
    """Return the bytes of the temporary file in which a pass keeps the hidden states of all layers.

    Args:
        batches: as for ``collect_embedding_stats``.
        max_tokens: as for ``collect_embedding_stats``.
    """
    length = batches[0].shape[1]
    passes = _plan_passes(sum(map(len, batches)), length, max_tokens)
    tokens = max(map(len, passes)) * length
    # never evaluated, as only the shape is needed
    state = resolved.model.embed(mx.zeros((1, 1), mx.int32), ForwardContext(1))
    return tokens * len(resolved.model.layers) * state.size * mx.float32.size


def _concatenate_stats(parts: Sequence[EmbeddingStats]) -> EmbeddingStats:
    by_use = zip(*(part.inputs for part in parts), strict=True)
    inputs = [np.concatenate(arrays) for arrays in by_use]
    top_tokens = [part.top_tokens for part in parts if part.top_tokens is not None]
    return EmbeddingStats(inputs, _concatenate_top_tokens(top_tokens) if top_tokens else None)


def _concatenate_top_tokens(parts: Sequence[TopTokens]) -> TopTokens:
    return TopTokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
    )


def _unchanged(
    path: str, index: int, rows: mx.array, inputs: np.ndarray, to: Quantization
) -> mx.array:
    return rows


def _report_progress(
    progress: Progress, number: int, count: int, label: str, done: int, total: int
) -> None:
    progress(label, number * total + done, count * total)


class _EmbeddingPass(FisherPass):
    """Backward pass that collects embedding statistics and, if given a store, output gradients."""

    def __init__(self, output_gradients: OutputGradients | None, *args) -> None:
        self.stats = dict[str, EmbeddingStats]()
        self._output_gradients = output_gradients
        self._embedding_paths = set[str]()
        super().__init__(*args)

    def _record_matrix(self, path: str, matrix: Matrix) -> None:
        if isinstance(matrix, Embedding):
            self._embedding_paths.add(path)
        if self._output_gradients is not None or isinstance(matrix, Embedding):
            super()._record_matrix(path, matrix)

    def _head_backward(self, state: mx.array) -> mx.array:
        """Backpropagate the log-likelihood of sampled labels to ``state``; keep the top tokens.

        The gradient of the logits is computed in NumPy, which takes less memory than
        differentiating the softmax.
        """
        model = self._layerwise.model
        rng = np.random.default_rng(self._seed)
        gradients = []
        top_tokens = list[TopTokens]()
        flat = mx.flatten(state, 0, 1)[None]
        step = max(MAX_LOGITS // model.vocab_size, 1)
        with self._layerwise.loaded_parameters(None):
            for start in range(0, self._token_count, step):
                part = flat[:, start : start + step]
                probabilities = _softmax_in_place(np.array(model.head(part)))
                top_tokens.append(TopTokens.from_probabilities(probabilities[0]))
                logit_gradient = mx.array(_logit_gradient_in_place(probabilities, rng))
                gradients += self._backward(lambda x: [model.head(x)], [part], [logit_gradient])
        self._evaluate_records()
        for stats in self.stats.values():
            stats.top_tokens = _concatenate_top_tokens(top_tokens)
        return mx.concatenate(gradients, axis=1).reshape(state.shape)

    def _evaluate(self, path: str, record: GradientRecord) -> None:
        if path not in self._embedding_paths:
            if self._output_gradients is not None and record.gradients and record.row_ids is None:
                self._output_gradients.append(path, record.gradients)
            return
        [inputs] = record.inputs
        # mean of the squared output gradient: 1 for lookups; for the head 1 − P(two labels agree)
        weight = record.squared_gradients.sum() / len(inputs)
        stats = self.stats.setdefault(path, EmbeddingStats([]))
        stats.inputs.append(inputs * np.float32(np.sqrt(weight)))


def _softmax_in_place(logits: np.ndarray) -> np.ndarray:
    """Turn logits (1, T, V) into probabilities, overwriting them."""
    logits -= logits.max(-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(-1, keepdims=True)
    return logits


def _logit_gradient_in_place(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sample labels; return the gradient of their log-likelihood with respect to the logits.

    It is one-hot(label) − p, (1, T, V). Overwrites the probabilities.
    """
    for row in probabilities[0]:
        token = sample_token(row, rng)
        np.negative(row, out=row)
        row[token] += 1
    return probabilities
