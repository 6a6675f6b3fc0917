"""Mixture of experts: a router picks experts for each token, their outputs are summed by weight."""

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.feedforward import Gate
from mlxarch.blocks.linear import ExpertLinear, Matrix, SharedInput

SORT_FROM = 64  # rows; from here on it pays to bring those of one expert together


class Router(Matrix):
    """Rates the experts for every token, in float32 whatever the model computes in. A subclass chooses among them.

    Shape:
        x: (B, L, dim) -> experts (B, L, k), their weights (B, L, k) in float32; logits: (B, L, dim) -> (B, L, E)
    """

    quantizable = False

    def __init__(self, dim: int, experts: int, bias: bool = False) -> None:
        super().__init__(experts, dim)
        if bias:
            self.bias = mx.zeros((experts,))

    def logits(self, x: mx.array) -> mx.array:
        x = x.astype(mx.float32)
        y = x @ self["weight"].astype(mx.float32).T if self.quantization is None else self.product(x)
        return y + self["bias"].astype(mx.float32) if "bias" in self else y


def top(scores: mx.array, k: int) -> mx.array:
    """Indices of the k largest on the last axis, in no order."""
    return mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k]


class SoftmaxTopK(Router):
    """Softmax over all experts, then the k largest (arXiv:2101.03961, with k > 1).

    Args:
        renormalise: the weights of the k sum to one.
        scale: multiplies them.
    """

    def __init__(self, dim: int, experts: int, k: int, *, renormalise: bool, scale: float = 1.0) -> None:
        super().__init__(dim, experts)
        self.k, self.renormalise, self.scale = k, renormalise, scale

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        chances = mx.softmax(self.logits(x), axis=-1)
        chosen = top(chances, self.k)
        weights = mx.take_along_axis(chances, chosen, axis=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return chosen, weights * self.scale if self.scale != 1 else weights


class Experts(nn.Module):
    """The gated feed-forwards of all experts, stacked.

    Shape:
        x: (B, L, dim), chosen: (B, L, k) -> (B, L, k, dim)
    """

    def __init__(self, dim: int, hidden: int, experts: int, gate: Gate, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = ExpertLinear(experts, dim, hidden, bias)
        self.up_proj = ExpertLinear(experts, dim, hidden, bias)
        self.down_proj = ExpertLinear(experts, hidden, dim, bias)
        self.gate, self.gate_up = gate, SharedInput(self.gate_proj, self.up_proj)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        k, flat = chosen.shape[-1], chosen.flatten()  # (B * L * k)
        rows = x.reshape(-1, 1, x.shape[-1])  # (B * L, 1, dim)
        sort = flat.size >= SORT_FROM
        order = mx.argsort(flat) if sort else mx.arange(flat.size)
        flat, rows = flat[order] if sort else flat, rows[order // k]
        y = self.down_proj(self.gate(*self.gate_up(rows, flat, sort)), flat, sort)
        y = y[mx.argsort(order)] if sort else y
        return y.reshape(*chosen.shape, -1)


class MoE(nn.Module):
    """Sum of the chosen experts' outputs, each times its weight, plus a shared expert that sees every token.

    Shape:
        x: (B, L, dim) -> the same
    """

    def __init__(self, gate: Router, switch_mlp: Experts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.switch_mlp = gate, switch_mlp
        if shared_experts is not None:
            self.shared_experts = shared_experts

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = self.gate(x)
        y = (self.switch_mlp(x, chosen) * weights[..., None].astype(x.dtype)).sum(-2)
        return y + self.shared_experts(x) if "shared_experts" in self else y
