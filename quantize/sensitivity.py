"""How much each matrix costs the model when it is packed: the divergence to expect, matrix by matrix, from one pass.

The divergence of two models that are close is half the square of the distance in the Fisher metric (arXiv:1412.1193).
Taken apart by matrices, and each of them by the rows that make its outputs (arXiv:1503.05671), what is left to know of
an output is how hard it pulls at the logits, and how far its row moves it: 1/2 E[(Σ g (x · Δw))²], in nats per token,
the sum over the tokens of a window. Their errors are no strangers to each other: inputs have much in common, and with
it what they make of one Δw; token by token, a fifth to a third of the divergence would be missing. The gradients
g come from one backward pass for labels that the model draws itself, the inputs x from the way there.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxarch.blocks import Embedding, Quantization
from mlxarch.blocks.linear import ExpertLinear, Matrix
from mlxarch.progress import Progress, silent
from mlxarch.quantize import host_attention
from mlxarch.quantize.formats import fitting
from mlxarch.quantize.walk import Walk
from mlxarch.tensors import FLOATS
from mlxarch.weights import Resolved

ROWS = 64  # of a matrix, that stand for all of them
TABLE_ROWS = 512  # of one outside of the layers: few, that make up a third of the costs
LOGITS = 4 << 20  # of them at once, of which a pass back holds several copies
WIDEST = 1 << 15  # outputs of a matrix, of which the pull at every token is kept

Rounded = Callable[[str, int, mx.array, np.ndarray, Quantization], mx.array]
"""Rows (R, in) of the matrix at a path, of the one with the given index in a stack, with inputs that they get (T, in),
as they come back from being packed."""


def costs(
    resolved: Resolved,
    tokens: mx.array,
    candidates: Sequence[Quantization],
    rounded: Rounded,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, dict[Quantization, float]]:
    """Nats per token that each matrix costs at each of the candidates: path -> settings -> cost.

    The activations of one layer are in memory at a time, and what stands between the layers is on the disk.

    Args:
        tokens: (B, L), in range; 1,024 in all do.
        rounded: see Rounded.
        seed: of the labels that are drawn.
        progress: told the layers done, forwards and back.
    """
    return Pass(resolved, tokens, candidates, rounded, seed, progress).run()


@dataclass
class _Use:
    """One way in which a matrix, or each of a stack of them, takes part in a pass.

    Attributes:
        squares: sum of g² over the tokens, of each row.
        inputs: what the rows are multiplied by, (tokens, in), for each matrix of the stack.
        pulls: g of each token, (tokens, rows), likewise; None where a token pulls as hard as another.
        rows: indices of the rows, where these are not all of them in order.
        looked_up: the row that each token takes from a table, (tokens,): it pulls at no other.
        windows: the shape (n, B, L) of the tokens, where those of one of B windows act together.
    """

    squares: np.ndarray
    inputs: list[np.ndarray]
    pulls: list[np.ndarray] | None = None
    rows: np.ndarray | None = None
    looked_up: np.ndarray | None = None
    windows: tuple[int, int, int] | None = None

    def pulls_at(self, index: int, rows: np.ndarray) -> np.ndarray | None:
        """g of each token at some rows of a matrix, (tokens, rows)."""
        if self.looked_up is not None:
            return (self.looked_up[:, None] == rows).astype(np.float32)
        return self.pulls[index][:, rows] if self.pulls else None

    def join(self, other: "_Use") -> None:
        """Add what more tokens bring."""
        self.squares = self.squares + other.squares
        self.inputs = [np.concatenate(pair) for pair in zip(self.inputs, other.inputs, strict=True)]
        if self.pulls and other.pulls:
            self.pulls = [np.concatenate(pair) for pair in zip(self.pulls, other.pulls, strict=True)]


class Pass:
    """One pass forwards and one back; see ``costs``."""

    def __init__(
        self,
        resolved: Resolved,
        tokens: mx.array,
        candidates: Sequence[Quantization],
        rounded: Rounded,
        seed: int,
        progress: Progress,
    ) -> None:
        self._tensors, self._candidates, self._rounded = resolved.parameters, candidates, rounded
        self._seed, self._progress, self._count = seed, progress, tokens.size
        self._walk = Walk(resolved, [tokens])
        host_attention.install(self._walk.model)
        self._costs: dict[str, dict[Quantization, float]] = {}
        self._in_layers = set(resolved.parameters).difference(self._walk.paths(None))
        self._heard: dict[tuple[str, int], _Use] = {}
        self._together = False  # whether tokens of a window act on each other's labels
        self._calls: Counter[str] | None = None  # of the pass back that is under way
        for path, module in self._walk.model.named_modules():
            if isinstance(module, Matrix) and module.quantizable:
                self._listen(f"{path}.weight", module)

    def run(self, scratch: Path | None = None) -> dict[str, dict[Quantization, float]]:
        """Path -> settings -> nats per token. The states of all layers stand in a file in the folder ``scratch``."""
        walk, layers = self._walk, range(len(self._walk.model.layers))
        [step], steps = walk.steps, 2 * len(layers) + 2
        total = 2 * sum(tensor.nbytes for tensor in self._tensors.values())  # they are passed twice
        with tempfile.TemporaryFile(dir=scratch) as file:
            [state] = walk.embed()
            shared = []
            for index in layers:
                np.asarray(state).tofile(file)
                shared.append(dict(step.shared))
                [state] = walk.layer(index, [state])
                self._progress("measuring", total * (index + 1) // steps, total)
            pull, pulls = self._head(state), [mx.zeros_like(leaf) for leaf in _floats(step.shared)]
            self._together = True
            for index in reversed(layers):
                file.seek(index * state.nbytes)
                state = mx.array(np.fromfile(file, np.float32, state.size).reshape(state.shape))
                pull, pulls = self._layer(index, state, shared.pop(), pull, pulls)
                self._progress("measuring", total * (steps - 1 - index) // steps, total)
        self._embeddings(pull, pulls)
        self._progress("measuring", total, total)
        return self._costs

    def _head(self, state: mx.array) -> mx.array:
        """Draw labels from the logits, and return how their likelihood pulls at the state."""
        model, key, pulls = self._walk.model, mx.random.key(self._seed), []
        flat, at_once = mx.flatten(state, 0, 1)[None], max(LOGITS // model.vocab_size, 1)  # tokens are apart here
        with self._walk.weights(None):
            for start in range(0, self._count, at_once):
                part = flat[:, start : start + at_once]
                key, own = mx.random.split(key)

                def likelihood(x: mx.array, own: mx.array = own) -> list[mx.array]:
                    logits = model.head(x)
                    labels = mx.stop_gradient(mx.random.categorical(logits, key=own))
                    chosen = mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
                    return [chosen - mx.logsumexp(logits, axis=-1)]

                pulls += self._backward(likelihood, [part], [mx.ones(part.shape[:2])])
        self._count_costs()
        return mx.concatenate(pulls, axis=1).reshape(state.shape)

    def _layer(
        self, index: int, state: mx.array, shared: dict[Hashable, Any], pull: mx.array, pulls: list[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        """From how the likelihood pulls at a layer's results to how it pulls at what the layer got."""
        [step], layer = self._walk.steps, self._walk.model.layers[index]

        def run(x: mx.array, *floats: mx.array) -> list[mx.array]:
            step.shared = _with_floats(shared, floats)
            return [layer(x, step, None), *_floats(step.shared)]

        with self._walk.weights(index):
            own, *others = self._backward(run, [state, *_floats(shared)], [pull, *pulls])
        self._count_costs()
        return own, others

    def _embeddings(self, pull: mx.array, pulls: list[mx.array]) -> None:
        """The tables: a row is used as often as its index is looked up."""
        [step], [tokens] = self._walk.steps, self._walk.batches
        modules = [(f"{path}.weight", module) for path, module in self._walk.model.named_modules()]
        tables = [(path, table, table.lookup) for path, table in modules if isinstance(table, Embedding)]
        asked: dict[str, mx.array] = {}

        def run(*moves: mx.array) -> list[mx.array]:
            step.shared = {}
            for (path, table, usual), move in zip(tables, moves, strict=True):

                def moved(tokens: mx.array, path: str = path, usual: Any = usual, move: mx.array = move) -> mx.array:
                    asked[path] = tokens
                    return usual(tokens) + move

                table.lookup = moved
            return [self._walk.model.embed(tokens, step), *_floats(step.shared)]

        with self._walk.weights(None):
            run(*(mx.zeros(1) for _ in tables))
            still = [mx.zeros((*asked[path].shape, table.weight.shape[-1])) for path, table, _ in tables]
            found = self._backward(run, still, [pull, *pulls])
        self._count_costs()
        for (path, table, usual), gradient in zip(tables, found, strict=True):
            table.lookup = usual
            often = np.bincount(np.asarray(asked[path]).ravel(), minlength=table.weight.shape[0])
            flat = np.asarray(gradient).reshape(-1, gradient.shape[-1])
            found_in = self._windows(gradient.shape)
            self._add(path, _Use(often, [flat], looked_up=np.asarray(asked[path]).ravel(), windows=found_in))

    def _backward(
        self, run: Callable[..., list[mx.array]], inputs: list[mx.array], pulls: list[mx.array]
    ) -> list[mx.array]:
        self._calls = Counter()
        try:
            _, found = mx.vjp(run, inputs, pulls)
            mx.eval(found)
        finally:
            self._calls = None
        return found

    def _listen(self, path: str, matrix: Matrix) -> None:
        """Let the matrix tell what it gets and how its results are pulled at."""

        def caught(y: mx.array, use: Callable[[np.ndarray], _Use]) -> mx.array:
            if self._calls is None:
                return y
            key = path, self._calls[path]
            self._calls[path] += 1

            def pulled(y: mx.array, pull: mx.array, _: mx.array) -> mx.array:
                found = use(np.asarray(pull.astype(mx.float32)))
                if key in self._heard:
                    self._heard[key].join(found)
                else:
                    self._heard[key] = found
                return pull

            same: Any = mx.custom_function(lambda y: y)
            same.vjp(pulled)
            return same(y)

        if isinstance(matrix, ExpertLinear):
            products, experts = matrix.products, matrix.weight.shape[0]

            def product_of_experts(x: mx.array, chosen: mx.array, sorted: bool, arrays: dict[str, Any]) -> mx.array:
                y = products(x, chosen, sorted, arrays)
                return caught(y, lambda pull: _by_expert(x, pull, chosen, experts))

            matrix.products = product_of_experts
        else:
            product = matrix.product

            def product_of_one(x: mx.array, arrays: Any = None, transpose: bool = True) -> mx.array:
                y = product(x, arrays, transpose)
                if arrays is None:
                    return caught(y, lambda pull: _by_row(x, pull, transpose, self._windows(x.shape)))
                rows = self._rows_of(path, arrays["weight"].shape)
                windows = self._windows((x.shape[0], *x.shape[2:]))
                return caught(y, lambda pull: _by_head(x, pull, transpose, rows, windows))

            matrix.product = product_of_one

    def _rows_of(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """Which rows of a matrix with some for each head a product takes: (heads, rows of each, in) of all its rows.

        One pass uses one part of every head's rows after the other.
        """
        heads, high, _ = shape
        ids = np.arange(prod(self._tensors[path].shape[:-1])).reshape(heads, -1)
        first = high * self._calls[path] if self._calls else 0
        return ids[:, first : first + high].ravel() if first + high <= ids.shape[1] else ids[:, -high:].ravel()

    def _windows(self, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Of inputs (..., B, L, in) to one matrix, how they are from windows.

        None in front of the head, where a token acts on its own label alone.
        """
        count, length = self._walk.batches[0].shape
        if not self._together or shape[-3:-1] != (count, length):
            return None
        return prod(shape[:-3]), count, length

    def _count_costs(self) -> None:
        for (path, _), heard in self._heard.items():
            self._add(path, heard)
        self._heard.clear()

    def _add(self, path: str, use: _Use) -> None:
        """Add what one way of using a matrix costs; a tied table is used in two."""
        pull, tensor = use.squares / self._count, self._tensors[path]
        own = self._costs.setdefault(path, dict.fromkeys(self._candidates, 0.0))
        if not pull.any():
            return
        count = ROWS if path in self._in_layers else TABLE_ROWS
        drawn, high = _drawn(pull, count), len(pull) // len(use.inputs)
        for index in np.unique(drawn // high).tolist():
            these, x = drawn[drawn // high == index], use.inputs[index]
            ids = these if use.rows is None else use.rows[these]
            rows = mx.concatenate([tensor.rows(row, row + 1) for row in ids.tolist()]).astype(mx.float32)
            pulls = use.pulls_at(index, these % high)
            share = 0.5 * pull.sum() / len(drawn) / (len(x) if pulls is None else np.square(pulls).sum(0))
            alone, joint = dict[Quantization, float](), []
            for to in self._candidates:
                if (fit := fitting(to, rows.shape[-1])) is None:
                    continue  # stays as it is
                moved = x @ np.asarray(self._rounded(path, index, rows, x, fit) - rows).T
                moved = moved if pulls is None else pulls * moved
                alone[to] = float((share * np.square(moved).sum(0)).sum())
                if use.windows is not None and pulls is not None and alone[to] > 0:
                    sums = moved.reshape(*use.windows, -1).sum((0, 2), dtype=np.float64)
                    joint.append(float((share * np.square(sums).sum(0)).sum()) / alone[to])
            for to in alone:  # what is joint is a matter of the inputs, and known better from all candidates
                own[to] += alone[to] * (float(np.mean(joint)) if joint else 1)


def _drawn(pull: np.ndarray, count: int) -> np.ndarray:
    """Indices of ``count`` rows, evenly spaced on the sum of ``pull``; a heavy one may come more than once."""
    total = np.cumsum(pull, dtype=np.float64)
    points = (np.arange(count) + 0.5) / count * total[-1]
    return np.minimum(np.searchsorted(total, points), len(pull) - 1)


def _by_row(x: mx.array, pull: np.ndarray, transpose: bool, windows: tuple[int, int, int] | None) -> _Use:
    left, right = pull.reshape(-1, pull.shape[-1]), np.asarray(x.astype(mx.float32)).reshape(-1, x.shape[-1])
    left, right = (left, right) if transpose else (right, left)
    pulls = [left] if left.shape[-1] <= WIDEST else None
    return _Use(np.square(left).sum(0, dtype=np.float64), [right], pulls, windows=windows)


def _by_head(
    x: mx.array, pull: np.ndarray, transpose: bool, rows: np.ndarray, windows: tuple[int, int, int] | None
) -> _Use:
    """Of a matrix for each head: x (B, 1 or H, L, ...), pull (B, H, L, ...)."""
    wide = np.broadcast_to(np.asarray(x.astype(mx.float32)), (*pull.shape[:-1], x.shape[-1]))
    heads = [_by_row(mx.array(wide[:, head]), pull[:, head], transpose, windows) for head in range(pull.shape[1])]
    squares, pulls = np.concatenate([head.squares for head in heads]), [p for head in heads for p in head.pulls or ()]
    return _Use(squares, [x for head in heads for x in head.inputs], pulls, rows, windows=windows)


def _by_expert(x: mx.array, pull: np.ndarray, chosen: mx.array, experts: int) -> _Use:
    """Of a matrix for each expert: x (..., 1, in) and pull (..., 1, out) of the chosen ones (...)."""
    ids = np.asarray(chosen).ravel()
    wide = mx.broadcast_to(x, (*chosen.shape, *x.shape[-2:]))
    right, left = np.asarray(wide.astype(mx.float32)).reshape(len(ids), -1), pull.reshape(len(ids), -1)
    pulls = [left[ids == expert] for expert in range(experts)]
    squares = np.concatenate([np.square(part).sum(0, dtype=np.float64) for part in pulls])
    return _Use(squares, [right[ids == expert] for expert in range(experts)], pulls)


def _floats(shared: dict[Hashable, Any]) -> list[mx.array]:
    leaves: list[tuple[str, Any]] = tree_flatten(list(shared.values()))  # pyright: ignore[reportAssignmentType]
    return [leaf for _, leaf in leaves if _is_float(leaf)]


def _with_floats(shared: dict[Hashable, Any], floats: Iterable[mx.array]) -> dict[Hashable, Any]:
    """The same with other arrays of floats, which come in the order of ``_floats``."""
    following = iter(floats)
    values = tree_map(lambda leaf: next(following) if _is_float(leaf) else leaf, list(shared.values()))
    return dict(zip(shared, values, strict=True))


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and leaf.dtype in FLOATS
