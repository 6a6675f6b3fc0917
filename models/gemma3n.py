"""Gemma 3n (Google, 2025), text part.

    4 × x ─ predict ─┬─ norm ─┬─ attention ─ norm ─ + ─┐
                     │        └─ Laurel ─────────── + ─┴─┬─ norm ─ GeGLU ─ norm ─ + ─ correct ─┬───────────── + ─ 4 × x
                     └──────────────────────────────┘    └────────────────────────┘            └─ per-layer ──┘

Stands out: four residual streams of which each layer computes one and guesses the others (AltUp); a low-rank branch
beside attention (Laurel); an embedding of the token for every layer, which may stay on slow storage; the last layers
take keys and values from earlier ones; the first layers let a twentieth of their features through; scores unscaled.
Source: google/gemma-3n-E4B-it/config.json; arXiv:2301.13310 (AltUp), arXiv:2411.07501 (Laurel); transformers'
Gemma3nTextModel for every constant; arXiv:2506.06644 for the sparsity (statistical top-k).
"""

from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Attention, Cache, CausalLM, Embedding, GatedMLP, Linear, Quantization, RMSNorm, RoPE, Step
from mlxarch.blocks.config import Positive, Size
from mlxarch.blocks.feedforward import geglu
from mlxarch.blocks.layer_types import TwoBasesConfig
from mlxarch.blocks.renames import IgnoreFrom
from mlxarch.errors import ConfigError

HALF_ROOT = 2**-0.5  # of a sum of two


@dataclass(frozen=True, kw_only=True)
class Config(TwoBasesConfig):
    """``query_pre_attn_scalar`` stands in the published files, and nothing reads it: scores are not scaled.

    ``altup_coef_clip`` matters in training only. Defaults are those of transformers' Gemma3nTextConfig.
    """

    intermediate_size: Size | tuple[Size, ...]  # pyright: ignore[reportIncompatibleVariableOverride]
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

    @property
    def first_sharing_layer(self) -> int:
        """From this layer on, keys and values are those of an earlier one."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def check(self) -> None:
        super().check()
        self.check_length("intermediate_size", self.intermediate_size)
        self.check_length("activation_sparsity_pattern", self.activation_sparsity_pattern)
        if not all(0 <= share < 1 for share in self.activation_sparsity_pattern):
            raise ConfigError("config.json: each value of activation_sparsity_pattern must be at least 0 and below 1")
        kinds = [self.kind(index) for index in range(self.num_hidden_layers)]
        first = self.first_sharing_layer
        if not 0 < first <= len(kinds) or set(kinds[first:]) - set(kinds[:first]):
            raise ConfigError(
                f"config.json: num_kv_shared_layers = {self.num_kv_shared_layers} of {len(kinds)} layers leaves some "
                "without an earlier layer of their kind to take keys and values from"
            )


def as_large_as(x: mx.array, other: mx.array) -> mx.array:
    """x scaled so that the root mean square of its last axis is the other's."""
    own, wanted = (t.astype(mx.float32).square().mean(-1, keepdims=True) for t in (x, other))
    return (x * mx.sqrt(wanted / mx.maximum(own, 1e-5))).astype(x.dtype)


class Coefficients(Linear):
    """So small, and so many times multiplied, that no quantizer may pack it."""

    quantizable = False


class AltUp(nn.Module):
    """Alternating updates: of S streams the layer computes the first, and learned mixtures stand in for the others.

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
        """(B, L, hidden_size) -> (B, L, S) between -1 and 1."""
        return mx.tanh(self.modality_router(self.router_norm(x) * x.shape[-1] ** -1.0))

    def predict(self, streams: mx.array) -> mx.array:
        """What the streams will be behind the layer, before it has run."""
        mixture = self.prediction_coefs(self.modalities(streams[..., 0, :]))  # (B, L, S * S)
        return streams + mx.unflatten(mixture, -1, (self.count, self.count)) @ streams

    def correct(self, predicted: mx.array, x: mx.array) -> mx.array:
        """The prediction, moved by how far the layer's x (B, L, hidden_size) is from what was predicted for it."""
        shares = self.correction_coefs(self.modalities(x)) + 1  # (B, L, S)
        return predicted + shares[..., None] * (x - predicted[..., 0, :])[..., None, :]


class Laurel(nn.Module):
    """x + norm(right(left(x))), with few features between: (B, L, hidden_size) -> the same."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.linear_left = Linear(c.hidden_size, c.laurel_rank)
        self.linear_right = Linear(c.laurel_rank, c.hidden_size)
        self.post_laurel_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))


@dataclass(frozen=True)
class SparseGeGLU:
    """GeGLU of the ``1 - sparsity`` largest features, as far as they exceed the others, if a bell curve tells which."""

    sparsity: float

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        wide = gate.astype(mx.float32)
        cutoff = wide.mean(-1, keepdims=True) + NormalDist().inv_cdf(self.sparsity) * wide.std(-1, keepdims=True)
        return geglu(mx.maximum(wide - cutoff, 0).astype(gate.dtype), up)


class SharingAttention(Attention):
    """Values are normalised too, and scores not scaled. The last layers have queries only.

    ``step.shared`` holds keys, values and mask by span: a layer that has none takes those of the last that had.
    """

    def __init__(self, c: Config, index: int) -> None:
        rope = RoPE(c.head_size, c.rotation_of(c.kind(index)))
        super().__init__(c, rope=rope, span=c.span(index), scale=1.0, norm=partial(RMSNorm, eps=c.rms_norm_eps))
        self.eps, self.borrows = c.rms_norm_eps, index >= c.first_sharing_layer
        if self.borrows:
            del self.k_proj, self.v_proj, self.k_norm, self.qkv

    def make_cache(self, capacity: int | None, kv: Quantization | None = None) -> Cache | None:
        return None if self.borrows else super().make_cache(capacity, kv)

    def __call__(self, x: mx.array, step: Step, cache: Cache | None) -> mx.array:
        projected = [self.q_proj(x)] if self.borrows else self.qkv(x)
        q, *own = (mx.unflatten(t, -1, (-1, self.head_size)) for t in projected)  # (B, L, heads, D)
        q = self.rope(self.q_norm(q).swapaxes(1, 2), step.offset)  # (B, H, L, D)
        if own:
            k = self.rope(self.k_norm(own[0]).swapaxes(1, 2), step.offset)  # (B, K, L, D)
            v = mx.fast.rms_norm(own[1], None, self.eps).swapaxes(1, 2)
            mask = step.mask(self.span, cache)
            step.shared[self.span] = (*((k, v) if cache is None else cache.append(k, v)), mask)
        k, v, mask = step.shared[self.span]
        return self.o_proj(self.attend(q, k, v, mask, step).swapaxes(1, 2).flatten(-2))


class DecoderLayer(nn.Module):
    """Four streams in, four out: (B, L, streams, hidden_size)."""

    def __init__(self, c: Config, index: int) -> None:
        super().__init__()
        self.index, self.scaled = index, c.altup_correct_scale
        self.self_attn = SharingAttention(c, index)
        sizes, sparsity = c.intermediate_size, c.activation_sparsity_pattern[index]
        hidden = sizes if isinstance(sizes, int) else sizes[index]
        self.mlp = GatedMLP(c.hidden_size, hidden, SparseGeGLU(sparsity) if sparsity else geglu)
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.altup, self.laurel = AltUp(c), Laurel(c)
        self.per_layer_input_gate = Linear(c.hidden_size, c.hidden_size_per_layer_input)
        self.per_layer_projection = Linear(c.hidden_size_per_layer_input, c.hidden_size)
        self.post_per_layer_input_norm = norm()

    def __call__(self, state: mx.array, step: Step, cache: Cache | None) -> mx.array:
        predicted = self.altup.predict(state)
        x = predicted[..., 0, :]
        y = self.input_layernorm(x)
        x = (x + self.post_attention_layernorm(self.self_attn(y, step, cache)) + self.laurel(y)) * HALF_ROOT
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        state = self.altup.correct(predicted, x)
        first = x = state[..., :1, :]
        if self.scaled:
            x = x * self.altup.correct_output_scale
        x = geglu(self.per_layer_input_gate(x), step.shared["embeddings"][:, :, self.index, None])
        x = self.post_per_layer_input_norm(self.per_layer_projection(x))
        return mx.concatenate([first, state[..., 1:, :] + x], axis=-2)


class Gemma3n(CausalLM):
    """The state is the streams (B, L, S, hidden_size); what a layer takes from the tokens themselves is in
    ``step.shared["embeddings"]``, (B, L, layers, features).
    """

    token_tables = ("model.embed_tokens_per_layer",)  # looked up by token and nothing else: they may stay on the disk

    def __init__(self, c: Config) -> None:
        layers = [DecoderLayer(c, index) for index in range(c.num_hidden_layers)]
        norm, root = RMSNorm(c.hidden_size, c.rms_norm_eps), c.hidden_size**0.5
        super().__init__(c, layers, norm, embed_scale=root, softcap=c.final_logit_softcapping)
        model, features, self.rows = self.model, c.hidden_size_per_layer_input, c.vocab_size_per_layer_input
        model.embed_tokens_per_layer = Embedding(self.rows, len(layers) * features)
        model.per_layer_model_projection = Linear(c.hidden_size, len(layers) * features)
        model.per_layer_projection_norm = RMSNorm(features, c.rms_norm_eps)
        square = partial(Linear, c.hidden_size, c.hidden_size)
        model.altup_projections = [square() for _ in range(1, c.altup_num_inputs)]
        model.altup_unembed_projections = [square() for _ in range(1, c.altup_num_inputs)]

    def embed(self, tokens: mx.array, step: Step) -> mx.array:
        """Token ids (B, L) -> state (B, L, S, hidden_size)."""
        x, model = super().embed(tokens, step), self.model
        row = model["embed_tokens_per_layer"](mx.where(tokens < self.rows, tokens, 0))  # other media's tokens have none
        row = mx.unflatten(row, -1, (len(self.layers), -1))  # (B, L, layers, features)
        projected = model["per_layer_model_projection"](x) * mx.array(x.shape[-1] ** -0.5, x.dtype)
        projected = model["per_layer_projection_norm"](mx.unflatten(projected, -1, (len(self.layers), -1)))
        step.shared["embeddings"] = (projected + row * mx.array(row.shape[-1] ** 0.5, row.dtype)) * HALF_ROOT
        return mx.stack([x, *(as_large_as(project(x), x) for project in model["altup_projections"])], axis=-2)

    def head(self, state: mx.array) -> mx.array:
        """State (B, L, S, hidden_size) -> logits (B, L, V) of the streams' mean."""
        first, *others = (state[..., stream, :] for stream in range(state.shape[-2]))
        back = [project(x) for project, x in zip(self.model["altup_unembed_projections"], others, strict=True)]
        return super().head(mx.stack([first, *(as_large_as(x, first) for x in back)], axis=-2).mean(-2))


def build(c: Config) -> CausalLM:
    """A model with the right shapes and no weights."""
    return Gemma3n(c)


PREFIX = "model.language_model."

UNUSED = r"\.self_attn\.[kv]_(proj|norm)\."
WEIGHTS = (IgnoreFrom("first_sharing_layer", UNUSED, "keys and values of sharing layers", carried=True),)
