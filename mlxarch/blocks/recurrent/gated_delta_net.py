"""Gated DeltaNet: linear attention whose state is corrected by the gated delta rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.config import DecoderConfig, Size
from mlxarch.blocks.linear import ExactLinear, FusableProjections, Linear
from mlxarch.blocks.recurrent.causal_convolution import CausalConvolution
from mlxarch.blocks.recurrent.delta_rule import delta_rule
from mlxarch.blocks.recurrent.state_layer import StateLayer
from mlxarch.errors import ConfigError
from mlxarch.kv_cache import Cache

L2_EPS = 1e-6  # added to the squared length of queries and keys


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(DecoderConfig):
    """Config keys of gated DeltaNet layers."""

    linear_num_key_heads: Size
    linear_num_value_heads: Size
    linear_key_head_dim: Size
    linear_value_head_dim: Size
    linear_conv_kernel_dim: Size
    layer_types: tuple[Literal["linear_attention", "full_attention"], ...] | None = None
    full_attention_interval: Size = 4

    def is_linear(self, index: int) -> bool:
        """Whether the layer at ``index`` is a gated DeltaNet; the others have full attention."""
        if self.layer_types is None:
            return (index + 1) % self.full_attention_interval != 0
        return self.layer_types[index] == "linear_attention"

    @property
    def key_width(self) -> int:
        """Features of the queries, and of the keys, of all heads."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_width(self) -> int:
        """Features of the values of all heads."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    def check(self) -> None:
        super().check()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"config.json: layer_types has {len(self.layer_types)} values, and "
                f"num_hidden_layers is {self.num_hidden_layers}; there must be one for each layer"
            )
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ConfigError(
                f"config.json: linear_num_value_heads = {self.linear_num_value_heads} must be a "
                f"multiple of linear_num_key_heads = {self.linear_num_key_heads}"
            )


class Projections(NamedTuple):
    """Projections of the inputs of a gated DeltaNet layer.

    Attributes:
        qkv: queries, keys and values of all heads, one after the other (B, L, C).
        gate: gate of the outputs (B, L, values).
        write: logit of the write strength of each value head (B, L, H).
        decay: decay of each value head, before its bias (B, L, H).
    """

    qkv: mx.array
    gate: mx.array
    write: mx.array
    decay: mx.array


class GatedDeltaNet(StateLayer):
    """Linear attention with the gated delta rule (arXiv:2412.06464), in float32.

    Queries, keys and values pass a short causal convolution and SiLU. Queries and keys are
    normalised to length 1. Each head's outputs are normalised and gated.

    Args:
        gate: function of the gate's projection.

    Attributes:
        float32: parameters that stay in float32 whatever the type of the model.

    Shape:
        x: (B, L, hidden_size) -> the same; state (B, H, N, V) in float32, tail (B, kernel - 1, C)
    """

    kind = "gated DeltaNet"
    float32 = ("A_log", "dt_bias")

    def __init__(
        self, c: GatedDeltaNetConfig, gate: Callable[[mx.array], mx.array] = nn.silu
    ) -> None:
        super().__init__()
        heads = c.linear_num_value_heads
        self.c = c
        self.conv1d = CausalConvolution(2 * c.key_width + c.value_width, c.linear_conv_kernel_dim)
        self.A_log = mx.zeros((heads,))
        self.dt_bias = mx.zeros((heads,))
        self.norm = GatedHeadNorm(c.linear_value_head_dim, c.rms_norm_eps, gate)
        self.out_proj = Linear(c.value_width, c.hidden_size)
        self.make_projections()

    def make_projections(self) -> None:
        """Create the parameters of ``project``; a subclass may store others."""
        c = self.c
        self.in_proj_qkv = Linear(c.hidden_size, 2 * c.key_width + c.value_width)
        self.in_proj_z = Linear(c.hidden_size, c.value_width)
        self.in_proj_b = ExactLinear(c.hidden_size, c.linear_num_value_heads)
        self.in_proj_a = ExactLinear(c.hidden_size, c.linear_num_value_heads)
        self.qkv_gate = FusableProjections(self.in_proj_qkv, self.in_proj_z)
        self.write_decay = FusableProjections(self.in_proj_b, self.in_proj_a)

    def project(self, x: mx.array) -> Projections:
        """Project the inputs (B, L, hidden_size)."""
        return Projections(*self.qkv_gate(x), *self.write_decay(x))

    def __call__(
        self,
        x: mx.array,
        context: ForwardContext,
        cache: Cache | None,
        others: tuple[mx.array, ...] = (),
    ) -> mx.array:
        # others: new states of other parts of the layer, which are stored behind this one's
        c = self.c
        projected = self.project(context.without_padding(x))
        state, tail, *_ = self.load_state(cache) or (
            mx.zeros((x.shape[0], self.A_log.size, c.linear_key_head_dim, c.linear_value_head_dim)),
            self.conv1d.empty_tail(projected.qkv),
        )
        qkv, tail = self.conv1d(projected.qkv, tail)
        q, k, v = self.split_heads(nn.silu(qkv).astype(mx.float32))
        step_size = nn.softplus(projected.decay.astype(mx.float32) + self["dt_bias"])
        g = -mx.exp(self["A_log"]) * step_size  # (B, L, H)
        beta = mx.sigmoid(projected.write.astype(mx.float32))
        out, state = delta_rule(q, k, v, g.swapaxes(1, 2), beta.swapaxes(1, 2), state)
        self.keep(cache, x.shape[1], state, tail, *others)
        gate = mx.unflatten(projected.gate, -1, (-1, c.linear_value_head_dim))  # (B, L, H, V)
        out = self.norm(out.swapaxes(1, 2), gate)
        return self.out_proj(out.flatten(-2).astype(x.dtype))

    def split_heads(self, qkv: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Split (B, L, C) into q, k (B, H, L, N), of length N^-0.5 and 1, and v (B, H, L, V)."""
        c = self.c
        q, k, v = mx.split(qkv, [c.key_width, 2 * c.key_width], axis=-1)
        q, k = (mx.unflatten(t, -1, (-1, c.linear_key_head_dim)).swapaxes(1, 2) for t in (q, k))
        v = mx.unflatten(v, -1, (-1, c.linear_value_head_dim)).swapaxes(1, 2)
        q, k = normalise_queries_keys(q, k)
        repeats = c.linear_num_value_heads // c.linear_num_key_heads
        return mx.repeat(q, repeats, axis=1), mx.repeat(k, repeats, axis=1), v


def normalise_queries_keys(q: mx.array, k: mx.array) -> tuple[mx.array, mx.array]:
    """Give queries the length N^-0.5 and keys the length 1: (…, N) -> the same."""
    # x / sqrt(sum x^2 + eps) as an RMS norm: the sum is N times the mean
    size = q.shape[-1]
    q, k = (mx.fast.rms_norm(t, None, L2_EPS / size) for t in (q, k))
    return q / size, k * size**-0.5


class GatedHeadNorm(nn.Module):
    """x / rms(x) * weight * silu(gate) over the features of a head, in float32.

    Args:
        gate: another function of the gate.

    Shape:
        x, gate: (..., dims) -> the same
    """

    def __init__(
        self, dims: int, eps: float, gate: Callable[[mx.array], mx.array] = nn.silu
    ) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps
        self.gate = gate

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        y = mx.fast.rms_norm(x, self["weight"].astype(x.dtype), self.eps)
        return y * self.gate(gate.astype(mx.float32))
