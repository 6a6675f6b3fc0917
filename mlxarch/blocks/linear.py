"""Linear layers and embeddings, quantized or not; projections fused into one matmul."""

from itertools import accumulate
from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.norms import FusableHeadNorms
from mlxarch.cpu_kernels import native
from mlxarch.quantization.scheme import Quantization


class Matrix(nn.Module):
    """A weight (…, out, in); packed, with ``scales`` and ``biases``, if ``quantization`` is set.

    Attributes:
        quantizable: whether the quantizer may quantize it. A router is not quantized here, but it
            may be in a published checkpoint.
        quantization: None for a floating-point weight.
    """

    quantizable = True

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = mx.zeros(shape)
        self.quantization: Quantization | None = None

    @property
    def is_observed(self) -> bool:
        """Whether the quantizer observes the products, so that none may be left out."""
        return "matmul" in vars(self)

    @property
    def format(self) -> native.Format:
        """Format of the arrays, for the CPU kernels."""
        q = self.quantization
        return native.Format() if q is None else native.Format(q.mode, q.bits, q.group_size)

    def matmul(
        self, x: mx.array, arrays: dict[str, Any] | None = None, transpose: bool = True
    ) -> mx.array:
        """x @ weight.T without bias, or x @ weight without ``transpose``.

        Args:
            arrays: used in place of the matrix's own ``weight``, ``scales`` and ``biases``.
        """
        arrays = self if arrays is None else arrays
        if self.quantization is not None:
            return self.quantization.matmul(x, arrays, transpose)
        if not transpose:
            return x @ arrays["weight"]
        y = native.matmul(x, arrays, "dense")
        return x @ arrays["weight"].swapaxes(-1, -2) if y is None else y


class Linear(Matrix):
    """y = x W^T + b.

    Shape:
        x: (..., in) -> (..., out)
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(outputs, inputs)
        if bias:
            self.bias = mx.zeros((outputs,))

    def __call__(self, x: mx.array, arrays: dict[str, Any] | None = None) -> mx.array:
        y = self.matmul(x, arrays)
        arrays = self if arrays is None else arrays
        return y + arrays["bias"] if "bias" in arrays else y


class ExactLinear(Linear):
    """Linear layer that is not quantized here: few rows, whose errors weigh heavily."""

    quantizable = False


class Embedding(Matrix):
    """Embedding table with one row per token. Ids are not checked here: see ``CausalLM.__call__``.

    Attributes:
        dtype: type of dequantized rows; set by the loader.
        lookups: rows that are read for one token.

    Shape:
        tokens: (B, L) -> (B, L, dims); as_linear: (..., dims) -> (..., V)
    """

    def __init__(self, tokens: int, dims: int) -> None:
        super().__init__(tokens, dims)
        self.dtype = mx.float32
        self.lookups = 1

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lookup(tokens)

    def lookup(self, tokens: mx.array) -> mx.array:
        """Dequantized rows of the tokens."""
        names = ("weight", "scales", "biases")
        rows = {name: self[name][tokens] for name in names if name in self}
        return dequantize_rows(rows, self.quantization, self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Output head of a model with tied embeddings."""
        return self.matmul(x)


def dequantize_rows(
    rows: dict[str, mx.array], quantization: Quantization | None, dtype: mx.Dtype
) -> mx.array:
    """Dequantize rows of an embedding table to vectors (…, dims).

    The operations are the same for a table in memory and for rows read from the SSD.

    Args:
        rows: ``weight`` and, if quantized, ``scales`` and ``biases`` of the rows.
    """
    if quantization is None:
        return rows["weight"]
    return quantization.dequantize(rows["weight"], rows["scales"], rows.get("biases"), dtype)


class ExpertLinear(Matrix):
    """Linear layers of all experts, weight (E, out, in); each row of x goes to its chosen expert.

    Shape:
        x: (..., 1, in), chosen: (...) -> (..., 1, out); ``sorted``: whether the chosen experts are
        in ascending order
    """

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(experts, outputs, inputs)
        if bias:
            self.bias = mx.zeros((experts, outputs))

    def __call__(
        self,
        x: mx.array,
        chosen: mx.array,
        sorted: bool = False,
        arrays: dict[str, Any] | None = None,
    ) -> mx.array:
        arrays = self if arrays is None else arrays
        y = self.gather_matmul(x, chosen, sorted, arrays)
        return y + arrays["bias"][chosen][..., None, :] if "bias" in arrays else y

    def gather_matmul(
        self, x: mx.array, chosen: mx.array, sorted: bool, arrays: dict[str, Any]
    ) -> mx.array:
        """``matmul`` with the chosen expert of each row."""
        if self.quantization is None:
            y = native.expert_matmul(x, arrays, chosen, "dense")
            if y is not None:
                return y
            weight = arrays["weight"].swapaxes(-1, -2)
            return mx.gather_mm(x, weight, rhs_indices=chosen, sorted_indices=sorted)
        return self.quantization.gather_matmul(x, arrays, chosen, sorted)


class FusableProjections:
    """Projections of the same input (q/k/v, gate/up), run as one matmul after ``fuse``.

    Each output row is computed from the same numbers as before, so results do not change. The
    projections' own weights become views of the concatenated ones: nothing is stored twice, and
    they can still be read. Projections whose weights are replaced later run separately again.
    """

    def __init__(self, *projections: Linear | ExpertLinear) -> None:
        self.projections = projections
        self._fused_arrays: dict[str, mx.array] = {}
        self._views: list[mx.array] = []  # weights of the projections when they were fused
        self._ends: list[int] = []  # output rows where each projection ends

    @property
    def is_fused(self) -> bool:
        """Whether they run as one matmul: they are fused, and their weights were not replaced."""
        return bool(self._views) and all(
            map(is_, [projection["weight"] for projection in self.projections], self._views)
        )

    def fuse(self) -> None:
        """Concatenate the arrays if the projections allow it.

        They must be quantized alike, and all or none of them must have a bias.
        """
        if not self._can_fuse():
            return
        rows = [projection["weight"].shape[-2] for projection in self.projections]
        self._ends = list(accumulate(rows))
        names = sorted(self.projections[0].keys())
        axes = {name: -1 if name == "bias" else -2 for name in names}
        self._fused_arrays = {
            name: mx.concatenate([p[name] for p in self.projections], axis)
            for name, axis in axes.items()
        }
        mx.eval(self._fused_arrays)
        for name, fused in self._fused_arrays.items():
            views = mx.split(fused, self._ends[:-1], axes[name])
            for projection, view in zip(self.projections, views, strict=True):
                projection[name] = view
        self._views = [projection["weight"] for projection in self.projections]

    def _can_fuse(self) -> bool:
        first, *others = self.projections
        return (
            bool(others)
            and all(other.quantization == first.quantization for other in others)
            and all(set(other.keys()) == set(first.keys()) for other in others)
            # a weight without a shape is still to be loaded
            and all(projection["weight"].ndim > 1 for projection in self.projections)
            and len({projection["weight"].dtype for projection in self.projections}) == 1
        )

    def use_fused(self, arrays: dict[str, mx.array], ends: list[int]) -> None:
        """Run as one matmul over arrays that are concatenated already.

        The projections' own arrays are not read any more.

        Args:
            ends: output rows where each projection ends.
        """
        self._fused_arrays = arrays
        self._ends = ends
        self._views = [projection["weight"] for projection in self.projections]

    @property
    def fused_arrays(self) -> dict[str, mx.array] | None:
        """Arrays of all projections, one behind the other; None unless they run as one matmul."""
        return self._fused_arrays if self.is_fused else None

    def joined(self, x: mx.array, *chosen: Any) -> mx.array:
        """Outputs of all projections, one behind the other on the last axis; they must be fused."""
        return self.projections[0](x, *chosen, arrays=self._fused_arrays)

    def __call__(self, x: mx.array, *chosen: Any) -> list[mx.array]:
        if not self.is_fused:
            return [projection(x, *chosen) for projection in self.projections]
        return list(mx.split(self.joined(x, *chosen), self._ends[:-1], axis=-1))


def fuse(module: nn.Module) -> None:
    """Fuse all projections and norms of the same input below ``module``, after loading weights."""
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, FusableProjections | FusableHeadNorms):
                value.fuse()
