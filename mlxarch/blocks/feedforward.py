"""Gated feed-forward: down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

import math
from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.linear import Linear, SharedInput

Gate = Callable[[mx.array, mx.array], mx.array]
Elementwise = TypeVar("Elementwise", bound=Callable[..., mx.array])


def one_kernel(function: Elementwise) -> Elementwise:
    """Run elementwise operations as one kernel on a GPU.

    Not on a CPU: MLX would call a C++ compiler there while the model runs, and few laptops have one.
    """
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def run(*arrays: mx.array) -> mx.array:
        return (function if mx.default_device() == mx.cpu else compiled)(*arrays)

    return cast(Elementwise, run)


@one_kernel
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


@one_kernel
def gelu(x: mx.array) -> mx.array:
    """The tanh approximation of gelu (arXiv:1606.08415), in configs ``gelu_new`` or ``gelu_pytorch_tanh``."""
    return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@one_kernel
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up."""
    return gelu(gate) * up


class GatedMLP(nn.Module):
    """Two projections up, one gating the other, one down.

    Shape:
        x: (..., dim) -> the same
    """

    def __init__(self, dim: int, hidden: int, gate: Gate, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(dim, hidden, bias), Linear(dim, hidden, bias)
        self.down_proj = Linear(hidden, dim, bias)
        self.gate, self.gate_up = gate, SharedInput(self.gate_proj, self.up_proj)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.gate(*self.gate_up(x)))
