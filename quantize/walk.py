"""Tokens pass through a checkpoint layer by layer, with the rows of one matrix in memory at a time.

So statistics can be gathered of a model that is larger than the memory. On MLX's CPU back end NumPy does the matrix
products, which has a BLAS there: 30 to 130 GFLOP/s against 3.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks import CausalLM, Embedding, Linear, Step
from mlxarch.blocks.linear import ExpertLinear, Matrix
from mlxarch.tensors import Tensor
from mlxarch.weights import Resolved

CHUNK = 8 << 20  # bytes of a matrix, in float32, that are read at once

Observer = Callable[[str, mx.array, mx.array | None], None]
"""Told of each product before it is computed: the path of the matrix, its input (..., in), and of experts, whose input
is (..., 1, in), the chosen (...). Projections that share an input get the same array, one after the other."""


def _ignore(path: str, x: mx.array, chosen: mx.array | None) -> None:
    pass


class Walk:
    """A model that reads its weights when it needs them, in float32, and keeps none.

    ``embed`` makes the states, ``layer`` takes and returns them, ``head`` makes logits of them: one for each batch. A
    layer is a function of its states, and of what earlier layers left in ``steps[...].shared``; it may be called again,
    and differentiated by its state within ``weights``: ``mx.vjp(lambda x: model.layers[i](x, step, None), …)``.

    Args:
        batches: token ids (B, L), in range. The weights are read once for each, and its activations held at a time.
        observe: see Observer.
        tensors: in place of those that the model was resolved with.
    """

    def __init__(
        self,
        resolved: Resolved,
        batches: Sequence[mx.array],
        observe: Observer = _ignore,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model: CausalLM = resolved.architecture.build()
        self.batches, self.observe = list(batches), observe
        self.steps = [Step(tokens.shape[1]) for tokens in batches]
        self._tensors = resolved.parameters if tensors is None else tensors
        self._logits = True
        self._read = set(map(self._read_when_used, self._matrices()))
        layers = {id(layer): number for number, layer in enumerate(self.model.layers)}
        names = {path: layers[id(m)] for path, m in self.model.named_modules() if id(m) in layers}
        self._places = {path: _layer_of(path, names) for path in self._tensors}

    def paths(self, index: int | None) -> list[str]:
        """The parameters of a layer; of None, those outside of the layers."""
        return [path for path, place in self._places.items() if place == index]

    def embed(self) -> list[mx.array]:
        """The states in front of the first layer."""
        with self.weights(None):
            return self._each(self.model.embed, self.batches)

    def layer(self, index: int, states: Sequence[mx.array]) -> list[mx.array]:
        """The states one layer further."""
        with self.weights(index):
            return self._each(lambda state, step: self.model.layers[index](state, step, None), states)

    def head(self, states: Sequence[mx.array], logits: bool = True) -> list[mx.array]:
        """The logits (B, L, V); without ``logits`` only the observer is told of their making."""
        self._logits = logits
        with self.weights(None):
            made = self._each(lambda state, step: self.model.head(state), states, logits)
        return made if logits else []

    @contextmanager
    def weights(self, index: int | None) -> Iterator[None]:
        """Hold the small parameters of a layer, or of None those outside of the layers: norms, biases, routers."""
        modules, held = dict(self.model.named_modules()), []
        for path in self.paths(index):
            if path not in self._read:
                owner, _, leaf = path.rpartition(".")
                held.append((modules[owner], leaf, modules[owner][leaf]))
                modules[owner][leaf] = self._tensors[path].load().astype(mx.float32)
        try:
            yield
        finally:
            for module, leaf, shape in held:
                module[leaf] = shape  # zeros that nothing evaluates

    def _each(
        self, run: Callable[[mx.array, Step], mx.array], inputs: Sequence[mx.array], evaluate: bool = True
    ) -> list[mx.array]:
        out = []
        for x, step in zip(inputs, self.steps, strict=True):
            out.append(run(x, step))
            if evaluate:
                mx.eval(out[-1], *(value for value in step.shared.values() if isinstance(value, mx.array)))
        return out

    def _matrices(self) -> Iterator[tuple[str, Matrix]]:
        modules: list[tuple[str, nn.Module]] = self.model.named_modules()
        return ((f"{path}.weight", module) for path, module in modules if isinstance(module, Matrix))

    def _read_when_used(self, named: tuple[str, Matrix]) -> str:
        """Let a matrix take its rows from the checkpoint; "" for one that does not, and is loaded with its layer."""
        path, matrix = named
        tensor = self._tensors[path]

        def product(x: mx.array, arrays: object = None, transpose: bool = True) -> mx.array:
            self.observe(path, x, None)
            if not self._logits and tensor.shape[0] == self.model.vocab_size:
                return mx.zeros((*x.shape[:-1], tensor.shape[0]))
            return Product(tensor)(x)

        def products(x: mx.array, chosen: mx.array, sorted: bool, arrays: object) -> mx.array:
            self.observe(path, x, chosen)
            return Product(tensor, np.asarray(chosen).ravel())(x)

        usual = matrix.product

        def observed(x: mx.array, arrays: dict | None = None, transpose: bool = True) -> mx.array:
            if transpose:
                self.observe(path, x, None)
            return usual(x, arrays, transpose)

        match matrix:
            case ExpertLinear():
                matrix.products = products
            case Embedding():
                matrix.product, matrix.lookup = product, lambda tokens: _looked_up(tensor, tokens)
            case Linear():
                matrix.product = product
            case Matrix() if matrix.quantizable:
                matrix.product = observed
                return ""
            case _:
                return ""
        return path


def quiet() -> np.errstate:
    """A weight that is not finite is refused when it is written, by its name."""
    return np.errstate(all="ignore")


class Product:
    """x @ weight.T of a matrix that is read row by row; with ``experts``, a matrix (E, out, in) by one of E each.

    It can be differentiated by x.
    """

    def __init__(self, tensor: Tensor, experts: np.ndarray | None = None) -> None:
        self.tensor, self.experts = tensor, experts

    def __call__(self, x: mx.array) -> mx.array:
        """(..., in) -> (..., out); with experts, a row of x for each."""
        function = mx.custom_function(self._forward)
        function.vjp(lambda x, cotangent, _: self._backward(cotangent))
        return cast(mx.array, function(x))

    def _forward(self, x: mx.array) -> mx.array:
        return self._run(x, self.tensor.shape[-2], lambda part, weight: part @ weight.T, into_rows=True)

    def _backward(self, cotangent: mx.array) -> mx.array:
        return self._run(cotangent, self.tensor.shape[-1], lambda part, weight: part @ weight, into_rows=False)

    def _run(self, x: mx.array, width: int, times: Callable, into_rows: bool) -> mx.array:
        """Multiply by a few rows of the matrix at a time, which make columns of the result or add up to it."""
        on_cpu = mx.default_device() == mx.cpu
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        left = np.asarray(flat) if on_cpu else flat
        out = np.zeros((len(flat), width), np.float32) if on_cpu else mx.zeros((len(flat), width))
        high = self.tensor.shape[-2]
        for start, stop in self._ranges():
            rows = self.tensor.rows(start, stop).astype(mx.float32)
            weight = np.asarray(rows) if on_cpu else rows
            columns = slice(start % high, start % high + stop - start)
            chosen = slice(None) if self.experts is None else np.flatnonzero(self.experts == start // high)
            chosen = mx.array(chosen) if isinstance(chosen, np.ndarray) and not on_cpu else chosen
            if into_rows:
                out[chosen, columns] = times(left[chosen], weight)
            else:
                out[chosen] += times(left[chosen][:, columns], weight)
        return mx.array(out).reshape(*x.shape[:-1], width)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Rows to read at once, of one matrix each, and of experts only of those that somebody chose."""
        high, step = self.tensor.shape[-2], max(CHUNK // (4 * self.tensor.shape[-1]), 1)
        for index in [0] if self.experts is None else np.unique(self.experts).tolist():
            for start in range(index * high, (index + 1) * high, step):
                yield start, min(start + step, (index + 1) * high)


def _looked_up(tensor: Tensor, tokens: mx.array) -> mx.array:
    ids, where = np.unique(np.asarray(tokens), return_inverse=True)
    table = mx.concatenate([tensor.rows(token, token + 1) for token in ids.tolist()]).astype(mx.float32)
    return table[mx.array(where.reshape(tokens.shape))]


def _layer_of(path: str, layers: dict[str, int]) -> int | None:
    return next((number for name, number in layers.items() if path.startswith(f"{name}.")), None)
