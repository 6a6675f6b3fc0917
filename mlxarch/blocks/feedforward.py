"""Gated feed-forward: down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.linear import Linear, SharedInput

Gate = Callable[[mx.array, mx.array], mx.array]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return nn.silu(gate) * up


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, with the tanh approximation of gelu."""
    return nn.gelu_approx(gate) * up


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
