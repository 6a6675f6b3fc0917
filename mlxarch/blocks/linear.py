"""Matrices: full precision or quantized, alone or several that share an input run as one product."""

from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxarch.packing import Quantization


class Matrix(nn.Module):
    """A weight (…, out, in), packed where ``quantization`` is set; then ``scales`` and ``biases`` stand beside it."""

    quantizable = True  # whether a quantizer may pack it; a router may come packed and is never packed here

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = mx.zeros(shape)
        self.quantization: Quantization | None = None

    def product(self, x: mx.array, arrays: dict[str, Any] | None = None, transpose: bool = True) -> mx.array:
        """x @ weight.T without any bias, or x @ weight; ``arrays`` stands in for the matrix's own."""
        arrays = self if arrays is None else arrays
        if self.quantization is not None:
            return self.quantization.matmul(x, arrays, transpose)
        return x @ (arrays["weight"].swapaxes(-1, -2) if transpose else arrays["weight"])


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
        y, arrays = self.product(x, arrays), self if arrays is None else arrays
        return y + arrays["bias"] if "bias" in arrays else y


class Embedding(Matrix):
    """One row per token. The ids are not checked here: see ``CausalLM.__call__``.

    Shape:
        tokens: (B, L) -> (B, L, dims); as_linear: (..., dims) -> (..., V)
    """

    def __init__(self, tokens: int, dims: int) -> None:
        super().__init__(tokens, dims)
        self.dtype = mx.float32  # what a packed table unpacks to; the loader sets it

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lookup(tokens)

    def lookup(self, tokens: mx.array) -> mx.array:
        """The rows of the tokens, unpacked."""
        parts = {name: self[name][tokens] for name in ("weight", "scales", "biases") if name in self}
        return unpacked_rows(parts, self.quantization, self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a model whose embeddings are tied."""
        return self.product(x)


def unpacked_rows(parts: dict[str, mx.array], packed: Quantization | None, dtype: mx.Dtype) -> mx.array:
    """Rows of a table, in memory or read from the disk, as vectors (…, dims): the same operations either way."""
    if packed is None:
        return parts["weight"]
    return packed.dequantize(parts["weight"], parts["scales"], parts.get("biases"), dtype)


class ExpertLinear(Matrix):
    """The matrices of all experts: each row of x is multiplied by the one that is chosen for it.

    Shape:
        x: (..., 1, in), chosen: (...) -> (..., 1, out); ``sorted``: whether the chosen experts stand in order
    """

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(experts, outputs, inputs)
        if bias:
            self.bias = mx.zeros((experts, outputs))

    def __call__(
        self, x: mx.array, chosen: mx.array, sorted: bool = False, arrays: dict[str, Any] | None = None
    ) -> mx.array:
        arrays = self if arrays is None else arrays
        y = self.products(x, chosen, sorted, arrays)
        return y + arrays["bias"][chosen][..., None, :] if "bias" in arrays else y

    def products(self, x: mx.array, chosen: mx.array, sorted: bool, arrays: dict[str, Any]) -> mx.array:
        """``product`` by the chosen matrices."""
        if self.quantization is None:
            weight = arrays["weight"].swapaxes(-1, -2)
            return mx.gather_mm(x, weight, rhs_indices=chosen, sorted_indices=sorted)
        return self.quantization.gather_matmul(x, arrays, chosen, sorted)


class SharedInput:
    """Projections of one input (q/k/v, gate/up), run as one matrix product once ``fuse`` found that they can be.

    Every row of the product is computed from the same numbers as before, so the result is the same. After fusing,
    the projections' own weights are views into the joined ones: nothing is held twice, and they can still be read.
    A projection that got other arrays since runs alone again.
    """

    def __init__(self, *projections: Linear | ExpertLinear) -> None:
        self.projections = projections
        self._joined: dict[str, mx.array] = {}
        self._parts: list[mx.array] = []
        self._ends: list[int] = []

    @property
    def fused(self) -> bool:
        """Whether they run as one product: joined, and with the arrays that were joined."""
        return bool(self._parts) and all(map(is_, [p["weight"] for p in self.projections], self._parts))

    def fuse(self) -> None:
        """Join the arrays, if all projections are packed alike and all or none have a bias."""
        first = self.projections[0]
        names = set(first.keys())
        alike = all(p.quantization == first.quantization and set(p.keys()) == names for p in self.projections)
        alike = alike and all(p["weight"].ndim > 1 for p in self.projections)  # or their arrays are still to come
        if not alike or len({p["weight"].dtype for p in self.projections}) > 1:
            return
        sizes = [p["weight"].shape[-2] for p in self.projections]
        self._ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        axes = {name: -1 if name == "bias" else -2 for name in sorted(names)}
        self._joined = {name: mx.concatenate([p[name] for p in self.projections], axes[name]) for name in axes}
        mx.eval(self._joined)
        for name, joined in self._joined.items():
            for projection, part in zip(self.projections, mx.split(joined, self._ends[:-1], axes[name]), strict=True):
                projection[name] = part
        self._parts = [p["weight"] for p in self.projections]

    def adopt(self, joined: dict[str, mx.array], ends: list[int]) -> None:
        """Run as one product over arrays that were made joined; the projections' own are no longer looked at."""
        self._joined, self._ends, self._parts = joined, ends, [p["weight"] for p in self.projections]

    def __call__(self, x: mx.array, *chosen: Any) -> list[mx.array]:
        if not self.fused:
            return [projection(x, *chosen) for projection in self.projections]
        return list(mx.split(self.projections[0](x, *chosen, arrays=self._joined), self._ends[:-1], axis=-1))


def fuse(module: nn.Module) -> None:
    """Join every group of projections below ``module`` that share an input. Call it once, after the weights are in."""
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, SharedInput):
                value.fuse()
