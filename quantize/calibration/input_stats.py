"""Statistics of the inputs of each matrix, collected layer by layer from a few calibration tokens.

Which input channels are large is a property of the weights: random tokens show it nearly as well as
text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks import Embedding
from mlxarch.loading.resolve import Resolved
from mlxarch.progress import Progress, silent
from mlxarch.quantize.calibration.layerwise import LayerwiseModel, ignore_float_errors
from mlxarch.quantize.calibration.numpy_attention import use_numpy_attention

DEFAULT_TOKENS = 1024  # random tokens
WINDOW_LENGTH = 128  # tokens per window of random tokens
ZIPF_SHIFT_DIVISOR = 128  # the first V / 128 tokens of the vocabulary are about equally likely
BATCH_TOKENS = 2048  # tokens whose activations are in memory at once


@dataclass
class InputStats:
    """Input statistics of a matrix, or of each matrix of a stack of E experts.

    Attributes:
        sum_squares: sum of the squares of each input channel over the tokens, (1 or E, in).
        counts: number of input vectors, (1 or E,).
        inputs: the input vectors themselves if they are kept: for each expert a list of arrays (N,
            in).
    """

    sum_squares: np.ndarray
    counts: np.ndarray
    inputs: list[list[np.ndarray]] = field(default_factory=list)

    @classmethod
    def from_inputs(cls, *inputs: np.ndarray, keep: bool = False) -> "InputStats":
        """Compute the mean square of each channel of a matrix's calibration inputs.

        Args:
            inputs: input vectors (N, in) of the matrix, or one array for each of its experts.
            keep: keep the vectors as well, from which GPTQ-like error feedback computes H = E[x xᵀ].
        """
        sum_squares = np.stack([np.einsum("ri,ri->i", x, x, dtype=np.float64) for x in inputs])
        counts = np.array([len(x) for x in inputs])
        return cls(sum_squares, counts, [[x] for x in inputs] if keep else [])

    @property
    def unrouted_experts(self) -> list[int]:
        """Indices of the experts to which no token was routed."""
        return np.flatnonzero(self.counts == 0).tolist()

    def importance(self) -> np.ndarray:
        """Return the mean square of each input channel, (1 or E, in).

        An expert to which no token was routed gets the mean over all experts.
        """
        routed = self.counts > 0
        means = self.sum_squares / np.maximum(self.counts, 1)[:, None]
        means[~routed] = self.sum_squares.sum(0) / max(self.counts.sum(), 1)
        return means

    def merge(self, other: "InputStats") -> None:
        """Add the statistics of further tokens."""
        self.sum_squares = self.sum_squares + other.sum_squares
        self.counts = self.counts + other.counts
        for own, more in zip(self.inputs, other.inputs, strict=True):
            own += more


class InputCollector:
    """Layer-wise forward pass that collects the input statistics of every matrix.

    Args:
        batches: token ids (B, L).
        keep: keep the input vectors, in addition to their sums of squares.

    Attributes:
        embedding_paths: paths of the embedding tables, which are left out here because their rows
            are looked up; see ``embedding_stats``.
    """

    def __init__(self, resolved: Resolved, batches: Sequence[mx.array], keep: bool = False) -> None:
        self.layerwise = LayerwiseModel(resolved, batches, self._observe)
        use_numpy_attention(self.layerwise.model)
        self.keep = keep
        self._stats = dict[str, InputStats]()
        self._tensors = resolved.parameters
        modules: list[tuple[str, nn.Module]] = self.layerwise.model.named_modules()
        self.embedding_paths = {
            f"{path}.weight" for path, module in modules if isinstance(module, Embedding)
        }
        # projections that share an input share its statistics
        self._previous: tuple[mx.array, mx.array | None, InputStats] | None = None

    def collect(
        self, progress: Progress = silent
    ) -> Iterator[tuple[list[str], dict[str, InputStats]]]:
        """Run the calibration tokens through the model layer by layer, and yield input statistics.

        Statistics are dropped after they are yielded.

        Args:
            progress: called with the bytes of weights read so far.

        Yields:
            For each layer the names of its parameters, and the statistics of the inputs of each of
            its matrices by name. The last item is for the parameters outside the layers.
        """
        layers = range(len(self.layerwise.model.layers))
        layer_bytes = [self._weight_bytes(index) for index in layers]
        total = sum(layer_bytes) + self._weight_bytes(None)
        label = "gathering statistics"
        with ignore_float_errors():
            states = self.layerwise.embed()
        outside = self._take_stats()
        for index in layers:
            progress(label, sum(layer_bytes[:index]), total)
            with ignore_float_errors():
                states = self.layerwise.run_layer(index, states)
            yield self.layerwise.parameter_paths(index), self._take_stats()
        with ignore_float_errors():
            self.layerwise.run_head(states, logits=False)
        progress(label, total, total)
        yield self.layerwise.parameter_paths(None), outside | self._take_stats()

    def _weight_bytes(self, index: int | None) -> int:
        return sum(self._tensors[path].nbytes for path in self.layerwise.parameter_paths(index))

    def _take_stats(self) -> dict[str, InputStats]:
        stats = self._stats
        self._stats = {}
        self._previous = None
        return stats

    def _observe(self, path: str, x: mx.array, expert_ids: mx.array | None) -> None:
        if path in self.embedding_paths:
            return
        if (
            self._previous is None
            or self._previous[0] is not x
            or self._previous[1] is not expert_ids
        ):
            experts = self._tensors[path].shape[0]
            self._previous = x, expert_ids, self._compute_stats(x, expert_ids, experts)
        stats = self._previous[2]
        if path in self._stats:
            self._stats[path].merge(stats)
        else:
            inputs = [list(vectors) for vectors in stats.inputs]
            self._stats[path] = InputStats(stats.sum_squares, stats.counts, inputs)

    def _compute_stats(self, x: mx.array, expert_ids: mx.array | None, experts: int) -> InputStats:
        vectors = np.asarray(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        if expert_ids is None:
            return InputStats.from_inputs(vectors, keep=self.keep)
        ids = np.asarray(expert_ids).ravel()
        by_expert = [vectors[ids == expert] for expert in range(experts)]
        return InputStats.from_inputs(*by_expert, keep=self.keep)


def random_tokens(
    vocabulary: int, context: int, count: int = DEFAULT_TOKENS, seed: int = 0
) -> list[mx.array]:
    """Return batches (B, L) of random token ids with Zipf-Mandelbrot probabilities.

    p(i) ~ 1 / (i + V / 128). Vocabularies are built from the most frequent pieces of text on, so
    this is closer to text than equal probabilities.

    Args:
        vocabulary: vocabulary size V.
        context: context length of the model, an upper limit for L.
        count: number of tokens, rounded down to whole windows.
        seed: seed of the random generator.
    """
    length = min(WINDOW_LENGTH, context)
    uniform = np.random.default_rng(seed).random((count // length, length))
    shift = vocabulary / ZIPF_SHIFT_DIVISOR
    ids = np.minimum(shift * ((ZIPF_SHIFT_DIVISOR + 1) ** uniform - 1), vocabulary - 1)
    windows = ids.astype(np.int64)
    step = max(BATCH_TOKENS // length, 1)
    return [mx.array(windows[start : start + step]) for start in range(0, len(windows), step)]


def text_windows(ids: Sequence[int], context: int) -> list[mx.array]:
    """Split the token ids of a text into batches (B, L) of windows.

    L is at most 4 * ``WINDOW_LENGTH`` and at most the context length. Tokens after the last full
    window are dropped.
    """
    length = min(4 * WINDOW_LENGTH, context, len(ids))
    windows = mx.array(list(ids[: len(ids) // length * length])).reshape(-1, length)
    step = max(BATCH_TOKENS // length, 1)
    return [windows[start : start + step] for start in range(0, len(windows), step)]
