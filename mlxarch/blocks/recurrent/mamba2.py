"""Mamba-2: a selective state space with a scalar decay for every head."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.config import DecoderConfig, Size
from mlxarch.blocks.linear import Linear
from mlxarch.blocks.recurrent.causal_convolution import CausalConvolution
from mlxarch.blocks.recurrent.state_layer import StateLayer
from mlxarch.blocks.recurrent.state_space import state_space
from mlxarch.errors import ConfigError
from mlxarch.kv_cache import Cache

GatedNorm = Literal["gate first", "norm first", "gate only"]


@dataclass(frozen=True, kw_only=True)
class Mamba2Sizes:
    """Sizes and options of a Mamba-2 layer.

    Attributes:
        heads: H.
        head_size: features of a head.
        groups: groups of heads that share the input and output vectors.
        state_size: length of these vectors.
        kernel: number of inputs that the convolution sees.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections have biases.
        norm: order of the gate and the norm of the outputs.
        norm_groups: parts of the outputs that are normalised separately.
        time_steps: smallest and largest time step.
    """

    heads: int
    head_size: int
    groups: int
    state_size: int
    kernel: int
    conv_bias: bool = True
    bias: bool = False
    norm: GatedNorm = "gate first"
    norm_groups: int = 1
    time_steps: tuple[float, float] = (0.0, math.inf)

    @property
    def width(self) -> int:
        """Features of all heads."""
        return self.heads * self.head_size


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(DecoderConfig):
    """Config keys of Mamba-2 layers.

    Attributes:
        mamba_d_ssm: features of all heads; ``mamba_expand`` times the hidden size if neither it nor
            ``mamba_d_head`` is given.
    """

    mamba_n_heads: Size = 1
    mamba_d_head: Size | Literal["auto"] = "auto"
    mamba_d_ssm: Size | None = None
    mamba_expand: Size = 2
    mamba_n_groups: Size = 1
    mamba_d_state: Size = 128
    mamba_d_conv: Size = 4
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    time_step_limit: tuple[Any, Any] = (0.0, math.inf)

    @property
    def mamba_width(self) -> int:
        """Features of all heads of a layer."""
        if self.mamba_d_ssm is None and self.mamba_d_head != "auto":
            return self.mamba_n_heads * self.mamba_d_head
        return self.mamba_d_ssm or self.mamba_expand * self.hidden_size

    @property
    def mamba(self) -> Mamba2Sizes:
        """Sizes of the layers; infinity is written in several ways."""
        low, high = (v if isinstance(v, int | float) else math.inf for v in self.time_step_limit)
        return Mamba2Sizes(
            heads=self.mamba_n_heads,
            head_size=self.mamba_width // self.mamba_n_heads,
            groups=self.mamba_n_groups,
            state_size=self.mamba_d_state,
            kernel=self.mamba_d_conv,
            conv_bias=self.mamba_conv_bias,
            bias=self.mamba_proj_bias,
            time_steps=(float(low), float(high)),
        )

    def check(self) -> None:
        super().check()
        if self.mamba_width % self.mamba_n_heads or self.mamba_n_heads % self.mamba_n_groups:
            raise ConfigError(
                f"config.json: the width of Mamba-2, {self.mamba_width}, must be a multiple of "
                f"mamba_n_heads = {self.mamba_n_heads}, and that of mamba_n_groups = "
                f"{self.mamba_n_groups}"
            )


class Mamba2(StateLayer):
    """Selective state space (arXiv:2405.21060), computed in float32.

    The input projection gives a gate, the inputs x with the vectors B and C of all groups, which
    pass a short causal convolution and SiLU, and the time step of each head.

    Args:
        dim: hidden size of the model.
        eps: of the norm of the outputs.

    Attributes:
        float32: parameters that stay in float32 whatever the type of the model.

    Shape:
        x: (B, L, dim) -> the same; state (B, G, H / G, N, P) in float32, tail (B, kernel - 1, C)
    """

    kind = "Mamba-2"
    float32 = ("A_log", "D", "dt_bias")

    def __init__(self, dim: int, sizes: Mamba2Sizes, eps: float) -> None:
        super().__init__()
        self.sizes = sizes
        vectors = 2 * sizes.groups * sizes.state_size
        self.in_proj = Linear(dim, 2 * sizes.width + vectors + sizes.heads, sizes.bias)
        self.conv1d = CausalConvolution(sizes.width + vectors, sizes.kernel, sizes.conv_bias)
        self.A_log = mx.zeros((sizes.heads,))
        self.D = mx.ones((sizes.heads,))
        self.dt_bias = mx.zeros((sizes.heads,))
        if sizes.norm != "gate only":
            self.norm = GroupedNorm(sizes.width, sizes.norm_groups, eps)
        self.out_proj = Linear(sizes.width, dim, sizes.bias)

    def scale_projection(self, projected: mx.array) -> mx.array:
        """Scale the output of the input projection; a subclass may."""
        return projected

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        s = self.sizes
        projected = self.scale_projection(self.in_proj(context.without_padding(x)))
        ends = [s.width, projected.shape[-1] - s.heads]
        gate, inputs, time_step = mx.split(projected, ends, axis=-1)
        inputs = context.without_padding(inputs)
        state, tail = self.load_state(cache) or (
            mx.zeros((x.shape[0], s.groups, s.heads // s.groups, s.state_size, s.head_size)),
            self.conv1d.empty_tail(inputs),
        )
        inputs, tail = self.conv1d(inputs, tail)
        # a bias of the convolution reaches padding too
        inputs = context.without_padding(nn.silu(inputs)).astype(mx.float32)
        time_step = nn.softplus(time_step.astype(mx.float32) + self["dt_bias"])
        time_step = mx.clip(time_step, *s.time_steps)  # (B, L, H)
        vectors = s.groups * s.state_size
        values, b, c = mx.split(inputs, [s.width, s.width + vectors], axis=-1)
        b, c = (mx.unflatten(t, -1, (s.groups, -1)).swapaxes(1, 2) for t in (b, c))
        values = mx.unflatten(values, -1, (s.heads, -1))  # (B, L, H, P)
        decay = self.by_group(-mx.exp(self["A_log"]) * time_step)
        out, state = state_space(c, b, self.by_group(values * time_step[..., None]), decay, state)
        self.keep(cache, x.shape[1], state, tail)
        out = mx.moveaxis(out.flatten(1, 2), 1, 2) + self["D"][:, None] * values  # (B, L, H, P)
        return self.out_proj(self.normalise(out.flatten(-2), gate).astype(x.dtype))

    def by_group(self, x: mx.array) -> mx.array:
        """Put heads in front, by group: (B, L, H, …) -> (B, G, H / G, L, …)."""
        return mx.unflatten(mx.moveaxis(x, 2, 1), 1, (self.sizes.groups, -1))

    def normalise(self, out: mx.array, gate: mx.array) -> mx.array:
        """Gate and normalise the outputs of all heads, (B, L, width)."""
        gate = nn.silu(gate.astype(mx.float32))
        match self.sizes.norm:
            case "gate first":
                return self.norm(out * gate)
            case "norm first":
                return self.norm(out) * gate
            case "gate only":
                return out * gate


class GroupedNorm(nn.Module):
    """RMS norm of equal parts of the last axis, in float32.

    Shape:
        x: (..., dims) -> the same
    """

    def __init__(self, dims: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((dims,))
        self.groups = groups
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        parts = mx.unflatten(x, -1, (self.groups, -1))
        y = mx.fast.rms_norm(parts, None, self.eps).flatten(-2)
        return y * self["weight"].astype(x.dtype)
