"""What the rows of a table of embeddings are used for, and so how much an error of theirs costs.

A row is looked up: then its error moves a state, and the likelihood as far as its gradient g there goes along with it.
Where the table is the head as well, an error makes a logit wrong by its product with the last state h. Both are what
inputs are to other matrices: with E[g gᵀ], and E[h hᵀ] by how far the labels are from certain, added up, the expected
cost of an error d is d H dᵀ. One pass back tells both; see ``sensitivity``.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Embedding
from mlxarch.blocks.linear import Matrix
from mlxarch.progress import Progress, silent
from mlxarch.quantize.sensitivity import Pass, _Use
from mlxarch.weights import Resolved

TOKENS = 2048  # that pass back, at most


def uses(
    resolved: Resolved, batches: Sequence[mx.array], seed: int = 0, progress: Progress = silent
) -> dict[str, list[np.ndarray]]:
    """Path of each table -> for each of its uses, rows (N, in), whose second moments are to be added up.

    Args:
        batches: token ids (B, L) of one L, from all over which a few windows are taken.
        seed: of the labels that are drawn.
        progress: told the layers done, forwards and back.
    """
    windows = mx.concatenate(list(batches))
    count = min(max(TOKENS // windows.shape[1], 1), len(windows))
    some = windows[mx.array(np.linspace(0, len(windows) - 1, count).astype(np.int32))]
    found = _Uses(resolved, some, (), lambda path, index, rows, x, to: rows, seed, progress)
    with np.errstate(all="ignore"):  # a weight that is not finite is refused when it is written, by its name
        found.run()
    return found.rows


class _Uses(Pass):
    """A pass that listens to tables only."""

    def __init__(self, *args) -> None:
        self.rows: dict[str, list[np.ndarray]] = {}
        super().__init__(*args)

    def _listen(self, path: str, matrix: Matrix) -> None:
        if isinstance(matrix, Embedding):
            super()._listen(path, matrix)

    def _add(self, path: str, use: _Use) -> None:
        [inputs] = use.inputs
        share = use.squares.sum() / len(inputs)  # of a lookup 1; of the head 1 less the chance that labels agree
        self.rows.setdefault(path, []).append(inputs * np.float32(np.sqrt(share)))
