"""Kimi Delta Attention (KDA): the gated delta rule with a decay for each feature of the keys."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.linear import ExactLinear, FusableProjections, Linear
from mlxarch.blocks.recurrent.causal_convolution import CausalConvolution
from mlxarch.blocks.recurrent.delta_rule import delta_rule
from mlxarch.blocks.recurrent.gated_delta_net import GatedHeadNorm, normalise_queries_keys
from mlxarch.blocks.recurrent.state_layer import StateLayer
from mlxarch.kv_cache import Cache


@dataclass(frozen=True, kw_only=True)
class KDASizes:
    """Sizes and options of a KDA layer.

    Attributes:
        heads: H.
        head_size: features of the queries, keys and values of a head, N.
        kernel: number of inputs that the convolutions see.
        lower_bound: smallest logarithm of a decay, reached by a sigmoid; None for a decay by
            softplus, which has none.
        low_rank: whether the projections of decay and gate are products of two narrow matrices.
    """

    heads: int
    head_size: int
    kernel: int
    lower_bound: float | None = None
    low_rank: bool = True


class KimiDeltaAttention(StateLayer):
    """Linear attention with the gated delta rule (arXiv:2510.26692), in float32.

    Queries, keys and values pass a short causal convolution each, and SiLU. Queries and keys are
    normalised to length 1. Each head's outputs are normalised and gated by a sigmoid.

    Args:
        dim: hidden size of the model.
        eps: of the norm of the outputs.

    Attributes:
        float32: parameters that stay in float32 whatever the type of the model.

    Shape:
        x: (B, L, dim) -> the same; state (B, H, N, N) in float32, and three tails (B, kernel - 1,
        H * N)
    """

    kind = "KDA"
    float32 = ("A_log", "dt_bias")

    def __init__(self, dim: int, sizes: KDASizes, eps: float) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.heads * sizes.head_size
        self.q_proj = Linear(dim, width)
        self.k_proj = Linear(dim, width)
        self.v_proj = Linear(dim, width)
        self.q_conv1d = CausalConvolution(width, sizes.kernel)
        self.k_conv1d = CausalConvolution(width, sizes.kernel)
        self.v_conv1d = CausalConvolution(width, sizes.kernel)
        if sizes.low_rank:
            self.f_a_proj = ExactLinear(dim, sizes.head_size)
            self.f_b_proj = ExactLinear(sizes.head_size, width)
            self.g_a_proj = ExactLinear(dim, sizes.head_size)
            self.g_b_proj = ExactLinear(sizes.head_size, width)
        else:
            self.f_proj = ExactLinear(dim, width)
            self.g_proj = Linear(dim, width)
        self.b_proj = ExactLinear(dim, sizes.heads)
        self.A_log = mx.zeros((sizes.heads,))
        self.dt_bias = mx.zeros((width,))
        self.o_norm = GatedHeadNorm(sizes.head_size, eps, mx.sigmoid)
        self.o_proj = Linear(width, dim)
        self.qkv = FusableProjections(self.q_proj, self.k_proj, self.v_proj)

    def project_decay_gate(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Decay before its bias, and the gate of the outputs: (B, L, dim) -> (B, L, H * N)."""
        if self.sizes.low_rank:
            return self.f_b_proj(self.f_a_proj(x)), self.g_b_proj(self.g_a_proj(x))
        return self.f_proj(x), self.g_proj(x)

    def log_decay(self, x: mx.array) -> mx.array:
        """Logarithm of the decay: projections (B, L, H * N) -> (B, L, H, N)."""
        x = self.split(x.astype(mx.float32) + self["dt_bias"])
        rate = mx.exp(self["A_log"])[:, None]  # (H, 1)
        bound = self.sizes.lower_bound
        return -rate * nn.softplus(x) if bound is None else bound * mx.sigmoid(rate * x)

    def split(self, x: mx.array) -> mx.array:
        """Split heads: (B, L, H * N) -> (B, L, H, N)."""
        return mx.unflatten(x, -1, (self.sizes.heads, -1))

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        s = self.sizes
        x = context.without_padding(x)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        inputs = self.qkv(x)
        state, *tails = self.load_state(cache) or (
            mx.zeros((x.shape[0], s.heads, s.head_size, s.head_size)),
            *(conv.empty_tail(x) for conv in convolutions),
        )
        pairs = [
            conv(each, tail) for conv, each, tail in zip(convolutions, inputs, tails, strict=True)
        ]
        q, k, v = (self.split(nn.silu(y).astype(mx.float32)).swapaxes(1, 2) for y, _ in pairs)
        q, k = normalise_queries_keys(q, k)
        decay, gate = self.project_decay_gate(x)
        g = self.log_decay(decay).swapaxes(1, 2)  # (B, H, L, N)
        beta = mx.sigmoid(self.b_proj(x).astype(mx.float32)).swapaxes(1, 2)
        out, state = delta_rule(q, k, v, g, beta, state)
        self.keep(cache, x.shape[1], state, *(tail for _, tail in pairs))
        out = self.o_norm(out.swapaxes(1, 2), self.split(gate))
        return self.o_proj(out.flatten(-2).astype(x.dtype))
