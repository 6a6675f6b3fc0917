"""Gemma 3n (Google, 2025), text decoder.

    4x ─ predict ─┬─ norm ─┬─ attention ─ norm ─ + ─┐
                  │        └─ Laurel ─────────── + ─┴─┬─ norm ─ GeGLU ─ norm ─ + ─ y
                  └──────────────────────────────┘    └────────────────────────┘
    y ─ correct ─┬───────────── + ─ 4x
                 └─ per-layer ──┘

Stands out: four residual streams, of which each layer computes one and predicts the others (AltUp);
a low-rank branch beside attention (Laurel); an embedding of the token for every layer, which may
stay on slow storage; the last layers reuse keys and values of earlier ones; the first layers keep a
twentieth of their feed-forward activations; scores are not scaled.
Source: google/gemma-3n-E4B-it/config.json; arXiv:2301.13310 (AltUp), arXiv:2411.07501 (Laurel);
transformers' Gemma3nTextModel for every constant; arXiv:2506.06644 for the sparsity (statistical
top-k).
"""

from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import (
    Cache,
    CausalLM,
    ForwardContext,
    GatedMLP,
    Linear,
    RMSNorm,
    RoPE,
)
from mlxarch.blocks.attention.layer_types import LocalRoPEConfig
from mlxarch.blocks.attention.shared_kv_attention import SharedKVAttention
from mlxarch.blocks.config import Positive, Size
from mlxarch.blocks.feed_forward import geglu
from mlxarch.blocks.per_layer_embeddings import SQRT_HALF, PerLayerEmbeddingLM
from mlxarch.blocks.weight_mapping import IgnoreFrom
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config(LocalRoPEConfig):
    """Config with the defaults of transformers' Gemma3nTextConfig.

    The published files contain ``query_pre_attn_scalar``, which nothing reads: scores are not
    scaled. ``altup_coef_clip`` matters in training only.
    """

    intermediate_size: Size | tuple[Size, ...]  # pyright: ignore[reportIncompatibleVariableOverride]
    attention_bias: bool = False
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    query_pre_attn_scalar: float | None = None
    final_logit_softcapping: Positive | None = 30.0
    rope_theta: Positive | None = 1_000_000.0
    rope_local_base_freq: Positive = 10_000.0
    sliding_window_pattern: Size = 5
    tie_word_embeddings: bool = True
    activation_sparsity_pattern: tuple[float, ...]
    altup_active_idx: Literal[0] = 0
    altup_correct_scale: bool = True
    altup_num_inputs: Size
    hidden_size_per_layer_input: Size
    laurel_rank: Size
    num_kv_shared_layers: int
    vocab_size_per_layer_input: Size

    sliceable = True  # MatFormer: smaller feed-forwards are nested in the larger ones

    @property
    def first_sharing_layer(self) -> int:
        """Index of the first layer that reuses the keys and values of an earlier layer."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def check(self) -> None:
        super().check()
        self.check_length("intermediate_size", self.intermediate_size)
        self.check_length("activation_sparsity_pattern", self.activation_sparsity_pattern)
        if not all(0 <= share < 1 for share in self.activation_sparsity_pattern):
            raise ConfigError(
                "config.json: each value of activation_sparsity_pattern must be at least 0 and "
                "below 1"
            )
        types = [self.layer_type(index) for index in range(self.num_hidden_layers)]
        first = self.first_sharing_layer
        if not 0 < first <= len(types) or set(types[first:]) - set(types[:first]):
            raise ConfigError(
                f"config.json: num_kv_shared_layers = {self.num_kv_shared_layers} of {len(types)} "
                "layers leaves some without an earlier layer of their kind to take keys and values "
                "from"
            )


def match_rms(x: mx.array, other: mx.array) -> mx.array:
    """Scale x so that the root mean square of its last axis equals that of ``other``."""
    own, wanted = (t.astype(mx.float32).square().mean(-1, keepdims=True) for t in (x, other))
    return (x * mx.sqrt(wanted / mx.maximum(own, 1e-5))).astype(x.dtype)


class Coefficients(Linear):
    """Small linear layer of AltUp that must not be quantized: its outputs are multiplied often."""

    quantizable = False


class AltUp(nn.Module):
    """Alternating updates (AltUp): the layer computes one of S streams, linear maps the others.

    Shape:
        streams: (B, L, S, hidden_size) -> the same
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        count = self.count = c.altup_num_inputs
        self.router_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.modality_router = Coefficients(c.hidden_size, count)
        self.prediction_coefs = Coefficients(count, count**2)
        self.correction_coefs = Coefficients(count, count)
        self.correct_output_scale = mx.zeros((c.hidden_size,))

    def modalities(self, x: mx.array) -> mx.array:
        """Router output in (-1, 1) for each stream: (B, L, hidden_size) -> (B, L, S)."""
        return mx.tanh(self.modality_router(self.router_norm(x) * x.shape[-1] ** -1.0))

    def predict(self, streams: mx.array) -> mx.array:
        """Predict the streams after the layer from those before it."""
        mixture = self.prediction_coefs(self.modalities(streams[..., 0, :]))  # (B, L, S * S)
        return streams + mx.unflatten(mixture, -1, (self.count, self.count)) @ streams

    def correct(self, predicted: mx.array, x: mx.array) -> mx.array:
        """Correct all predicted streams by the error of the first, which the layer computed as x.

        Args:
            x: (B, L, hidden_size).
        """
        shares = self.correction_coefs(self.modalities(x)) + 1  # (B, L, S)
        return predicted + shares[..., None] * (x - predicted[..., 0, :])[..., None, :]


class Laurel(nn.Module):
    """Learned augmented residual layer: x + norm(right(left(x))), a product of low rank.

    Shape:
        x: (B, L, hidden_size) -> the same
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.linear_left = Linear(c.hidden_size, c.laurel_rank)
        self.linear_right = Linear(c.laurel_rank, c.hidden_size)
        self.post_laurel_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))


@dataclass(frozen=True)
class SparseGeGLU:
    """GeGLU that keeps about the share ``1 - sparsity`` of the largest gate activations.

    The cutoff, which is subtracted from all, is the quantile of a normal distribution with their
    mean and standard deviation (statistical top-k, arXiv:2506.06644).
    """

    sparsity: float

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        x = gate.astype(mx.float32)
        quantile = NormalDist().inv_cdf(self.sparsity)
        cutoff = x.mean(-1, keepdims=True) + quantile * x.std(-1, keepdims=True)
        return geglu(mx.maximum(x - cutoff, 0).astype(gate.dtype), up)


class DecoderLayer(nn.Module):
    """Decoder layer that updates all streams: (B, L, S, hidden_size) -> the same."""

    residual_outputs = ()  # AltUp mixes several streams

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.index = index
        self.scaled = c.altup_correct_scale
        self.self_attn = SharedKVAttention(
            c,
            rope=RoPE(c.head_size, c.rope_for(c.layer_type(index))),
            span=c.span(index),
            shares_kv=index >= c.first_sharing_layer,
            bias=c.attention_bias,
            output_bias=c.attention_bias,
        )
        sizes = c.intermediate_size
        hidden = sizes if isinstance(sizes, int) else sizes[index]
        sparsity = c.activation_sparsity_pattern[index]
        self.mlp = GatedMLP(c.hidden_size, hidden, SparseGeGLU(sparsity) if sparsity else geglu)
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        self.altup = AltUp(c)
        self.laurel = Laurel(c)
        self.per_layer_input_gate = Linear(c.hidden_size, c.hidden_size_per_layer_input)
        self.per_layer_projection = Linear(c.hidden_size_per_layer_input, c.hidden_size)
        self.post_per_layer_input_norm = norm()

    def __call__(self, state: mx.array, context: ForwardContext, cache: Cache | None) -> mx.array:
        predicted = self.altup.predict(state)
        x = predicted[..., 0, :]
        y = self.input_layernorm(x)
        attention = self.post_attention_layernorm(self.self_attn(y, context, cache))
        x = (x + attention + self.laurel(y)) * SQRT_HALF
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        state = self.altup.correct(predicted, x)
        first = x = state[..., :1, :]
        if self.scaled:
            x = x * self.altup.correct_output_scale
        embedding = context.shared["embeddings"][:, :, self.index, None]
        x = geglu(self.per_layer_input_gate(x), embedding)
        x = self.post_per_layer_input_norm(self.per_layer_projection(x))
        return mx.concatenate([first, state[..., 1:, :] + x], axis=-2)


class Gemma3n(PerLayerEmbeddingLM):
    """Model whose hidden state is S streams, (B, L, S, hidden_size)."""

    def __init__(self, c: Config) -> None:
        layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
        super().__init__(
            c,
            layers,
            RMSNorm(c.hidden_size, c.rms_norm_eps),
            embed_scale=c.hidden_size**0.5,
            softcap=c.final_logit_softcapping,
        )
        model = self.model
        self.add_per_layer_embeddings(
            c.vocab_size_per_layer_input, c.hidden_size_per_layer_input, c.rms_norm_eps
        )
        square = partial(Linear, c.hidden_size, c.hidden_size)
        model.altup_projections = [square() for _ in range(1, c.altup_num_inputs)]
        model.altup_unembed_projections = [square() for _ in range(1, c.altup_num_inputs)]

    def embed(self, tokens: mx.array, context: ForwardContext) -> mx.array:
        """Compute the first hidden state: token ids (B, L) -> (B, L, S, hidden_size)."""
        x = super().embed(tokens, context)
        others = [match_rms(project(x), x) for project in self.model["altup_projections"]]
        return mx.stack([x, *others], axis=-2)

    def head(self, state: mx.array) -> mx.array:
        """Compute logits of the mean of the streams: (B, L, S, hidden_size) -> (B, L, V)."""
        first, *others = (state[..., stream, :] for stream in range(state.shape[-2]))
        projections = self.model["altup_unembed_projections"]
        back = [project(x) for project, x in zip(projections, others, strict=True)]
        streams = [first, *(match_rms(x, first) for x in back)]
        return super().head(mx.stack(streams, axis=-2).mean(-2))


def build(c: Config) -> CausalLM:
    """Build the model without loaded weights."""
    return Gemma3n(c)


PREFIX = "model.language_model."

UNUSED = r"\.self_attn\.[kv]_(proj|norm)\."
WEIGHTS = (
    IgnoreFrom("first_sharing_layer", UNUSED, "keys and values of sharing layers", carried=True),
)
