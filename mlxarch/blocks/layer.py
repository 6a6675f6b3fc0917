"""Interface between the decoder frame and an architecture's layers."""

from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.kv_cache import Cache
from mlxarch.quantization.scheme import Quantization


class TokenMixer(Protocol):
    """Part of a layer in which tokens see earlier ones: attention, a recurrence, a convolution."""

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache | None:
        """Create an empty cache for the layer; None if the layer reads another layer's.

        Args:
            capacity: tokens to allocate for at once; None grows as needed.
            kv: quantization of keys and values.
        """
        ...


class Layer(Protocol):
    """A decoder layer of any architecture.

    At most one of its submodules is a ``TokenMixer``. A layer may have a class attribute
    ``residual_outputs``, see the function of that name.
    """

    def __call__(self, x: mx.array, /, context: ForwardContext, cache: Cache | None) -> mx.array:
        """Compute the residual stream (B, L, hidden_size) after the layer from that before it."""
        ...

    def parameters(self) -> dict[str, Any]:
        """Arrays by name, nested as the submodules are (``nn.Module.parameters``)."""
        ...


def mixer_name(layer: Any) -> str | None:
    """Name of the submodule of ``layer`` that is a ``TokenMixer``; None without one."""
    return next((name for name, child in layer.items() if hasattr(child, "make_cache")), None)


def token_mixer(layer: Any) -> Any:
    """Submodule of ``layer`` that is a ``TokenMixer``; None without one."""
    name = mixer_name(layer)
    return None if name is None else getattr(layer, name)


class ResidualOutput(NamedTuple):
    """Submodule whose output a layer adds to the residual stream.

    Attributes:
        module: name of the submodule, such as "self_attn" or "mlp".
        norm: name of the layer's norm between the submodule and the addition; None without one.
    """

    module: str
    norm: str | None = None


PRE_NORM = tuple(map(ResidualOutput, ("self_attn", "linear_attn", "mlp")))
POST_NORM = (
    ResidualOutput("self_attn", "post_attention_layernorm"),
    ResidualOutput("mlp", "post_feedforward_layernorm"),
)


def residual_outputs(layer: Any) -> tuple[ResidualOutput, ...]:
    """Submodules whose outputs ``layer`` adds to the residual stream, unchanged except for a norm.

    A layer that is not a pre-norm layer declares them in a class attribute of the same name; names
    of submodules that a layer does not have are left out. The
    quantizer uses them to compensate the error of earlier layers.
    """
    outputs = getattr(layer, "residual_outputs", PRE_NORM)
    return tuple(output for output in outputs if output.module in layer)
