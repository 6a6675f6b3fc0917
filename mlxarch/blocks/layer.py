"""Interface between the decoder frame and an architecture's layers."""

from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.kv_cache import Cache
from mlxarch.quantization.scheme import Quantization


class SelfAttention(Protocol):
    """Attention of a layer, which owns the layer's KV cache."""

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache | None:
        """Create an empty KV cache for the layer; None if the layer reads another layer's.

        Args:
            capacity: tokens to allocate for at once; None grows as needed.
            kv: quantization of keys and values.
        """
        ...


class Layer(Protocol):
    """A decoder layer of any architecture.

    A layer may have a class attribute ``residual_outputs``, see the function of that name.
    """

    @property
    def self_attn(self) -> SelfAttention:
        """Attention of the layer, of any kind."""
        ...

    def __call__(self, x: mx.array, /, context: ForwardContext, cache: Cache | None) -> mx.array:
        """Compute the residual stream (B, L, hidden_size) after the layer from that before it."""
        ...


class ResidualOutput(NamedTuple):
    """Submodule whose output a layer adds to the residual stream.

    Attributes:
        module: name of the submodule, such as "self_attn" or "mlp".
        norm: name of the layer's norm between the submodule and the addition; None without one.
    """

    module: str
    norm: str | None = None


PRE_NORM = (ResidualOutput("self_attn"), ResidualOutput("mlp"))
POST_NORM = (
    ResidualOutput("self_attn", "post_attention_layernorm"),
    ResidualOutput("mlp", "post_feedforward_layernorm"),
)


def residual_outputs(layer: Any) -> tuple[ResidualOutput, ...]:
    """Submodules whose outputs ``layer`` adds to the residual stream, unchanged except for a norm.

    A layer that is not a pre-norm layer declares them in a class attribute of the same name. The
    quantizer uses them to compensate the error of earlier layers.
    """
    return getattr(layer, "residual_outputs", PRE_NORM)
