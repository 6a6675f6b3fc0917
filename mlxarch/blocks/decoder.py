"""Causal language model: embeddings, decoder layers, final norm and output head."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.config import DecoderConfig
from mlxarch.blocks.layer import Layer, token_mixer
from mlxarch.blocks.linear import Embedding, Linear
from mlxarch.blocks.norms import RMSNorm
from mlxarch.errors import InvalidInput
from mlxarch.kv_cache import Cache
from mlxarch.quantization.scheme import Quantization


class Decoder(nn.Module):
    """Embeddings, layers and final norm: the parameters under ``model.`` in a checkpoint."""

    def __init__(self, embed_tokens: Embedding, layers: Sequence[Layer], norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = list(layers)
        self.norm = norm


class CausalLM(nn.Module):
    """Decoder with an output head.

    Generation, SSD streaming and the quantizer run a model in three steps: ``embed`` computes the
    hidden state, each of ``layers`` updates it, ``head`` computes logits from it.

    Args:
        embed_scale: factor of the embeddings, rounded to their type as in training.
        softcap: logits become softcap * tanh(logits / softcap) (arXiv:2408.00118).
        logit_scale: factor of the logits, before the soft cap.
    """

    def __init__(
        self,
        c: DecoderConfig,
        layers: Sequence[Layer],
        norm: nn.Module,
        *,
        embed_scale: float | None = None,
        softcap: float | None = None,
        logit_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.embed_scale = embed_scale
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.vocab_size = c.vocab_size
        self.context_length = c.context_length
        self.model = Decoder(Embedding(c.vocab_size, c.hidden_size), layers, norm)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.hidden_size, c.vocab_size)

    @property
    def layers(self) -> list[Layer]:
        """Layers in the order in which they run."""
        return self.model.layers

    @property
    def embedding_path(self) -> str:
        """Path of the embedding table that tied embeddings share with the head."""
        table = self.model.embed_tokens
        return next(f"{path}.weight" for path, module in self.named_modules() if module is table)

    def embed(self, tokens: mx.array, context: ForwardContext) -> mx.array:
        """Compute the first hidden state: token ids (B, L) -> (B, L, hidden_size)."""
        x = self.model.embed_tokens(tokens)
        return x if self.embed_scale is None else x * mx.array(self.embed_scale, x.dtype)

    def head(self, state: mx.array) -> mx.array:
        """Compute logits: last hidden state (B, L, hidden_size) -> (B, L, V)."""
        x = self.model.norm(state)
        logits = self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * mx.tanh(logits / self.softcap)

    def begin_pass(
        self, tokens: mx.array, caches: Sequence[Cache | None] | None = None
    ) -> ForwardContext:
        """Create the context of a pass of tokens (B, L) that follow those in the caches."""
        return ForwardContext(tokens.shape[1], caches)

    def hidden_state(
        self, tokens: mx.array, caches: Sequence[Cache | None] | None = None
    ) -> mx.array:
        """Compute the hidden state after the last layer: token ids (B, L) -> (B, L, hidden_size).

        The ids must be in range; they are not checked here.
        """
        context = self.begin_pass(tokens, caches)
        state = self.embed(tokens, context)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            state = layer(state, context, cache)
        return state

    def __call__(self, tokens: mx.array, caches: Sequence[Cache | None] | None = None) -> mx.array:
        """Compute logits: token ids (B, L) -> (B, L, V).

        With caches, the tokens follow those that are cached.

        Raises:
            InvalidInput: not a (B, L) array of integers, or an id outside of the vocabulary. MLX
                does not check indices and would read arbitrary memory.
        """
        if tokens.ndim != 2 or tokens.size == 0 or not mx.issubdtype(tokens.dtype, mx.integer):
            raise InvalidInput(
                f"tokens must be integers (B, L), not empty; found {tokens.dtype} {tokens.shape}"
            )
        ids = np.asarray(tokens)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            raise InvalidInput(
                f"token ids must lie in 0 … {self.vocab_size - 1}; found {outside[0]}"
            )
        return self.head(self.hidden_state(tokens, caches))

    def make_caches(
        self,
        capacity: int | None = None,
        padding: Sequence[int] | None = None,
        kv: Quantization | None = None,
    ) -> list[Cache | None]:
        """Create an empty cache per layer; None for a layer that has none of its own.

        Args:
            capacity: tokens to allocate for at once; None grows as needed.
            padding: tokens of padding on the left of each row of a batch.
            kv: quantization of keys and values; None stores them as they are.
        """
        mixers = [token_mixer(layer) for layer in self.layers]
        caches = [mixer.make_cache(capacity, kv) if mixer else None for mixer in mixers]
        if padding is not None and any(padding):
            for cache in caches:
                for part in (cache, *cache.parts) if cache is not None else ():
                    part.padding = mx.array(list(padding))
        return caches


def causal_lm(layer: Callable[[Any, int], Layer]) -> Callable[[Any], CausalLM]:
    """Make the ``build`` function of an architecture that has nothing special outside its layers.

    Args:
        layer: constructor of a layer from the config and the layer's index.
    """

    def build(c: DecoderConfig) -> CausalLM:
        layers = [layer(c, index) for index in range(c.num_hidden_layers)]
        return CausalLM(c, layers, RMSNorm(c.hidden_size, c.rms_norm_eps))

    return build
