"""What the frame expects of an architecture's layers, and how most architectures put them into it."""

from typing import Protocol

import mlx.core as mx

from mlxarch.blocks.step import Step
from mlxarch.cache import Cache
from mlxarch.packing import Quantization


class SelfAttention(Protocol):
    """What keeps keys and values."""

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache | None:
        """An empty cache for the layer, packed as ``kv`` says."""
        ...


class Layer(Protocol):
    """What every architecture's DecoderLayer offers the frame."""

    @property
    def self_attn(self) -> SelfAttention:
        """Its attention, of whatever kind."""
        ...

    def __call__(self, x: mx.array, /, step: Step, cache: Cache | None) -> mx.array:
        """The residual stream (B, L, hidden_size), one layer further."""
        ...
