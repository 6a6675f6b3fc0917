"""Depthwise causal convolution over tokens."""

import mlx.core as mx
import mlx.nn as nn


class CausalConvolution(nn.Module):
    """Depthwise convolution of each channel with its own newest ``kernel`` inputs.

    Args:
        channels: C.
        kernel: number of inputs that an output depends on, the token's own included.
        bias: whether each channel has a bias.
        dilation: distance between two of these inputs, in tokens.

    Shape:
        x: (B, L, C), tail: (B, T, C) -> outputs (B, L, C), new tail (B, T, C); the tail holds the
        T = (kernel - 1) · dilation inputs before x
    """

    def __init__(
        self, channels: int, kernel: int, bias: bool = False, *, dilation: int = 1
    ) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight = mx.zeros((channels, 1, kernel))
        if bias:
            self.bias = mx.zeros((channels,))

    def empty_tail(self, x: mx.array) -> mx.array:
        """Tail before the first token of inputs like x."""
        channels, _, kernel = self.weight.shape
        return mx.zeros((x.shape[0], (kernel - 1) * self.dilation, channels), x.dtype)

    def __call__(self, x: mx.array, tail: mx.array) -> tuple[mx.array, mx.array]:
        length = x.shape[1]
        inputs = mx.concatenate([tail.astype(x.dtype), x], axis=1)  # (B, T + L, C)
        weight = self["weight"]
        y = inputs[:, :length] * weight[:, 0, 0]
        for index in range(1, weight.shape[-1]):
            first = index * self.dilation
            y = y + inputs[:, first : first + length] * weight[:, 0, index]
        if "bias" in self:
            y = y + self["bias"]
        # gathered, which copies them: a view would keep all inputs in memory
        return y, mx.take(inputs, mx.arange(length, inputs.shape[1]), axis=1)
