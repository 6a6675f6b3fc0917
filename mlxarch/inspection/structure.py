"""Describe an architecture by the facts in which models differ, from a model without weights."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxarch import blocks
from mlxarch.blocks import (
    CausalLM,
    Chunked,
    Embedding,
    ExpertLinear,
    Linear,
    NoRoPE,
    RoPE,
    Router,
    Sliding,
)
from mlxarch.blocks.layer import token_mixer
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.recurrent.parallel_mixer import ParallelMixer
from mlxarch.blocks.recurrent.state_layer import StateLayer
from mlxarch.blocks.sparse.compressed_attention import CompressedAttention
from mlxarch.checkpoint.layout import plan_layout
from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.inspection.trace import Block, trace
from mlxarch.kv_cache import Cache, CompressedCache, StateCache
from mlxarch.loading.registry import architecture
from mlxarch.quantization.scheme import check_quantization

KV_CONTEXT = 32_768  # tokens for which the size of the KV cache is given
COMMON_BLOCKS = {CausalLM, Embedding, Linear, Router}  # used by every model, so not listed
MOST_RUNS = 12  # of equal layers that a description lists
KV_ELEMENT_BYTES = 2  # float16 or bfloat16


@dataclass(frozen=True)
class Structure:
    """Facts about an architecture. Sizes are in bytes, windows and contexts in tokens.

    Attributes:
        file: file in ``models/``.
        parameters: parameters of the text model; a tied output head is not counted twice.
        active_parameters: parameters read to compute one token: all but the experts that the
            router does not choose; of an embedding table one row, unless the table is the output
            head too.
        layers: number of decoder layers.
        attention: "MHA", "GQA", "MQA" or "MLA".
        qk_norm: normalization of queries and keys.
        score_modifiers: what else is done to the attention scores, such as sinks or a soft cap.
        windows: attention span of the layers, or the kind of recurrent ones, as a repeating
            pattern.
        norm: class of the final norm.
        norm_placement: where norms stand in a residual branch.
        positions: position encoding, as a repeating pattern.
        kv_bytes_per_token: what one token adds to a 16-bit KV cache while no window is full.
        kv_bytes_at_32k: size of a 16-bit KV cache at 32,768 tokens, or at ``context`` if that is
            shorter.
        state_bytes: size of the states of recurrent layers, whatever the context.
        weight_bytes: bits -> size of all weights, quantized in groups of 64 as
            ``mlxarch quantize`` does it.
        block_classes: names of the classes of ``mlxarch.blocks`` that the model is made of.
        blocks: the kinds of layers, the most frequent first.
    """

    file: str
    model_type: str
    parameters: int
    active_parameters: int
    layers: int
    hidden_size: int
    attention: str
    heads: int
    kv_heads: int
    head_size: int
    qk_norm: str
    score_modifiers: str
    windows: str
    norm: str
    norm_placement: str
    positions: str
    feed_forward: str
    experts: str
    vocab_size: int
    tied: bool
    context: int
    kv_bytes_per_token: int
    kv_bytes_at_32k: int
    state_bytes: int
    weight_bytes: Mapping[int, int]
    block_classes: tuple[str, ...]
    blocks: tuple[Block, ...]


def structure_from_config(config: Mapping[str, Any]) -> Structure:
    """Build the model of a config.json without weights and describe it.

    Raises:
        UnsupportedArchitecture, ConfigError: see ``registry.architecture``.
    """
    found = architecture(config)
    model = found.build()
    c = cast(Any, found.config)
    shapes = {path: array.shape for path, array in _parameters(model).items()}
    # everything about the modules is read first: a trace replaces their classes
    active_parameters = _active_parameters(model)
    quantizable = _quantizable_weights(model)
    block_classes = _block_classes(model)
    context = min(KV_CONTEXT, model.context_length)
    traced = trace(model, context)
    mixers = [token_mixer(layer) for layer in model.layers]
    attentions = [m for m in mixers if m is not None and not isinstance(m, StateLayer)]
    kv_shapes = _kv_shapes(traced.caches)
    compressed = [cache.sizes for cache in traced.caches if isinstance(cache, CompressedCache)]
    entries_per_token = round(sum(sizes.elements_per_token for sizes in compressed))
    kv_heads = max((shape[1] for shape in kv_shapes), default=1 if compressed else 0)
    is_latent = any("embed_q" in cast(nn.Module, attention) for attention in attentions)
    return Structure(
        file=found.name,
        model_type=c.model_type,
        parameters=sum(map(math.prod, shapes.values())),
        active_parameters=active_parameters,
        layers=len(model.layers),
        hidden_size=c.hidden_size,
        attention="MLA" if is_latent else _attention_kind(c.num_attention_heads, kv_heads),
        heads=c.num_attention_heads,
        kv_heads=c.num_attention_heads if is_latent else kv_heads,
        head_size=c.head_size,
        qk_norm=_describe_qk_norm(attentions[0], c) if attentions else "no",
        score_modifiers=_describe_score_modifiers(attentions[0], c) if attentions else "",
        windows=describe_pattern(list(map(_describe_mixer, mixers))),
        norm=type(model.model.norm).__name__,
        norm_placement=_describe_norm_placement(traced.blocks[0]),
        positions=describe_pattern(
            [
                _describe_rope(getattr(attention, "rope", None), attention)
                for attention in attentions
            ]
            or ["none"]
        ),
        feed_forward=_describe_feed_forward(traced.blocks),
        experts=_describe_experts(traced.blocks),
        vocab_size=model.vocab_size,
        tied="lm_head" not in model,
        context=model.context_length,
        kv_bytes_per_token=KV_ELEMENT_BYTES
        * (sum(math.prod(shape) // shape[-2] for shape in kv_shapes) + entries_per_token),
        kv_bytes_at_32k=KV_ELEMENT_BYTES
        * (sum(map(math.prod, kv_shapes)) + sum(sizes.elements(context) for sizes in compressed)),
        state_bytes=_state_bytes(mixers, traced.caches),
        weight_bytes={bits: _weight_bytes(shapes, quantizable, bits) for bits in (16, 8, 4)},
        block_classes=block_classes,
        blocks=traced.blocks,
    )


def _kv_shapes(caches: Sequence[Cache | None]) -> list[tuple[int, ...]]:
    """Shapes of keys and values, or latents, of all layers."""
    parts = [part for cache in caches if cache for part in cache.parts]
    own = [part for part in parts if not isinstance(part, StateCache)]
    # integers are records of tokens
    return [a.shape for part in own for a in part.arrays() if a.dtype != mx.int32]


def _state_bytes(mixers: Sequence[Any], caches: Sequence[Cache | None]) -> int:
    return sum(
        part.state_bytes(mixer.float32_states, KV_ELEMENT_BYTES)
        for mixer, cache in zip(mixers, caches, strict=True)
        if cache is not None
        for part in cache.parts
        if isinstance(part, StateCache) and not isinstance(part, CompressedCache)
    )


def _attention_kind(heads: int, kv_heads: int) -> str:
    if kv_heads == heads:
        return "MHA"
    return "MQA" if kv_heads == 1 else "GQA"


def _block_classes(model: CausalLM) -> tuple[str, ...]:
    """Names of the classes of ``mlxarch.blocks`` that the model uses, except ``COMMON_BLOCKS``."""
    spans = [getattr(token_mixer(layer), "span", None) for layer in model.layers]
    used = {cls for part in [*model.modules(), *spans] for cls in type(part).__mro__}
    public = {cls for cls in used if getattr(blocks, cls.__name__, None) is cls}
    return tuple(sorted(cls.__name__ for cls in public - COMMON_BLOCKS))


# Counting -----------------------------------------------------------------------------------------


def _parameters(module: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def _parameter_count(module: nn.Module) -> int:
    return sum(array.size for array in _parameters(module).values())


def _quantizable_weights(model: CausalLM) -> frozenset[str]:
    return frozenset(
        f"{path}.weight"
        for path, m in model.named_modules()
        if isinstance(m, Matrix) and m.quantizable
    )


def _active_parameters(model: CausalLM) -> int:
    """Parameters that are used for one token; experts that it does not choose are not counted."""
    unread = 0
    for module in model.modules():
        for router in module.children().values():
            if isinstance(router, Router):
                stacks = [m for m in module.modules() if isinstance(m, ExpertLinear)]
                num_experts = stacks[0].weight.shape[0]
                not_chosen = num_experts - cast(Any, router).k
                unread += sum(map(_parameter_count, stacks)) // num_experts * not_chosen
        is_head = module is model.model.embed_tokens and "lm_head" not in model
        if isinstance(module, Embedding) and not is_head:
            unread += module.weight.size - module.weight.shape[-1]
    return _parameter_count(model) - unread


@dataclass(frozen=True)
class ShapeOnlyTensor(LazyTensor):
    """Tensor of which only shape and dtype are known; its numbers cannot be read."""

    shape: tuple[int, ...]
    dtype: mx.Dtype = mx.bfloat16

    def read_rows(self, start: int, stop: int) -> mx.array:
        """Raise NotImplementedError."""
        raise NotImplementedError("only its shape is known")


def _weight_bytes(
    shapes: Mapping[str, tuple[int, ...]], quantizable: frozenset[str], bits: int
) -> int:
    tensors = {path: ShapeOnlyTensor(shape) for path, shape in shapes.items()}
    quantization = check_quantization(bits) if bits < 16 else None
    return plan_layout(tensors, quantizable, quantization, None).weight_bytes


# Descriptions -------------------------------------------------------------------------------------


def describe_pattern(labels: Sequence[str]) -> str:
    """Describe labels that repeat over the layers: "5 × a : 1 × b" where every sixth layer is b.

    Where nothing repeats soon, the labels are only counted: "21 × a, 20 × b, 2 × c".
    """
    period = next(
        n
        for n in range(1, len(labels) + 1)
        if all(labels[i] == labels[i % n] for i in range(len(labels)))
    )
    runs = [(label, len(list(group))) for label, group in groupby(labels[:period])]
    if len(runs) > MOST_RUNS:
        counts = Counter(labels)
        return ", ".join(f"{count} × {label}" for label, count in counts.most_common())
    if len(runs) == 1:
        return runs[0][0]
    return " : ".join(f"{count} × {label}" for label, count in runs)


def _describe_mixer(mixer: Any) -> str:
    if mixer is None:
        return "none"
    if isinstance(mixer, StateLayer | ParallelMixer):
        return mixer.kind
    span = getattr(mixer, "span", None)
    if isinstance(span, Sliding):
        return f"window {span.window}"
    if isinstance(span, Chunked):
        return f"chunk {span.size}"
    chosen = getattr(mixer, "index_topk", None)
    if isinstance(mixer, CompressedAttention):
        rates = [compressor.rate for compressor in mixer.compressors[:1]]
        entries = "".join(f" and entries of {rate}" for rate in rates)
        return f"window {mixer.window}{entries}" + (f", top {chosen}" if chosen else "")
    return f"top {chosen}" if chosen else "full"


def _describe_qk_norm(attention: Any, c: Any) -> str:
    if "q_norm" not in attention:
        return "per head, no weights" if getattr(c, "use_qk_norm", False) else "no"
    whole_projection = getattr(attention, "qk_norm", "") == "projection"
    return "over the projection" if whole_projection else "per head"


def _describe_score_modifiers(attention: Any, c: Any) -> str:
    modifiers = ["sinks"] if {"sinks", "attn_sink"} & set(attention) else []
    if cap := getattr(c, "attn_logit_softcapping", None):
        modifiers.append(f"soft cap {cap:g}")
    return ", ".join(modifiers)


def _describe_norm_placement(block: Block) -> str:
    """Where norms stand around attention and feed-forward."""
    placements: dict[tuple[bool, bool], None] = {}
    for branch in block.branches:
        kinds = [stage[0].kind for stage in branch]
        if {"attention", "feed-forward"} & set(kinds):
            placements[kinds[0] == "norm", kinds[-1] == "norm"] = None
    names = {(True, False): "before", (False, True): "after", (True, True): "before and after"}
    return ", ".join(names.get(placement, "none") for placement in placements)


def _describe_rope(rope: object, attention: Any) -> str:
    if isinstance(rope, NoRoPE):
        return "NoPE"
    if not isinstance(rope, RoPE):
        return "learned"
    text = f"RoPE {_format_short(rope.config.theta)}"
    if rope.config.type != "default":
        text += f" {rope.config.type}"
        if (factor := rope.config.scaling.get("factor")) is not None:
            text += f" ×{factor:g}"
    if rope.dims < getattr(attention, "head_size", rope.dims):
        text += f", {rope.dims} of {attention.head_size}"
    return text


def _format_short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:g}"


def format_activation(activation: str) -> str:
    """Usual spelling of an activation: SwiGLU, Clamped SwiGLU."""
    words = [
        word.capitalize() if word.islower() else word
        for word in activation.replace("_", " ").split()
    ]
    spellings = {"Gelu": "GELU", "Swiglu": "SwiGLU", "Geglu": "GeGLU"}
    return " ".join(spellings.get(word, word) for word in words)


def format_parameters(number: int) -> str:
    """Number of parameters with three significant digits: 135M, 8.03B, 671B."""
    for size, letter in ((1e12, "T"), (1e9, "B")):
        if number >= 0.9995 * size:
            leading_digits = 1 + (number >= 10 * size) + (number >= 100 * size)
            return f"{number / size:.{3 - leading_digits}f}{letter}"
    return f"{number / 1e6:.0f}M"


def _describe_feed_forward(blocks: Sequence[Block]) -> str:
    """Activation and size of the dense layers; the activation alone if all layers are MoE."""
    networks = [block.feed_forward for block in blocks]
    dense = [
        f"{format_activation(network.activation)} {network.intermediate_size}"
        for network in networks
        if network.activation and not network.num_experts
    ]
    networks = [network for network in networks if network.activation]
    return ", ".join(dict.fromkeys(dense or [format_activation(networks[0].activation)]))


def _describe_experts(blocks: Sequence[Block]) -> str:
    """Experts of a layer, and in how many of the layers."""
    sparse = [block for block in blocks if block.feed_forward.num_experts]
    if not sparse:
        return "no"
    network = sparse[0].feed_forward
    text = f"{network.experts_per_token} of {network.num_experts} × {network.intermediate_size}"
    if network.shared_intermediate_size:
        text += f" + {network.shared_intermediate_size}"
    layers = sum(len(block.layers) for block in blocks)
    sparse_layers = sum(len(block.layers) for block in sparse)
    return text if sparse_layers == layers else f"{text} in {sparse_layers} of {layers} layers"
