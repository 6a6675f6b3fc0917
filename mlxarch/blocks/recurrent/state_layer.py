"""Base of layers with a state."""

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.kv_cache import Cache, StateCache
from mlxarch.quantization.scheme import Quantization


class StateLayer(nn.Module):
    """Layer that mixes tokens through a state of fixed size; a subclass computes it.

    Attributes:
        kind: name of the layer in descriptions of a model.
        float32_states: how many arrays of the state, in front, are always in float32; the others
            have the type of the model.
    """

    kind = ""
    float32_states = 1

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache:
        """Create an empty state; its size depends neither on ``capacity`` nor on ``kv``."""
        return StateCache()

    def load_state(self, cache: Cache | None) -> tuple[mx.array, ...]:
        """Arrays of the state; empty before the first token, and without a cache."""
        return () if cache is None else cast(StateCache, cache).state

    def keep(self, cache: Cache | None, length: int, *state: mx.array) -> None:
        """Store the state after ``length`` more tokens; nothing is done without a cache."""
        if cache is not None:
            cast(StateCache, cache).update(length, *state)
