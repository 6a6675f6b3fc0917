"""Experts and cache of a layer, read off a network without weights."""

from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Chunked, ExpertLinear, Router, Sliding
from mlxarch.blocks.attention.span import Latent
from mlxarch.kv_cache import CompressedCache, ParallelCache, StateCache
from mlxarch.planner.footprint import LayerCache, LayerExperts


def layer_experts(layer: nn.Module) -> LayerExperts | None:
    """Experts of a layer without weights; None for a dense layer."""
    stacks = [m for m in layer.modules() if isinstance(getattr(m, "down_proj", None), ExpertLinear)]
    router = next((m for m in layer.modules() if isinstance(m, Router)), None)
    if not stacks or router is None:
        return None
    count, hidden_size, intermediate_size = cast(Any, stacks[0]).down_proj.weight.shape
    per_token = cast(Any, router).k
    # input and output; gate, up, and their product
    activation_size = per_token * (2 * hidden_size + 3 * intermediate_size)
    return LayerExperts(count, per_token, activation_size)


def layer_cache(mixer: Any, cache: Any) -> LayerCache | None:
    """KV cache or state of a layer after one token; None for a layer without its own.

    Args:
        mixer: attention or recurrent part of the layer, see ``token_mixer``.
        cache: its cache, unevaluated.
    """
    if cache is None:
        return None
    if isinstance(cache, ParallelCache):
        state, own = (layer_cache(mixer, part) for part in cache.parts)
        return None if state is None or own is None else replace(own, state=state.state)
    if isinstance(cache, CompressedCache):
        return LayerCache("compressed", (), compressed=cache.sizes)
    if isinstance(cache, StateCache):
        sizes = [array.size for array in cache.state]
        count = mixer.float32_states
        return LayerCache("state", (), state=(sum(sizes[:count]), sum(sizes[count:])))
    span = getattr(mixer, "span", None)
    # integers are records of tokens, four bytes each
    vectors = tuple(
        (array.shape[1], array.shape[-1]) for array in cache.arrays() if array.dtype != mx.int32
    )
    match span:
        case Sliding(window):
            return LayerCache("sliding", vectors, window)
        case Chunked(size):
            return LayerCache("chunked", vectors, size)
        case Latent():
            return LayerCache("latent", vectors)
    return LayerCache("full", vectors)
