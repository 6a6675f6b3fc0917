"""What the rows of a table of embeddings are used for, and so how much an error of theirs costs.

A row is looked up: then its error moves a state, and the likelihood as far as its gradient g there goes along with it.
Where the table is the head as well, an error makes a logit wrong by its product with the last state h. Both are what
inputs are to other matrices: with E[g gᵀ], and E[h hᵀ] by how far the labels are from certain, added up, the expected
cost of an error d is d H dᵀ. One pass back tells both; see ``sensitivity``. It also tells which rows of the head are
likely at which places; see ``families``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Embedding, Quantization
from mlxarch.blocks.linear import Matrix
from mlxarch.progress import Progress, silent
from mlxarch.quantize.continuation import drawn
from mlxarch.quantize.families import Families, Likely, families, most
from mlxarch.quantize.pulls import Pulls
from mlxarch.quantize.sensitivity import Pass, _Use
from mlxarch.quantize.walk import quiet
from mlxarch.weights import Resolved

TOKENS = 1024  # that pass back
LOGITS = 2 << 20  # of them at once
BATCH = 256  # of them at once: a layer's activations are held several times on the way back


@dataclass
class Uses:
    """What is to be known of a table.

    Attributes:
        rows: for each of its uses, rows (N, in), whose second moments are to be added up; those of a head come first.
        likely: the likeliest tokens behind each of the first of these, of a head.
    """

    rows: list[np.ndarray]
    likely: Likely | None = None

    def families(self, rows: int) -> Families | None:
        """Of the ``rows`` rows of a head; of another table there are none, nor of one for which memory is too small."""
        count = most(self.rows[0].shape[1])
        return families(self.rows[0], self.likely, rows, count) if self.likely is not None and count > 1 else None


def uses(
    resolved: Resolved,
    batches: Sequence[mx.array],
    seed: int = 0,
    progress: Progress = silent,
    kept: Pulls | None = None,
    scratch: Path | None = None,
    count: int = TOKENS,
) -> dict[str, Uses]:
    """By the path of each table.

    Args:
        batches: token ids (B, L) of one L, from all over which a few windows are taken.
        seed: of the labels that are drawn.
        progress: told the layers done, forwards and back.
        kept: is given the pulls at the outputs of the other matrices.
        scratch: the folder for what is put aside on the way forwards; None is the system's.
        count: of the tokens, at most.
    """
    windows = mx.concatenate(list(batches))
    length = windows.shape[1]
    chosen = np.linspace(0, len(windows) - 1, min(max(count // length, 1), len(windows))).astype(int)
    parts = np.array_split(chosen, -(-len(chosen) * length // BATCH))
    found = dict[str, list[Uses]]()
    for number, part in enumerate(part for part in parts if len(part)):
        told = partial(_told, progress, number, len(parts))
        own = _Uses(kept, resolved, windows[mx.array(part)], (), _as_they_are, seed + number, told)
        with quiet():
            own.run(scratch)
        for path, more in own.found.items():
            found.setdefault(path, []).append(more)
    return {path: _joined(several) for path, several in found.items()}


def _joined(several: Sequence[Uses]) -> Uses:
    """What some tokens after the other tell."""
    rows = [np.concatenate(parts) for parts in zip(*(each.rows for each in several), strict=True)]
    likely = [each.likely for each in several if each.likely is not None]
    return Uses(rows, Likely(*map(np.concatenate, zip(*likely, strict=True))) if likely else None)


def _as_they_are(path: str, index: int, rows: mx.array, inputs: np.ndarray, to: Quantization) -> mx.array:
    return rows


def _told(progress: Progress, number: int, count: int, label: str, done: int, total: int) -> None:
    progress(label, number * total + done, count * total)


class _Uses(Pass):
    """A pass that listens to tables, and to other matrices if what pulls at these is kept."""

    def __init__(self, kept: Pulls | None, *args) -> None:
        self.found = dict[str, Uses]()
        self._kept, self._tables = kept, set[str]()
        super().__init__(*args)

    def _listen(self, path: str, matrix: Matrix) -> None:
        if isinstance(matrix, Embedding):
            self._tables.add(path)
        if self._kept is not None or isinstance(matrix, Embedding):
            super()._listen(path, matrix)

    def _head(self, state: mx.array) -> mx.array:
        """Draw labels, and return how their likelihood pulls at the state, in less memory than a pass for costs."""
        model, draw, pulls, likely = self._walk.model, np.random.default_rng(self._seed), [], list[Likely]()
        flat, at_once = mx.flatten(state, 0, 1)[None], max(LOGITS // model.vocab_size, 1)
        with self._walk.weights(None):
            for start in range(0, self._count, at_once):
                part = flat[:, start : start + at_once]
                chances = _chances(np.array(model.head(part)))
                likely.append(Likely.of(chances[0]))
                pulls += self._backward(lambda x: [model.head(x)], [part], [mx.array(_pull(chances, draw))])
        self._count_costs()
        for own in self.found.values():
            own.likely = Likely(*map(np.concatenate, zip(*likely, strict=True)))
        return mx.concatenate(pulls, axis=1).reshape(state.shape)

    def _add(self, path: str, use: _Use) -> None:
        if path not in self._tables:
            if self._kept is not None and use.pulls and use.rows is None:
                self._kept.add(path, use.pulls)
            return
        [inputs] = use.inputs
        share = use.squares.sum() / len(inputs)  # of a lookup 1; of the head 1 less the chance that labels agree
        self.found.setdefault(path, Uses([])).rows.append(inputs * np.float32(np.sqrt(share)))


def _chances(logits: np.ndarray) -> np.ndarray:
    """Of all tokens, by logits (1, T, V), in their place."""
    logits -= logits.max(-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(-1, keepdims=True)
    return logits


def _pull(chances: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """How the likelihood of labels that are drawn by chances (1, T, V) pulls at the logits; in their place."""
    for row in chances[0]:
        token = drawn(row, draw)
        np.negative(row, out=row)
        row[token] += 1
    return chances
