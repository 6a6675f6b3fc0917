"""Matrices whose products a decoder layer adds to the residual stream, such as ``o_proj``."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlxarch.blocks import Linear
from mlxarch.blocks.layer import residual_outputs, token_mixer


@dataclass(frozen=True)
class ResidualProjection:
    """A matrix whose product a layer adds to the residual stream.

    Attributes:
        path: parameter path of the matrix.
        norm: path of the norm that is applied to the product before the addition, or None.
        is_feed_forward: whether it belongs to the feed-forward block, and not to the attention.
    """

    path: str
    norm: str | None = None
    is_feed_forward: bool = False


def residual_projections(layer: Any, name: str) -> list[ResidualProjection]:
    """Return the matrices of a layer whose products are added to the residual stream.

    At most one of the attention and one of the feed-forward block. Routed experts are left out,
    because their outputs are weighted for each token; so is what is added in other ways.

    Args:
        layer: decoder layer.
        name: module path of the layer.
    """
    projections = []
    for output in residual_outputs(layer):
        module = layer[output.module]
        path = _output_matrix(module, f"{name}.{output.module}")
        norm = f"{name}.{output.norm}" if output.norm else None
        if path is not None:
            is_feed_forward = module is not token_mixer(layer)
            projections.append(ResidualProjection(f"{path}.weight", norm, is_feed_forward))
    return projections


def _output_matrix(module: Any, path: str) -> str | None:
    """Return the path of the linear layer that computes a submodule's output, or None.

    In a mixture of experts that is the shared expert's, unless its output is weighted for each
    token.
    """
    for shared in ("shared_experts", "shared_expert"):
        if shared in module:
            weighted = getattr(module, "weighted_shared_expert", False)
            return None if weighted else _output_linear(module[shared], f"{path}.{shared}")
    return _output_linear(module, path)


def _output_linear(module: nn.Module, path: str) -> str | None:
    for name in ("o_proj", "out_proj", "down_proj", "c_proj"):
        if name in module and isinstance(module[name], Linear):
            return f"{path}.{name}"
    return None
