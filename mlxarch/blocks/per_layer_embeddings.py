"""Per-layer embeddings: an embedding of the token for every layer, which may stay on slow storage."""

import mlx.core as mx

from mlxarch.blocks.attention.forward_context import ForwardContext
from mlxarch.blocks.decoder import CausalLM
from mlxarch.blocks.linear import Embedding, Linear
from mlxarch.blocks.norms import RMSNorm

SQRT_HALF = 2**-0.5  # factor of a sum of two terms


class PerLayerEmbeddingLM(CausalLM):
    """Causal language model whose layers also see an embedding of the token made for them.

    It is the sum of a row of a table and a projection of the token's first hidden state. ``embed``
    puts the embeddings of all layers into ``context.shared["embeddings"]``.
    """

    @property
    def token_tables(self) -> tuple[str, ...]:
        """Tables that are only looked up by token, so that they may stay on the SSD."""
        name = "embed_tokens_per_layer"
        return (f"model.{name}",) if name in self.model else ()

    def add_per_layer_embeddings(self, vocab_size: int, features: int, eps: float) -> None:
        """Create the parameters.

        Args:
            vocab_size: rows of the table; tokens beyond (images, audio) take row 0.
            features: size of an embedding for one layer.
        """
        hidden_size = self.model.embed_tokens.weight.shape[-1]
        count = len(self.layers) * features
        self.per_layer_vocab = vocab_size
        self.model.embed_tokens_per_layer = Embedding(vocab_size, count)
        self.model.per_layer_model_projection = Linear(hidden_size, count)
        self.model.per_layer_projection_norm = RMSNorm(features, eps)

    def embed(self, tokens: mx.array, context: ForwardContext) -> mx.array:
        x = super().embed(tokens, context)
        if self.token_tables:
            self.embed_for_layers(tokens, x, context)
        return x

    def embed_for_layers(self, tokens: mx.array, x: mx.array, context: ForwardContext) -> None:
        """Compute the embeddings of all layers (B, L, layers, features) into ``context.shared``.

        Args:
            x: first hidden state of the tokens (B, L, hidden_size).
        """
        model = self.model
        layers = len(self.layers)
        known = mx.where(tokens < self.per_layer_vocab, tokens, 0)
        rows = mx.unflatten(model["embed_tokens_per_layer"](known), -1, (layers, -1))
        rows = rows * mx.array(rows.shape[-1] ** 0.5, rows.dtype)
        projected = model["per_layer_model_projection"](x) * mx.array(x.shape[-1] ** -0.5, x.dtype)
        projected = model["per_layer_projection_norm"](mx.unflatten(projected, -1, (layers, -1)))
        context.shared["embeddings"] = (projected + rows) * SQRT_HALF
