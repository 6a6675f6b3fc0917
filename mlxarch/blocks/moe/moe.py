"""Mixture of experts: the weighted sum of the experts that a router chooses for each token."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.linear import ExpertLinear, FusableProjections
from mlxarch.blocks.moe.routers import Router, top_k_indices

MIN_ROWS_TO_SORT = 64  # from here on, sorting rows by expert pays off
MIN_ROWS_PER_EXPERT = 4  # from here on, MLX has kernels for sorted rows and quantized matrices


class TopK(Router):
    """Router that chooses the k largest logits and computes the weights from these alone.

    Args:
        weight_function: logits (B, L, k) of the chosen experts -> their weights.
        bias: whether the router has a bias.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int,
        *,
        weight_function: Callable[[mx.array], mx.array],
        bias: bool = False,
    ) -> None:
        super().__init__(dim, experts, bias)
        self.k = k
        self.weight_function = weight_function

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        logits = self.logits(x)
        chosen = top_k_indices(logits, self.k)
        return chosen, self.weight_function(mx.take_along_axis(logits, chosen, axis=-1))


def uses_sorted_kernel(rows: int, experts: int, quantized: bool) -> bool:
    """Whether to tell MLX that rows are sorted by expert; only where it has a kernel for that."""
    return rows >= MIN_ROWS_TO_SORT and (not quantized or rows // experts >= MIN_ROWS_PER_EXPERT)


class Experts(nn.Module):
    """Feed-forwards of all experts of a layer, in stacked matrices.

    Args:
        dim: hidden size of the model.
        hidden: width of one expert.
        experts: E.
        activation: elementwise function of the gate and up projections, or of the latter alone.
        bias: whether the projections have biases.
        gated: whether there are gate projections.

    Shape:
        x: (B, L, dim), chosen: (B, L, k) -> (B, L, k, dim)
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        activation: Callable[..., mx.array],
        bias: bool = False,
        gated: bool = True,
    ) -> None:
        super().__init__()
        if gated:
            self.gate_proj = ExpertLinear(experts, dim, hidden, bias)
        self.up_proj = ExpertLinear(experts, dim, hidden, bias)
        self.down_proj = ExpertLinear(experts, hidden, dim, bias)
        self.activation = activation
        inputs = (self.gate_proj, self.up_proj) if gated else (self.up_proj,)
        self.gate_up = FusableProjections(*inputs)

    @property
    def is_quantized(self) -> bool:
        """Whether the matrices are quantized."""
        return self.down_proj.quantization is not None

    def forward_rows(self, x: mx.array, chosen: mx.array, sorted: bool) -> mx.array:
        """Pass each row through one expert: x (N, 1, dim), chosen (N,) -> (N, 1, dim).

        Args:
            sorted: whether ``chosen`` is in ascending order.
        """
        hidden = self.activation(*self.gate_up(x, chosen, sorted))
        return self.down_proj(hidden, chosen, sorted)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        k = chosen.shape[-1]
        flat = chosen.flatten()  # (B * L * k)
        rows = x.reshape(-1, 1, x.shape[-1])  # (B * L, 1, dim)
        if flat.size < MIN_ROWS_TO_SORT:
            y = self.forward_rows(mx.repeat(rows, k, axis=0), flat, sorted=False)
            return y.reshape(*chosen.shape, -1)
        order = mx.argsort(flat)
        experts = self.down_proj["weight"].shape[0]
        sorted_kernel = uses_sorted_kernel(flat.size, experts, self.is_quantized)
        y = self.forward_rows(rows[order // k], flat[order], sorted_kernel)
        return y[mx.argsort(order)].reshape(*chosen.shape, -1)


class MoE(nn.Module):
    """Weighted sum of the chosen experts' outputs, plus a shared expert for every token.

    Shape:
        x: (B, L, dim) -> the same

    Attributes:
        weighted_shared_expert: whether each token scales the shared expert's output.
    """

    weighted_shared_expert = False

    def __init__(
        self, gate: Router, switch_mlp: Experts, shared_experts: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.gate = gate
        self.switch_mlp = switch_mlp
        if shared_experts is not None:
            self.shared_experts = shared_experts

    def __call__(self, x: mx.array) -> mx.array:
        return self.combine(x, *self.gate(x))

    def combine(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """Weighted sum of the chosen experts (B, L, k), plus the shared expert."""
        y = (self.switch_mlp(x, chosen) * weights[..., None].astype(x.dtype)).sum(-2)
        return y + self.shared_experts(x) if "shared_experts" in self else y
