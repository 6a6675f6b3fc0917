"""How the likelihood pulls at the outputs of matrices, and what that says of errors of their rows.

A token's outputs are off by e, and its likelihood feels (g · e)² / 2 of it: the errors of rows that are pulled at
together add up, or cancel. With pulls g and inputs x as strangers to each other, an error D (R, in) is expected to cost
tr(G D H Dᵀ) / 2, with G = E[g gᵀ] and H = E[x xᵀ]; what looks at inputs only takes all pulls for unrelated. Source of
the two sides: arXiv:2505.22988.
"""

from collections.abc import Callable
from math import prod
from typing import IO

import mlx.core as mx
import numpy as np

from mlxarch.quantize.gptq import factor_of, shrunk
from mlxarch.quantize.search import Grid
from mlxarch.quantize.sensitivity import WIDEST
from mlxarch.quantize.walk import quiet
from mlxarch.weights import Resolved

LEAST, MOST = 16, 64  # rows that are packed at once, of which none hears of the others
BLOCKS = 8  # of them, where there are as many rows
LOUDEST = 2  # times the median, that a token may pull: a few first ones can pull harder than all others together

Choose = Callable[[np.ndarray], tuple[Grid, np.ndarray]]
"""Grids for rows (N, in), and the values that come of them."""


def token_bytes(resolved: Resolved) -> int:
    """What one token takes in the file of ``Pulls``: two bytes for each output, of the chosen experts alone."""
    chosen, count = getattr(resolved.architecture.config, "num_experts_per_tok", 1), 1
    for path in resolved.matrices:
        *several, high, _ = resolved.parameters[path].shape
        count += min(prod(several), chosen) * high if high <= WIDEST else 0
    return 2 * count


class Pulls:
    """Gradients of the outputs of each matrix, token by token, in a file: in bfloat16, for they are only averaged."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[str, list[list[tuple[int, tuple[int, int]]]]] = {}

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self._file.seek(0, 2)

    def __contains__(self, path: str) -> bool:
        return path in self._places

    def add(self, path: str, pulls: list[np.ndarray]) -> None:
        """More tokens (T, out) of a matrix, or of each of E experts."""
        places = self._places.setdefault(path, [[] for _ in pulls])
        for own, part in zip(places, pulls, strict=True):
            own.append((self._file.seek(0, 2), part.shape))
            self._file.write((np.ascontiguousarray(part, np.float32).view(np.uint32) >> 16).astype(np.uint16).data)

    def of(self, path: str, index: int, start: int, stop: int) -> np.ndarray:
        """(T, stop − start): at some outputs of a matrix, of the one with the index of several; T may be 0."""
        parts = [np.zeros((0, stop - start), np.float32)]
        for at, shape in self._places[path][index] if path in self._places else ():
            self._file.seek(at)
            whole = np.frombuffer(self._file.read(2 * shape[0] * shape[1]), np.uint16).reshape(shape)
            parts.append((whole[:, start:stop].astype(np.uint32) << 16).view(np.float32))
        return np.concatenate(parts)


class RowFeedback:
    """What the pulls (T, R) at some rows say about how one makes up for the errors of others."""

    def __init__(self, pulls: np.ndarray) -> None:
        self.moments = _moments(pulls)
        self._blocks = _blocks(len(self.moments))
        order = np.concatenate(self._blocks)
        self._back = np.argsort(order)
        self._factor = factor_of(self.moments[np.ix_(order, order)])

    def choose(self, exact: np.ndarray, choose: Choose) -> tuple[Grid, np.ndarray]:
        """Grids and values for rows (R, in), block by block, each moved to where it makes up for those before it.

        With G = F Fᵀ, F upper triangular, the errors D cost the squares of Fᵀ D: what earlier rows add to a row of it,
        that row's own error takes away as well as it can, and later rows are free to follow.
        """
        rest = exact[np.concatenate(self._blocks)]
        errors, grids, start = np.empty_like(rest), list[Grid](), 0
        for block in self._blocks:
            own = slice(start, start + len(block))
            owed = np.linalg.solve(self._factor[own, own].T, self._factor[:start, own].T @ errors[:start])
            grid, values = choose(rest[own] - owed)
            errors[own], start = values - rest[own], own.stop
            grids.append(grid)
        back = mx.array(self._back)
        grid = Grid(*(mx.concatenate([grid[part] for grid in grids])[back] for part in range(2)))
        return grid, (rest + errors)[self._back]


def _moments(pulls: np.ndarray) -> np.ndarray:
    """(T, R) -> (R, R), of mean 1 on the diagonal; those of strangers if nothing is to be learned from the pulls."""
    with quiet():
        pulls = pulls / np.abs(pulls).max()  # squares of small ones would vanish
        norms = np.linalg.norm(pulls, axis=1)
    felt = norms[norms > 0]
    if not np.isfinite(norms).all() or not felt.size:
        return np.eye(pulls.shape[1], dtype=np.float32)
    pulls *= np.minimum(1, LOUDEST * np.median(felt) / np.maximum(norms, felt.min()))[:, None]
    pulls /= np.sqrt(np.vdot(pulls, pulls) / pulls.shape[1])
    return shrunk(pulls.T @ pulls, len(felt))


def _blocks(rows: int) -> list[np.ndarray]:
    """Indices of the rows of each block: every n-th of all, for neighbours have the most to tell each other."""
    count = -(-rows // min(max(rows // BLOCKS, LEAST), MOST))
    return [np.arange(first, rows, count) for first in range(count)]
