"""GPT-2 (OpenAI, 2019).

    x ─┬─ norm ─ attention ─ + ─┬─ norm ─ GELU ─ + ─
       └──────────────────────┘  └──────────────┘

Stands out: learned position embeddings, so that the context ends where their table does; LayerNorm;
biases everywhere; one matrix for queries, keys and values; a feed-forward without a gate; tied
embeddings.
Source: openai-community/gpt2/config.json and transformers' GPT2Config; Radford et al. 2019.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Cache,
    CausalLM,
    DecoderConfig,
    Embedding,
    ForwardContext,
    Full,
    LayerNorm,
    Linear,
    Positive,
    ResidualOutput,
    by_row,
    gelu,
)
from mlxarch.blocks.attention.attention import attend
from mlxarch.blocks.weight_mapping import Ignore, Rename, Transpose
from mlxarch.errors import ConfigError, ContextLengthError

NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "rms_norm_eps",
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """Config with GPT-2's own names of common keys (``NAMES``).

    A null ``n_inner`` means 4 times ``n_embd``.
    """

    activation_function: Literal["gelu_new"] = "gelu_new"
    add_cross_attention: Literal[False] = False
    reorder_and_upcast_attn: Literal[False] = False
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    scale_attn_weights: Literal[True] = True
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        missing = sorted(NAMES.keys() - config.keys() - {"n_inner", "layer_norm_epsilon"})
        if missing:
            raise ConfigError(f"config.json of a 'gpt2' model lacks {', '.join(missing)}")
        found = {NAMES.get(key, key): value for key, value in config.items()}
        if found.get("intermediate_size") is None:
            width = found["hidden_size"]
            found["intermediate_size"] = 4 * width if isinstance(width, int) else width
        return super().from_dict(found)


class Attention(nn.Module):
    """Multi-head attention without position embedding: the positions are in its input."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c_attn = Linear(c.hidden_size, 3 * c.hidden_size, True)
        self.c_proj = Linear(c.hidden_size, c.hidden_size, True)
        self.head_size = c.head_size
        self.span = Full()
        self.rope = None
        self.make_cache = self.span.make_cache

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        qkv = mx.unflatten(self.c_attn(x), -1, (3, -1, self.head_size))  # (B, L, 3, H, D)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (B, H, L, D)
        mask = context.mask(self.span, cache)
        if cache is not None:
            k, v = cache.append(k, v)
        out = by_row(partial(attend, scale=self.head_size**-0.5), q, k, v, mask)
        return self.c_proj(out.swapaxes(1, 2).flatten(-2))


class MLP(nn.Module):
    """Feed-forward without a gate: up projection, GELU, down projection."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = Linear(dim, hidden, True)
        self.c_proj = Linear(hidden, dim, True)

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(gelu(self.c_fc(x)))


class DecoderLayer(nn.Module):
    """Decoder layer with norms before attention and before the feed-forward."""

    residual_outputs = (ResidualOutput("attn"), ResidualOutput("mlp"))

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(c.hidden_size, c.rms_norm_eps)
        self.ln_2 = LayerNorm(c.hidden_size, c.rms_norm_eps)
        self.attn = Attention(c)
        self.mlp = MLP(c.hidden_size, c.intermediate_size)

    def __call__(self, x: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        x = x + self.attn(self.ln_1(x), context, cache)
        return x + self.mlp(self.ln_2(x))

    self_attn = property(lambda self: self.attn)  # its name in other architectures


class Transformer(nn.Module):
    """Decoder with the parameter names of the checkpoint."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.wte = Embedding(c.vocab_size, c.hidden_size)
        self.wpe = Embedding(c.max_position_embeddings, c.hidden_size)
        self.h = [DecoderLayer(c) for _ in range(c.num_hidden_layers)]
        self.ln_f = LayerNorm(c.hidden_size, c.rms_norm_eps)

    embed_tokens = property(lambda self: self.wte)
    layers = property(lambda self: self.h)
    norm = property(lambda self: self.ln_f)


class GPT2(CausalLM):
    """Model that adds a learned position embedding to each token."""

    def __init__(self, c: Config) -> None:
        decoder = Transformer(c)
        super().__init__(c, decoder.layers, decoder.norm)
        self.model = decoder

    def embed(self, tokens: mx.array, context: ForwardContext) -> mx.array:
        """Compute the first hidden state: token ids (B, L) -> (B, L, hidden_size).

        Raises:
            ContextLengthError: there are more tokens than positions.
        """
        offset = context.offset
        end = context.length + (offset if isinstance(offset, int) else int(offset.max()))
        if end > self.context_length:
            raise ContextLengthError(
                f"{end} tokens, and the model knows {self.context_length} positions; shorten the "
                "prompt, or ask for fewer tokens"
            )
        positions = mx.maximum(context.positions, 0)  # those of padding are negative
        return super().embed(tokens, context) + self.model.wpe(positions)


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    return GPT2(c)


# Names under ``model.`` were written by MLX's own tools, with matrices (out, in) already
WEIGHTS = (
    Ignore(r"(^|\.)h\.\d+\.attn\.(masked_)?bias$", "causal mask"),
    Rename(r"^transformer\.", ""),
    Transpose(r"^h\.\d+\.(attn|mlp)\.c_\w+\.weight$"),
    Rename(r"^(?=h\.|wte\.|wpe\.|ln_f\.)", "model."),
)
