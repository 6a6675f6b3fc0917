"""The facts by which architectures are compared, all read off the model itself, built from a config without weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxarch import blocks
from mlxarch.blocks import CausalLM, Chunked, Embedding, ExpertLinear, Linear, NoRoPE, RoPE, Router, Sliding
from mlxarch.blocks.linear import Matrix
from mlxarch.quantize.formats import settings
from mlxarch.quantize.plan import make_plan
from mlxarch.registry import architecture
from mlxarch.tensors import Tensor
from mlxarch.tracing import Block, trace

KV_CONTEXT = 32_768  # tokens for which the size of the caches is given
EVERYWHERE = {CausalLM, Embedding, Linear, Router}
KV_BYTES = 2  # of a number in a cache: float16 or bfloat16


@dataclass(frozen=True)
class Structure:
    """Sizes are in bytes, windows and contexts in tokens.

    Attributes:
        file: in ``models/``.
        parameters: of the text model; a tied output head is not counted twice.
        active: those that computing one token reads: all but the experts that its router does not choose, and of
            a look-up table one row, unless the table is the output head too.
        windows: how far back the layers look, as a pattern over the layers.
        scores: what is done to the attention scores besides.
        norm: the class of the last one.
        norms: where norms stand in a residual branch.
        kv_bytes: what one token adds to the caches in 16 bits while no window is full.
        kv_bytes_at_32k: of the caches in 16 bits at 32,768 tokens, or at ``context`` where that is shorter.
        weight_bytes: bits -> size of all weights, quantized in groups of 64 as ``mlxarch quantize`` does it.
        parts: classes of ``mlxarch.blocks`` that it is made of.
        blocks: the kinds of layers, the most frequent first.
    """

    file: str
    model_type: str
    parameters: int
    active: int
    layers: int
    hidden_size: int
    attention: str
    heads: int
    kv_heads: int
    head_size: int
    qk_norm: str
    scores: str
    windows: str
    norm: str
    norms: str
    positions: str
    feed_forward: str
    experts: str
    vocabulary: int
    tied: bool
    context: int
    kv_bytes: int
    kv_bytes_at_32k: int
    weight_bytes: Mapping[int, int]
    parts: tuple[str, ...]
    blocks: tuple[Block, ...]


def structure(config: Mapping[str, Any]) -> Structure:
    """Build the model that a config.json describes, without weights, and look at it.

    Raises:
        UnsupportedArchitecture, ConfigError: see ``registry.architecture``.
    """
    found = architecture(config)
    model, c = found.build(), cast(Any, found.config)
    parameters = {path: array.shape for path, array in _arrays(model).items()}
    active, matrices, parts = _active(model), _matrices(model), _parts(model)
    traced = trace(model, min(KV_CONTEXT, model.context_length))
    attentions = [layer.self_attn for layer in model.layers]
    held = [array.shape for cache in traced.caches if cache for array in cache.arrays()]
    kv_heads = max((shape[1] for shape in held), default=0)
    latent = any("embed_q" in cast(nn.Module, attention) for attention in attentions)
    kind = "MHA" if kv_heads == c.num_attention_heads else "MQA" if kv_heads == 1 else "GQA"
    return Structure(
        file=found.name,
        model_type=c.model_type,
        parameters=sum(map(math.prod, parameters.values())),
        active=active,
        layers=len(model.layers),
        hidden_size=c.hidden_size,
        attention="MLA" if latent else kind,
        heads=c.num_attention_heads,
        kv_heads=c.num_attention_heads if latent else kv_heads,
        head_size=c.head_size,
        qk_norm=_qk_norm(attentions[0], c),
        scores=_scores(attentions[0], c),
        windows=pattern([_span(getattr(attention, "span", None)) for attention in attentions]),
        norm=type(model.model.norm).__name__,
        norms=_norms(traced.blocks[0]),
        positions=_positions(attentions),
        feed_forward=_feed_forward(traced.blocks),
        experts=_experts(traced.blocks),
        vocabulary=model.vocab_size,
        tied="lm_head" not in model,
        context=model.context_length,
        kv_bytes=KV_BYTES * sum(math.prod(shape) // shape[-2] for shape in held),
        kv_bytes_at_32k=KV_BYTES * sum(map(math.prod, held)),
        weight_bytes={bits: _weight_bytes(parameters, matrices, bits) for bits in (16, 8, 4)},
        parts=parts,
        blocks=traced.blocks,
    )


def _parts(model: CausalLM) -> tuple[str, ...]:
    """Classes that are public in ``mlxarch.blocks``, but for those that all models have."""
    spans = [getattr(layer.self_attn, "span", None) for layer in model.layers]
    used = {kind for part in [*model.modules(), *spans] for kind in type(part).__mro__}
    return tuple(sorted(k.__name__ for k in used if getattr(blocks, k.__name__, None) is k and k not in EVERYWHERE))


# Counting ------------------------------------------------------------------------------------------------------------


def _arrays(module: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def _size(module: nn.Module) -> int:
    return sum(array.size for array in _arrays(module).values())


def _matrices(model: CausalLM) -> frozenset[str]:
    return frozenset(f"{path}.weight" for path, m in model.named_modules() if isinstance(m, Matrix) and m.quantizable)


def _active(model: CausalLM) -> int:
    """See ``Structure.active``."""
    unread = 0
    for module in model.modules():
        for router in module.children().values():
            if isinstance(router, Router):
                stacks = [m for m in module.modules() if isinstance(m, ExpertLinear)]
                experts, chosen = stacks[0].weight.shape[0], cast(Any, router).k
                unread += sum(map(_size, stacks)) // experts * (experts - chosen)
        is_head = module is model.model.embed_tokens and "lm_head" not in model
        if isinstance(module, Embedding) and not is_head:
            unread += module.weight.size - module.weight.shape[-1]
    return _size(model) - unread


@dataclass(frozen=True)
class _Unread(Tensor):
    """A tensor of which only shape and type matter."""

    shape: tuple[int, ...]
    dtype: mx.Dtype = mx.bfloat16

    def rows(self, start: int, stop: int) -> mx.array:
        raise NotImplementedError


def _weight_bytes(parameters: Mapping[str, tuple[int, ...]], matrices: frozenset[str], bits: int) -> int:
    tensors = {path: _Unread(shape) for path, shape in parameters.items()}
    return make_plan(tensors, matrices, settings(bits) if bits < 16 else None, None).weight_bytes


# In words ------------------------------------------------------------------------------------------------------------


def pattern(labels: Sequence[str]) -> str:
    """What repeats over the layers: "5 × a : 1 × b" where every sixth of them is b."""
    period = next(n for n in range(1, len(labels) + 1) if all(labels[i] == labels[i % n] for i in range(len(labels))))
    runs = [(label, len(list(group))) for label, group in groupby(labels[:period])]
    return runs[0][0] if len(runs) == 1 else " : ".join(f"{count} × {label}" for label, count in runs)


def _span(span: object) -> str:
    if isinstance(span, Sliding):
        return f"window {span.window}"
    return f"chunk {span.size}" if isinstance(span, Chunked) else "full"


def _qk_norm(attention: Any, c: Any) -> str:
    if "q_norm" not in attention:
        return "per head, no weights" if getattr(c, "use_qk_norm", False) else "no"
    return "over the projection" if getattr(attention, "qk_norm", "") == "projection" else "per head"


def _scores(attention: Any, c: Any) -> str:
    cap = getattr(c, "attn_logit_softcapping", None)
    return ", ".join((["sinks"] if "sinks" in attention else []) + ([f"soft cap {cap:g}"] if cap else []))


def _norms(block: Block) -> str:
    """Where norms stand around attention and feed-forward."""
    placed: dict[tuple[bool, bool], None] = {}
    for branch in block.branches:
        kinds = [stage[0].kind for stage in branch]
        if {"attention", "feed-forward"} & set(kinds):
            placed[kinds[0] == "norm", kinds[-1] == "norm"] = None
    words = {(True, False): "before", (False, True): "behind", (True, True): "before and behind"}
    return ", ".join(words.get(place, "none") for place in placed)


def _positions(attentions: Sequence[Any]) -> str:
    return pattern([_rope(getattr(attention, "rope", None), attention) for attention in attentions])


def _rope(rope: object, attention: Any) -> str:
    if isinstance(rope, NoRoPE):
        return "NoPE"
    if not isinstance(rope, RoPE):
        return "learned"
    words = f"RoPE {_short(rope.rotation.theta)}"
    if rope.rotation.kind != "default":
        words += f" {rope.rotation.kind}"
        if (factor := rope.rotation.scaling.get("factor")) is not None:
            words += f" ×{factor:g}"
    part = rope.dims < getattr(attention, "head_size", rope.dims)
    return words + (f", {rope.dims} of {attention.head_size}" if part else "")


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:g}"


def activation(gate: str) -> str:
    """The usual spelling of a gate: SwiGLU, clamped SwiGLU."""
    words = [word.capitalize() if word.islower() else word for word in gate.replace("_", " ").split()]
    return " ".join({"Gelu": "GELU", "Swiglu": "SwiGLU", "Geglu": "GeGLU"}.get(word, word) for word in words)


def count(number: int) -> str:
    """Parameters for a person, three digits."""
    for size, letter in ((1e12, "T"), (1e9, "B")):
        if number >= 0.9995 * size:
            return f"{number / size:.{2 if number < 10 * size else 1 if number < 100 * size else 0}f}{letter}"
    return f"{number / 1e6:.0f}M"


def _feed_forward(blocks: Sequence[Block]) -> str:
    """Of the dense layers; where all layers have experts, what gates those."""
    feeds = [block.feed_forward for block in blocks]
    dense = [f"{activation(feed.gate)} {feed.width}" for feed in feeds if not feed.experts]
    return ", ".join(dict.fromkeys(dense or [activation(feeds[0].gate)]))


def _experts(blocks: Sequence[Block]) -> str:
    """Experts, and in how many of the layers."""
    sparse = [block for block in blocks if block.feed_forward.experts]
    if not sparse:
        return "no"
    feed, layers = sparse[0].feed_forward, sum(len(block.layers) for block in blocks)
    count = sum(len(block.layers) for block in sparse)
    words = f"{feed.chosen} of {feed.experts} × {feed.width}" + (f" + {feed.beside}" if feed.beside else "")
    return words + ("" if count == layers else f" in {count} of {layers} layers")
