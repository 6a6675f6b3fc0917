"""Gated short convolution, the token mixer of LFM2."""

import mlx.core as mx

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.linear import Linear
from mlxarch.blocks.recurrent.causal_convolution import CausalConvolution
from mlxarch.blocks.recurrent.state_layer import StateLayer
from mlxarch.kv_cache import Cache


class ShortConvolution(StateLayer):
    """out(C * convolution(B * x)) for three projections B, C and x of the inputs.

    Source: LiquidAI/LFM2-1.2B; transformers' Lfm2ShortConv.

    Args:
        dim: hidden size of the model.
        kernel: number of inputs that an output depends on.
        bias: whether projections and convolution have biases.

    Shape:
        x: (B, L, dim) -> the same; state: the newest products B * x, (B, kernel - 1, dim)
    """

    kind = "short convolution"
    float32_states = 0

    def __init__(self, dim: int, kernel: int, bias: bool = False) -> None:
        super().__init__()
        self.in_proj = Linear(dim, 3 * dim, bias)
        self.conv = CausalConvolution(dim, kernel, bias)
        self.out_proj = Linear(dim, dim, bias)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        before, after, inputs = mx.split(self.in_proj(x), 3, axis=-1)
        inputs = context.without_padding(before * inputs)
        [tail] = self.load_state(cache) or (self.conv.empty_tail(inputs),)
        y, tail = self.conv(inputs, tail)
        self.keep(cache, x.shape[1], tail)
        return self.out_proj(after * y)
