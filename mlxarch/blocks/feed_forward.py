"""Feed-forward networks: gated, down(activation(gate(x)) * up(x)) (arXiv:2002.05202), and plain."""

import math
from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.linear import FusableProjections, Linear
from mlxarch.cpu_kernels import native

GatedActivation = Callable[[mx.array, mx.array], mx.array]
"""Elementwise function of the gate and up projections, such as SwiGLU."""

Elementwise = TypeVar("Elementwise", bound=Callable[..., mx.array])


def compile_elementwise(function: Elementwise) -> Elementwise:
    """Compile elementwise operations into one kernel, on GPUs only.

    On a CPU MLX would call a C++ compiler while the model runs, and few laptops have one.
    """
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def run(*arrays: mx.array) -> mx.array:
        return (function if mx.default_device() == mx.cpu else compiled)(*arrays)

    return cast(Elementwise, run)


@compile_elementwise
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    y = native.gated(gate, up, "silu")
    return gate * mx.sigmoid(gate) * up if y is None else y


def clamped_swiglu(limit: float) -> GatedActivation:
    """SwiGLU of a gate of at most ``limit`` and an up projection within ``limit`` of 0."""

    @compile_elementwise
    def clamped(gate: mx.array, up: mx.array) -> mx.array:
        gate = mx.minimum(gate, limit)
        return gate * mx.sigmoid(gate) * mx.clip(up, -limit, limit)

    return clamped


@compile_elementwise
def gelu(x: mx.array) -> mx.array:
    """GELU in its tanh approximation (arXiv:1606.08415); ``gelu_new``, ``gelu_pytorch_tanh``."""
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@compile_elementwise
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up."""
    y = native.gated(gate, up, "gelu")
    return gelu(gate) * up if y is None else y


@compile_elementwise
def relu2(x: mx.array) -> mx.array:
    """Square of the positive part (arXiv:2109.08668)."""
    return mx.square(mx.maximum(x, 0))


KERNEL_NAMES: dict[Callable[..., mx.array], str] = {swiglu: "silu", geglu: "gelu"}
"""Gated activations that the CPU kernels have."""


class MLP(nn.Module):
    """Feed-forward without gate: down(activation(up(x))).

    Args:
        dim: hidden size of the model.
        hidden: width of the feed-forward.
        activation: elementwise function of the up projection.
        bias: whether the projections have biases.

    Shape:
        x: (..., dim) -> the same
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Callable[[mx.array], mx.array],
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.up_proj = Linear(dim, hidden, bias)
        self.down_proj = Linear(hidden, dim, bias)
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.activation(self.up_proj(x)))


class GatedMLP(nn.Module):
    """Gated feed-forward: a gate and an up projection, and a down projection of their product.

    Args:
        dim: hidden size of the model.
        hidden: width of the feed-forward.
        activation: elementwise function of both projections.
        bias: whether the projections have biases.

    Shape:
        x: (..., dim) -> the same
    """

    def __init__(
        self, dim: int, hidden: int, activation: GatedActivation, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, hidden, bias)
        self.up_proj = Linear(dim, hidden, bias)
        self.down_proj = Linear(hidden, dim, bias)
        self.activation = activation
        self.gate_up = FusableProjections(self.gate_proj, self.up_proj)

    def __call__(self, x: mx.array) -> mx.array:
        y = self._in_one_operation(x)
        if y is not None:
            return y
        gate, up = self.gate_up(x)
        return self.down_proj(self.activation(gate, up))

    def _in_one_operation(self, x: mx.array) -> mx.array | None:
        """Compute with a CPU kernel, if there is one for this network and few rows."""
        name = KERNEL_NAMES.get(self.activation)
        if name is None or not native.is_used():
            return None
        down = self.down_proj
        arrays = self.gate_up.fused_arrays
        if arrays is None or "bias" in arrays or "bias" in down or down.is_observed:
            return None
        return native.feed_forward(x, arrays, self.gate_proj.format, down, down.format, name)
