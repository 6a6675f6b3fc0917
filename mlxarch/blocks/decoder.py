"""The frame that nearly every architecture shares: embed, run the layers, normalise, unembed."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks.config import DecoderConfig
from mlxarch.blocks.layer import Layer
from mlxarch.blocks.linear import Embedding, Linear
from mlxarch.blocks.norms import RMSNorm
from mlxarch.blocks.step import Step
from mlxarch.cache import Cache
from mlxarch.errors import InvalidInput
from mlxarch.packing import Quantization


class Decoder(nn.Module):
    """The part of a checkpoint under ``model.``: embeddings, layers and the last norm."""

    def __init__(self, embed_tokens: Embedding, layers: Sequence[Layer], norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens, self.layers, self.norm = embed_tokens, list(layers), norm


class CausalLM(nn.Module):
    """Decoder with a head on top.

    Whoever walks a model (generation, streaming, a quantizer) uses three steps: ``embed`` makes the state, each of
    ``layers`` takes and returns it, ``head`` makes logits of it.

    Args:
        embed_scale: multiplies the embeddings, rounded to their type as in the training.
        softcap: logits become softcap * tanh(logits / softcap) (arXiv:2408.00118).
    """

    def __init__(
        self,
        c: DecoderConfig,
        layers: Sequence[Layer],
        norm: nn.Module,
        *,
        embed_scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.embed_scale, self.softcap = embed_scale, softcap
        self.vocab_size, self.context_length = c.vocab_size, c.max_position_embeddings
        self.chunk, self.streaming = cast(int | None, None), cast(Any, None)  # see Execution: the loader sets them
        self.model = Decoder(Embedding(c.vocab_size, c.hidden_size), layers, norm)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size)

    @property
    def layers(self) -> list[Layer]:
        """In the order in which they run."""
        return self.model.layers

    def embed(self, tokens: mx.array, step: Step) -> mx.array:
        """Token ids (B, L) -> state (B, L, hidden_size)."""
        x = self.model.embed_tokens(tokens)
        return x if self.embed_scale is None else x * mx.array(self.embed_scale, x.dtype)

    def head(self, state: mx.array) -> mx.array:
        """State (B, L, hidden_size) -> logits (B, L, V)."""
        x = self.model.norm(state)
        logits = self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)
        return logits if self.softcap is None else self.softcap * mx.tanh(logits / self.softcap)

    def states(self, tokens: mx.array, caches: Sequence[Cache | None] | None = None) -> mx.array:
        """Token ids (B, L) -> the state behind the last layer. The ids must be in range: nothing checks them here."""
        step = Step(tokens.shape[1], caches)
        state = self.embed(tokens, step)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            state = layer(state, step, cache)
        return state

    def __call__(self, tokens: mx.array, caches: Sequence[Cache | None] | None = None) -> mx.array:
        """Token ids (B, L) -> logits (B, L, V). With caches, the tokens follow those that the caches hold.

        Raises:
            InvalidInput: not a (B, L) array of integers, or an id outside of the vocabulary. MLX itself does not
                check an index, it would read whatever lies there.
        """
        if tokens.ndim != 2 or tokens.size == 0 or not mx.issubdtype(tokens.dtype, mx.integer):
            raise InvalidInput(f"tokens must be integers (B, L), not empty; found {tokens.dtype} {tokens.shape}")
        ids = np.asarray(tokens)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise InvalidInput(f"token ids must lie in 0 … {self.vocab_size - 1}; found {outside[0]}")
        return self.head(self.states(tokens, caches))

    def make_caches(
        self, capacity: int | None = None, padding: Sequence[int] | None = None, kv: Quantization | None = None
    ) -> list[Cache | None]:
        """One empty cache for each layer; None for a layer that takes its keys and values from another.

        Args:
            capacity: tokens to allocate for at once; None grows by need.
            padding: of a batch, how many tokens of padding stand on the left of each row.
            kv: how keys and values are packed; None keeps them as they come.
        """
        caches = [layer.self_attn.make_cache(capacity, kv) for layer in self.layers]
        if padding is not None and any(padding):
            for cache in caches:
                if cache is not None:
                    cache.padding = mx.array(list(padding))
        return caches


def causal_lm(layer: Callable[[Any, int], Layer]) -> Callable[[Any], CausalLM]:
    """The ``build`` of an architecture without a frame of its own: ``layer(c, index)`` makes each of its layers."""

    def build(c: DecoderConfig) -> CausalLM:
        layers = [layer(c, index) for index in range(c.num_hidden_layers)]
        return CausalLM(c, layers, RMSNorm(c.hidden_size, c.rms_norm_eps))

    return build
