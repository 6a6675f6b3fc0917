"""Gated feed-forward: down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

import math
from collections.abc import Callable
from functools import wraps

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.linear import Linear, SharedInput

Gate = Callable[[mx.array, mx.array], mx.array]


def one_kernel(function: Gate) -> Gate:
    """Run elementwise operations as one kernel on a GPU.

    Not on a CPU: MLX would call a C++ compiler there while the model runs, and few laptops have one.
    """
    compiled = mx.compile(function, shapeless=True)

    @wraps(function)
    def run(gate: mx.array, up: mx.array) -> mx.array:
        return (function if mx.default_device() == mx.cpu else compiled)(gate, up)

    return run


@one_kernel
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate * mx.sigmoid(gate) * up


@one_kernel
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, with the tanh approximation of gelu (arXiv:1606.08415)."""
    return 0.5 * gate * (1 + mx.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


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
