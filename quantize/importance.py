"""What the matrices of a model are multiplied by, gathered from a few tokens, layer by layer.

Which channels are large is a property of the weights: random tokens show that nearly as well as text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks import Embedding
from mlxarch.progress import Progress, silent
from mlxarch.quantize import host_attention
from mlxarch.quantize.walk import Walk, quiet
from mlxarch.weights import Resolved

TOKENS = 1024  # random ones
WINDOW = 128  # of them
COMMON = 128  # the share of the vocabulary, one in so many, whose tokens are all about as likely
BATCH = 2048  # tokens whose activations are held at once


@dataclass
class Inputs:
    """What reaches a matrix, or each of E experts.

    Attributes:
        squares: sums of the squares of each channel, (1 or E, in).
        counts: of the rows that were added, (1 or E,).
        rows: these rows, if they are kept: a list for each expert.
    """

    squares: np.ndarray
    counts: np.ndarray
    rows: list[list[np.ndarray]] = field(default_factory=list)

    @classmethod
    def of(cls, *parts: np.ndarray, keep: bool = False) -> "Inputs":
        """What reaches a matrix, or each of E experts: rows (N, in)."""
        squares = np.stack([np.einsum("ri,ri->i", part, part, dtype=np.float64) for part in parts])
        return cls(squares, np.array([len(part) for part in parts]), [[part] for part in parts] if keep else [])

    @property
    def unreached(self) -> list[int]:
        """Experts that no row went to."""
        return np.flatnonzero(self.counts == 0).tolist()

    def importance(self) -> np.ndarray:
        """Mean square of each channel, (1 or E, in); an expert that no row went to has the mean of the others."""
        reached = self.counts > 0
        means = self.squares / np.maximum(self.counts, 1)[:, None]
        means[~reached] = self.squares.sum(0) / max(self.counts.sum(), 1)
        return means

    def add(self, other: "Inputs") -> None:
        """More rows."""
        self.squares, self.counts = self.squares + other.squares, self.counts + other.counts
        for own, more in zip(self.rows, other.rows, strict=True):
            own += more


class Gathering:
    """A walk through a model that tells, layer by layer, what reached its matrices.

    Args:
        batches: token ids (B, L).
        keep: whether the rows themselves are kept, and not only their squares.

    Attributes:
        tables: paths of the embeddings, of which this tells nothing: they are looked up. See ``tables.uses``.
    """

    def __init__(self, resolved: Resolved, batches: Sequence[mx.array], keep: bool = False) -> None:
        self.walk = Walk(resolved, batches, self._observe)
        host_attention.install(self.walk.model)
        self.keep, self._found = keep, dict[str, Inputs]()
        self._tensors = resolved.parameters
        modules: list[tuple[str, nn.Module]] = self.walk.model.named_modules()
        self.tables = {f"{path}.weight" for path, module in modules if isinstance(module, Embedding)}
        self._last: tuple[mx.array, mx.array | None, Inputs] | None = None

    def layers(self, progress: Progress = silent) -> Iterator[tuple[list[str], dict[str, Inputs]]]:
        """The parameters of each layer in turn, with what reached those that are matrices; then all others.

        What was handed out is forgotten before the next. ``progress`` is told the bytes of the weights passed.
        """
        layers = range(len(self.walk.model.layers))
        weights = [self._bytes(index) for index in layers]
        total, label = sum(weights) + self._bytes(None), "gathering statistics"
        with quiet():
            states = self.walk.embed()
        outside = self._taken()
        for index in layers:
            progress(label, sum(weights[:index]), total)
            with quiet():
                states = self.walk.layer(index, states)
            yield self.walk.paths(index), self._taken()
        with quiet():
            self.walk.head(states, logits=False)
        progress(label, total, total)
        yield self.walk.paths(None), outside | self._taken()

    def _bytes(self, index: int | None) -> int:
        return sum(self._tensors[path].nbytes for path in self.walk.paths(index))

    def _taken(self) -> dict[str, Inputs]:
        found, self._found, self._last = self._found, {}, None
        return found

    def _observe(self, path: str, x: mx.array, chosen: mx.array | None) -> None:
        if path in self.tables:
            return
        if self._last is None or self._last[0] is not x or self._last[1] is not chosen:
            self._last = x, chosen, self._inputs(x, chosen, self._tensors[path].shape[0])
        inputs = self._last[2]
        if path in self._found:
            self._found[path].add(inputs)
        else:
            self._found[path] = Inputs(inputs.squares, inputs.counts, [list(rows) for rows in inputs.rows])

    def _inputs(self, x: mx.array, chosen: mx.array | None, experts: int) -> Inputs:
        rows = np.asarray(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        if chosen is None:
            own = [rows]
        else:
            ids = np.asarray(chosen).ravel()
            own = [rows[ids == expert] for expert in range(experts)]
        return Inputs.of(*own, keep=self.keep)


def random_tokens(vocabulary: int, context: int, count: int = TOKENS, seed: int = 0) -> list[mx.array]:
    """Windows of tokens, in batches, the first of the vocabulary more often than the last: p(i) ~ 1 / (i + V / 128).

    Vocabularies are made from the most frequent pieces of text on, so that this is nearer to text than equal chances.
    """
    length = min(WINDOW, context)
    shares = np.random.default_rng(seed).random((count // length, length))
    windows = np.minimum(vocabulary / COMMON * ((COMMON + 1) ** shares - 1), vocabulary - 1).astype(np.int64)
    step = max(BATCH // length, 1)
    return [mx.array(windows[start : start + step]) for start in range(0, len(windows), step)]


def text_tokens(ids: Sequence[int], context: int) -> list[mx.array]:
    """Windows of a text, in batches; a rest that fills no window is left out, unless there is nothing else."""
    length = min(4 * WINDOW, context, len(ids))
    windows = mx.array(list(ids[: len(ids) // length * length])).reshape(-1, length)
    step = max(BATCH // length, 1)
    return [windows[start : start + step] for start in range(0, len(windows), step)]
