"""Layer-wise forward and backward passes over a checkpoint that need not fit into memory.

Each layer reads its weights when it needs them, a few rows of one matrix at a time, so activation
statistics can be collected for models larger than the memory. On MLX's CPU backend NumPy computes
the matrix products, because it uses a BLAS there: 30 to 130 GFLOP/s against 3.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks import CausalLM, Embedding, ForwardContext, Linear
from mlxarch.blocks.linear import ExpertLinear, Matrix
from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.loading.resolve import Resolved

CHUNK_BYTES = 8 << 20  # bytes of a float32 matrix read at once

InputObserver = Callable[[str, mx.array, mx.array | None], None]
"""Callback before each matrix product: parameter path, input, ids of the selected experts.

The input is (..., in), and the ids are None. For expert matrices the input is (..., 1, in), the ids
(...). Projections that share an input receive the same array object in consecutive calls.
"""


def _ignore(path: str, x: mx.array, expert_ids: mx.array | None) -> None:
    pass


class LayerwiseModel:
    """Model that reads weights on demand, computes in float32 and keeps no weights.

    ``embed`` returns the hidden states, ``run_layer`` maps hidden states to hidden states and
    ``run_head`` maps them to logits; each is a list with one array per batch. A layer is a function
    of its hidden states and of the entries that earlier layers left in ``contexts[...].shared``. It
    may be called repeatedly, and inside ``loaded_parameters`` it can be differentiated:
    ``mx.vjp(lambda x: model.layers[i](x, context, None), …)``.

    Args:
        batches: token ids (B, L), all in range. Every batch reads the weights once; the activations
            of one batch are in memory at a time.
        observe: callback before each matrix product, see InputObserver.
        tensors: tensors by parameter path, in place of those of ``resolved``.
    """

    def __init__(
        self,
        resolved: Resolved,
        batches: Sequence[mx.array],
        observe: InputObserver = _ignore,
        tensors: Mapping[str, LazyTensor] | None = None,
    ) -> None:
        self.model: CausalLM = resolved.architecture.build()
        self.batches = list(batches)
        self.observe = observe
        self.contexts = [ForwardContext(tokens.shape[1]) for tokens in batches]
        self._tensors = resolved.parameters if tensors is None else tensors
        self._logits = True
        self._lazy_paths = set(map(self._read_lazily, self._matrices()))
        layers = {id(layer): number for number, layer in enumerate(self.model.layers)}
        names = {path: layers[id(m)] for path, m in self.model.named_modules() if id(m) in layers}
        self._layer_indices = {path: _layer_index(path, names) for path in self._tensors}

    def parameter_paths(self, index: int | None) -> list[str]:
        """Return the parameter paths of a layer, or for None of everything outside the layers."""
        return [path for path, layer in self._layer_indices.items() if layer == index]

    def embed(self) -> list[mx.array]:
        """Return the hidden states (B, L, hidden_size) before the first layer, per batch."""
        with self.loaded_parameters(None):
            return self._run_batches(self.model.embed, self.batches)

    def run_layer(self, index: int, states: Sequence[mx.array]) -> list[mx.array]:
        """Return the hidden states after layer ``index``, given those before it."""
        layer = self.model.layers[index]
        with self.loaded_parameters(index):
            return self._run_batches(lambda state, context: layer(state, context, None), states)

    def run_head(self, states: Sequence[mx.array], logits: bool = True) -> list[mx.array]:
        """Return the logits (B, L, V), one array per batch.

        Args:
            states: hidden states after the last layer.
            logits: False skips the product with the output matrix and returns an empty list; the
                observer is called all the same.
        """
        self._logits = logits
        with self.loaded_parameters(None):
            outputs = self._run_batches(
                lambda state, context: self.model.head(state), states, logits
            )
        return outputs if logits else []

    @contextmanager
    def loaded_parameters(self, index: int | None) -> Iterator[None]:
        """Hold the small parameters of a layer (norms, biases, routers) in float32 in a block.

        Matrices are not loaded: they are read row by row during their products. None selects the
        parameters outside the layers.
        """
        modules = dict(self.model.named_modules())
        replaced = []
        for path in self.parameter_paths(index):
            if path not in self._lazy_paths:
                owner, _, leaf = path.rpartition(".")
                replaced.append((modules[owner], leaf, modules[owner][leaf]))
                array = self._tensors[path].load()
                indices = leaf in getattr(modules[owner], "integers", {})
                modules[owner][leaf] = array if indices else array.astype(mx.float32)
        try:
            yield
        finally:
            for module, leaf, placeholder in replaced:
                module[leaf] = placeholder  # zeros that are never evaluated

    def _run_batches(
        self,
        run: Callable[[mx.array, ForwardContext], mx.array],
        inputs: Sequence[mx.array],
        evaluate: bool = True,
    ) -> list[mx.array]:
        outputs = []
        for x, context in zip(inputs, self.contexts, strict=True):
            outputs.append(run(x, context))
            if evaluate:
                shared = [v for v in context.shared.values() if isinstance(v, mx.array)]
                mx.eval(outputs[-1], *shared)
        return outputs

    def _matrices(self) -> Iterator[tuple[str, Matrix]]:
        modules: list[tuple[str, nn.Module]] = self.model.named_modules()
        return (
            (f"{path}.weight", module) for path, module in modules if isinstance(module, Matrix)
        )

    def _read_lazily(self, named: tuple[str, Matrix]) -> str:
        """Make a matrix read its rows from the checkpoint during products; return its path.

        Returns "" for a matrix that is loaded together with its layer instead.
        """
        path, matrix = named
        tensor = self._tensors[path]

        def matmul(x: mx.array, arrays: object = None, transpose: bool = True) -> mx.array:
            self.observe(path, x, None)
            if not self._logits and tensor.shape[0] == self.model.vocab_size:
                return mx.zeros((*x.shape[:-1], tensor.shape[0]))
            return LazyMatmul(tensor)(x)

        def gather_matmul(x: mx.array, chosen: mx.array, sorted: bool, arrays: object) -> mx.array:
            self.observe(path, x, chosen)
            return LazyMatmul(tensor, np.asarray(chosen).ravel())(x)

        original_matmul = matrix.matmul

        def observed_matmul(
            x: mx.array, arrays: dict | None = None, transpose: bool = True
        ) -> mx.array:
            if transpose:
                self.observe(path, x, None)
            return original_matmul(x, arrays, transpose)

        match matrix:
            case ExpertLinear():
                matrix.gather_matmul = gather_matmul
            case Embedding():
                matrix.matmul = matmul
                matrix.lookup = lambda tokens: _lookup(tensor, tokens)
            case Linear():
                matrix.matmul = matmul
            case Matrix() if matrix.quantizable:
                matrix.matmul = observed_matmul
                return ""
            case _:
                return ""
        return path


def ignore_float_errors() -> np.errstate:
    """Return a context manager and decorator that silences NumPy's floating-point warnings.

    Weights that are NaN or infinite are reported by name when they are written, so warnings before
    that are noise.
    """
    return np.errstate(all="ignore")


class LazyMatmul:
    """Product x @ weight.T with a matrix that is read a few rows at a time; differentiable in x.

    Args:
        tensor: weight (out, in), or (E, out, in) for the matrices of E experts.
        experts: (N,) expert id of each row of x; None for a single matrix.
    """

    def __init__(self, tensor: LazyTensor, experts: np.ndarray | None = None) -> None:
        self.tensor = tensor
        self.experts = experts

    def __call__(self, x: mx.array) -> mx.array:
        """Return the product: (..., in) -> (..., out). With experts, x has N rows in all."""
        function = mx.custom_function(self._forward)
        function.vjp(lambda x, cotangent, _: self._backward(cotangent))
        return cast(mx.array, function(x))

    def _forward(self, x: mx.array) -> mx.array:
        return self._multiply(x, self.tensor.shape[-2], transpose=True)

    def _backward(self, cotangent: mx.array) -> mx.array:
        return self._multiply(cotangent, self.tensor.shape[-1], transpose=False)

    def _multiply(self, x: mx.array, width: int, transpose: bool) -> mx.array:
        """Multiply x with a weight matrix whose rows are read from the disk in chunks.

        Args:
            x: (…, in), or (…, out) without ``transpose``.
            width: columns of the result.
            transpose: compute x @ weight.T, of which each chunk gives some columns; otherwise
                x @ weight, of which each chunk gives a summand.
        """
        on_cpu = mx.default_device() == mx.cpu
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        left = np.asarray(flat) if on_cpu else flat
        out = np.zeros((len(flat), width), np.float32) if on_cpu else mx.zeros((len(flat), width))
        out_features = self.tensor.shape[-2]
        for start, stop in self._row_ranges():
            rows = self.tensor.read_rows(start, stop).astype(mx.float32)
            weight = np.asarray(rows) if on_cpu else rows
            first = start % out_features
            columns = slice(first, first + stop - start)
            selected = self._rows_of_expert(start // out_features)
            if isinstance(selected, np.ndarray) and not on_cpu:
                selected = mx.array(selected)
            if transpose:
                out[selected, columns] = left[selected] @ weight.T
            else:
                out[selected] += left[selected][:, columns] @ weight
        return mx.array(out).reshape(*x.shape[:-1], width)

    def _rows_of_expert(self, expert: int) -> slice | np.ndarray:
        if self.experts is None:
            return slice(None)
        return np.flatnonzero(self.experts == expert)

    def _row_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows to read at once, each in one matrix; unused experts are skipped."""
        out_features, in_features = self.tensor.shape[-2:]
        step = max(CHUNK_BYTES // (4 * in_features), 1)
        for index in [0] if self.experts is None else np.unique(self.experts).tolist():
            end = (index + 1) * out_features
            for start in range(index * out_features, end, step):
                yield start, min(start + step, end)


def _lookup(tensor: LazyTensor, tokens: mx.array) -> mx.array:
    ids, inverse = np.unique(np.asarray(tokens), return_inverse=True)
    rows = mx.concatenate([tensor.read_rows(token, token + 1) for token in ids.tolist()])
    return rows.astype(mx.float32)[mx.array(inverse.reshape(tokens.shape))]


def _layer_index(path: str, layers: dict[str, int]) -> int | None:
    return next((number for name, number in layers.items() if path.startswith(f"{name}.")), None)
