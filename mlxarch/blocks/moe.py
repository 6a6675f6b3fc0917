"""Mixture of experts: a router picks experts for each token, their outputs are summed by weight."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.feedforward import Gate
from mlxarch.blocks.linear import ExpertLinear, SharedInput
from mlxarch.blocks.routers import Router, top

SORT_FROM = 64  # rows; from here on it pays to bring those of one expert together
TILES_FROM = 4  # rows for each packed matrix; from here on MLX has kernels for rows in order


class TopK(Router):
    """The k largest logits; ``weigh`` makes their weights of them alone: (B, L, k) -> the same."""

    def __init__(
        self, dim: int, experts: int, k: int, *, weigh: Callable[[mx.array], mx.array], bias: bool = False
    ) -> None:
        super().__init__(dim, experts, bias)
        self.k, self.weigh = k, weigh

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        logits = self.logits(x)
        chosen = top(logits, self.k)
        return chosen, self.weigh(mx.take_along_axis(logits, chosen, axis=-1))


def in_order(rows: int, experts: int, packed: bool) -> bool:
    """Whether MLX is told that rows stand in the order of their experts: where it would make use of it."""
    return rows >= SORT_FROM and (not packed or rows // experts >= TILES_FROM)


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
        # set where the matrices hold some of the experts only: computes in place of __call__
        self.streamed: Callable[[mx.array, mx.array], mx.array] | None = None

    @property
    def packed(self) -> bool:
        """Whether a matrix is."""
        return self.down_proj.quantization is not None

    def rows(self, x: mx.array, places: mx.array, sorted: bool) -> mx.array:
        """Each row of x through the expert at its place in the stacks: (N, 1, dim), (N,) -> (N, 1, dim)."""
        return self.down_proj(self.gate(*self.gate_up(x, places, sorted)), places, sorted)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        if self.streamed is not None:
            return self.streamed(x, chosen)
        k, flat = chosen.shape[-1], chosen.flatten()  # (B * L * k)
        rows = x.reshape(-1, 1, x.shape[-1])  # (B * L, 1, dim)
        sort = flat.size >= SORT_FROM
        order = mx.argsort(flat) if sort else mx.arange(flat.size)
        flat, rows = flat[order] if sort else flat, rows[order // k]
        y = self.rows(rows, flat, in_order(flat.size, self.down_proj["weight"].shape[0], self.packed))
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
