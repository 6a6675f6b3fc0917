"""What a model takes in memory, by kind, from its config and the shapes of its tensors: no weight is read."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxarch.activations import Peak, fill, pack_heads, stand_ins, step_bytes
from mlxarch.blocks import CausalLM, Chunked, Embedding, ExpertLinear, Quantization, Router, Sliding
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.span import Latent
from mlxarch.packing import vector_bytes
from mlxarch.registry import architecture
from mlxarch.tensors import DTYPES, FLOATS, Packed, Tensor
from mlxarch.tracing import trace
from mlxarch.weights import Resolved

Kind = Literal["attention", "feed-forward", "experts", "embeddings", "head", "per-layer embeddings", "others"]
SAMPLE = 2  # layers of each kind that stand for all of it
KV_GROUP = 64  # elements of a packed key or value that share a scale
FUSED_HEAD = 128  # features of a head up to which MLX's kernels for several queries go
LOGITS = 16  # bytes for each entry of the vocabulary: logits, sorted, as chances, and one over


@dataclass(frozen=True)
class Weight:
    """A parameter and its three parts where it is packed: (elements, bytes of one, whether they are floats)."""

    path: str
    kind: Kind
    layer: int | None
    parts: tuple[tuple[int, int, bool], ...]
    exact: bool = False

    @property
    def stored(self) -> int:
        """Bytes on the disk."""
        return sum(count * width for count, width, _ in self.parts)

    def held(self, float_bytes: int) -> int:
        """Bytes in memory: floats, scales too, have the type that is computed in."""
        wide = 4 if self.exact else float_bytes
        return sum(count * (wide if is_float else width) for count, width, is_float in self.parts)


@dataclass(frozen=True)
class LayerCache:
    """What the cache of a layer holds: ``vectors`` of each token as (heads, features); the newest ``window`` tokens."""

    kind: Literal["full", "sliding", "chunked", "latent"]
    vectors: tuple[tuple[int, int], ...]
    window: int | None = None

    def tokens(self, context: int) -> int:
        """That it has room for where ``context`` are planned for."""
        return context if self.window is None else min(context, self.window)

    def nbytes(self, context: int, float_bytes: int, kv_bits: int | None = None) -> int:
        """Of the arrays."""
        kv = Quantization(kv_bits, KV_GROUP) if kv_bits else None
        return self.tokens(context) * sum(heads * vector_bytes(size, kv, float_bytes) for heads, size in self.vectors)


@dataclass(frozen=True)
class Experts:
    """Of one layer: ``count`` of them, of which a token takes ``chosen`` and then ``row`` numbers while they run."""

    count: int
    chosen: int
    row: int = 0


@dataclass(frozen=True)
class Footprint:
    """All that the memory of a model depends on.

    Attributes:
        name: of the model.
        bits: of most of its matrices; 16 where they are not packed.
        weights: every parameter.
        caches: one for each layer; None for a layer that takes keys and values from another.
        experts: one for each layer; None for a dense one.
        tied: whether the table of embeddings is the output head too.
        longest: context that it was made for, in tokens.
        hidden: features of the residual stream.
        vocabulary: tokens that there are.
    """

    name: str
    bits: int
    weights: tuple[Weight, ...]
    caches: tuple[LayerCache | None, ...]
    experts: tuple[Experts | None, ...]
    tied: bool
    longest: int
    hidden: int
    vocabulary: int

    @property
    def stored(self) -> int:
        """Bytes of the weights on the disk."""
        return sum(weight.stored for weight in self.weights)

    def held(self, float_bytes: int) -> dict[str, int]:
        """Bytes of the weights in memory, by kind."""
        total: Counter[str] = Counter()
        for weight in self.weights:
            total[weight.kind] += weight.held(float_bytes)
        return dict(total)

    def loading(self, float_bytes: int) -> int:
        """Bytes above those of all weights at the peak of loading, layer by layer in the order of the files.

        Floats of another type than is computed in are held twice until their layer is there.
        """
        groups: dict[int | str, list[Weight]] = {}
        for weight in self.weights:
            groups.setdefault(weight.path if weight.layer is None else weight.layer, []).append(weight)
        before, peak = 0, 0
        for group in groups.values():
            before += sum(weight.held(float_bytes) for weight in group)
            parts = [part for weight in group for part in weight.parts]
            peak = max(
                peak, before + sum(n * width for n, width, is_float in parts if is_float and width != float_bytes)
            )
        return peak - before

    def expert_bytes(self, float_bytes: int) -> list[int]:
        """Of one expert in each layer, 0 in a dense one."""
        total: Counter[int] = Counter()
        for weight in self.weights:
            if weight.kind == "experts" and weight.layer is not None:
                total[weight.layer] += weight.held(float_bytes)
        return [total[n] // e.count if e else 0 for n, e in enumerate(self.experts)]

    def kv(self, context: int, float_bytes: int, kv_bits: int | None = None) -> dict[str, int]:
        """Bytes of the caches by kind of layer."""
        total: Counter[str] = Counter()
        for cache in self.caches:
            if cache:
                total[f"{cache.kind} layers"] += cache.nbytes(context, float_bytes, kv_bits)
        return dict(total)

    def windows(self, context: int, float_bytes: int, kv_bits: int | None = None) -> int:
        """Bytes of the caches that have no past: what a session keeps of them to go back to, for each such place."""
        return sum(c.nbytes(context, float_bytes, kv_bits) for c in self.caches if c and c.window is not None)

    def growth(self, context: int, float_bytes: int, kv_bits: int | None = None) -> int:
        """What caches that grow by need take besides: an eighth to spare, and the largest while it is copied."""
        sizes = [c.nbytes(context, float_bytes, kv_bits) for c in self.caches if c and c.window is None]
        return sum(sizes) // 8 + max(sizes, default=0)


# From a config, or from what is stored ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unread(Tensor):
    """A tensor of which only shape and type are known."""

    shape: tuple[int, ...]
    dtype: mx.Dtype = mx.bfloat16

    def rows(self, start: int, stop: int) -> mx.array:
        """See Tensor."""
        raise NotImplementedError("only its shape is known")


class Blueprint:
    """A model without weights, of which a footprint can be drawn at any width.

    Args:
        name: for messages.
        build: makes the model without weights.
        tensors: its parameters.
    """

    def __init__(self, name: str, build: Callable[[], CausalLM], tensors: Mapping[str, Tensor]) -> None:
        self.name, self.build, self.tensors = name, build, tensors
        model = build()
        modules = dict(model.named_modules())
        self.exact = frozenset(f"{p}.{leaf}" for p, m in modules.items() for leaf in getattr(m, "float32", ()))
        self.matrices = frozenset(f"{p}.weight" for p, m in modules.items() if isinstance(m, Matrix) and m.quantizable)
        self._widths: dict[tuple[int | None, int], Footprint] = {}
        self._steps: dict[tuple[Any, ...], Peak] = {}
        self._models: dict[tuple[int, bool, bool], CausalLM] = {}
        self._kinds = {path: _kind(path, modules) for path in tensors}
        self._typical = _typical(model)
        self._outline = _outline(name, model)
        self.longest = self._outline.longest
        self.packed = any(isinstance(t, Packed) and path in self.matrices for path, t in tensors.items())

    def activations(
        self,
        context: int,
        chunk: int,
        float_bytes: int,
        fused: bool,
        kv: Quantization | None,
        packed: bool = False,
        streamed: bool = False,
    ) -> Peak:
        """Bytes beyond weights and caches while the last ``chunk`` of ``context`` tokens passes through.

        Args:
            fused: whether attention has a kernel that never holds the scores of all queries; a CPU has none.
            packed: whether matrices are.
            streamed: whether experts are; what these take is left out, for they run when nothing else does.
        """
        key = (context, chunk, float_bytes, fused, kv, packed, streamed)
        if key not in self._steps:
            self._steps[key] = self._activations(*key)
        return self._steps[key]

    def _activations(
        self, context: int, chunk: int, float_bytes: int, fused: bool, kv: Quantization | None, *forms: bool
    ) -> Peak:
        model, tokens = self._light(float_bytes, *forms), min(chunk, context)
        caches = model.make_caches(context, kv=kv)
        fill(model, caches, context - tokens, self._typical)
        sizes = {getattr(layer.self_attn, "head_size", 0) for layer in model.layers}
        scores = (
            (lambda shape: False)
            if not fused or max(sizes) > FUSED_HEAD
            else (lambda shape: len(shape) > 3 and shape[-2] == tokens and shape[-1] >= tokens)
        )
        found, logits = step_bytes(model, caches, tokens, self._typical, skip=scores), LOGITS * model.vocab_size
        return Peak(found.prepared + logits, found.touched + logits)

    def _light(self, float_bytes: int, packed: bool, streamed: bool) -> CausalLM:
        """The model with weights that take no memory; ``packed``: also those that each head has of its own."""
        key = (float_bytes, packed, streamed)
        if key not in self._models:
            model, dtype = self.build(), mx.float32 if float_bytes == 4 else mx.bfloat16
            stand_ins(model, dtype)
            if packed:
                pack_heads(model, Quantization(4, KV_GROUP), dtype)
            for experts in _stacks(model) if streamed else ():
                experts.streamed = _nothing
            self._models[key] = model
        return self._models[key]

    def at(self, bits: int | None = None, group_size: int = 64) -> Footprint:
        """At ``bits`` as the quantizer would write it (16: without packing); None takes the tensors as they are.

        What is packed in fewer bits already, in a small float format, stays as it is.
        """
        if (bits, group_size) not in self._widths:
            self._widths[bits, group_size] = self._at(bits, group_size)
        return self._widths[bits, group_size]

    def _at(self, bits: int | None, group_size: int) -> Footprint:
        if bits is None:
            packed = Counter(t.settings.bits for t in self.tensors.values() if isinstance(t, Packed))
            common = packed.most_common(1)[0][0] if packed else 16
            return self._drawn(common, {path: _parts(tensor) for path, tensor in self.tensors.items()})
        from mlxarch.quantize.plan import make_plan  # with all that can be done to weights

        wanted = Quantization(bits, group_size) if bits < 16 else None
        tensors = self.tensors if wanted else {path: _plain(tensor) for path, tensor in self.tensors.items()}
        plan = make_plan(tensors, self.matrices, wanted, None, exact=self.exact)
        items = {path: [(i.shape, DTYPES[i.dtype]) for i in e.parts.values()] for path, e in plan.entries.items()}
        return self._drawn(plan.common.bits if plan.common else 16, items)

    def _drawn(self, bits: int, items: Mapping[str, Sequence[tuple[tuple[int, ...], mx.Dtype]]]) -> Footprint:
        weights = []
        for path, arrays in items.items():
            parts = tuple((prod(shape), dtype.size, dtype in FLOATS) for shape, dtype in arrays)
            weights.append(Weight(path, *self._kinds[path], parts, path in self.exact))
        return replace(self._outline, weights=tuple(weights), bits=bits)


def from_config(name: str, config: Mapping[str, Any]) -> Blueprint:
    """The model that a config.json describes, with weights in 16 bits, or packed as it says they are published.

    Raises:
        UnsupportedArchitecture, ConfigError: see ``registry.architecture``.
    """
    found = architecture(config)
    model = found.build()
    shapes = {
        path: array.shape for path, array in cast(dict[str, mx.array], dict(tree_flatten(model.parameters()))).items()
    }
    tensors: dict[str, Tensor] = {path: Unread(shape) for path, shape in shapes.items()}
    section = config.get("quantization_config")
    if isinstance(section, dict) and section.get("quant_method") == "mxfp4":
        stacks = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, ExpertLinear)}
        tensors |= {path: _mxfp4(path, shapes[path]) for path in stacks}
    return Blueprint(name, found.build, tensors)


def from_resolved(name: str, resolved: Resolved) -> Blueprint:
    """What a folder or a repository holds, exactly."""
    return Blueprint(name, resolved.architecture.build, resolved.parameters)


def _mxfp4(path: str, shape: tuple[int, ...]) -> Packed:
    settings = Quantization(4, 32, "mxfp4")
    parts: dict[str, Tensor] = {"weight": Unread(settings.packed_shape(shape), mx.uint32)}
    return Packed(path, parts | {"scales": Unread(settings.scales_shape(shape), mx.uint8)}, settings)


def _parts(tensor: Tensor) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    """Shapes and types of the arrays that a tensor consists of in memory."""
    stored = tensor.parts.values() if isinstance(tensor, Packed) else [tensor]
    return [(part.shape, part.dtype) for part in stored]


def _plain(tensor: Tensor) -> Tensor:
    return Unread(tensor.shape) if isinstance(tensor, Packed) else tensor


def _kind(path: str, modules: Mapping[str, nn.Module]) -> tuple[Kind, int | None]:
    owner = path.rpartition(".")[0]
    module, parts = modules.get(owner), path.split(".")
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
    if isinstance(module, ExpertLinear):
        return "experts", layer
    if isinstance(module, Embedding):
        return ("per-layer embeddings" if "per_layer" in owner else "embeddings"), layer
    if owner == "lm_head":
        return "head", layer
    if not isinstance(module, Matrix) or not module.quantizable:
        return "others", layer
    return ("attention" if "self_attn" in parts else "feed-forward" if layer is not None else "others"), layer


def _typical(model: CausalLM) -> list[int]:
    """A few layers of each kind, which stand for all."""
    seen: Counter[object] = Counter()
    found = []
    for index, layer in enumerate(cast(list[Any], model.layers)):
        shapes = tuple(array.shape for _, array in cast(list[Any], tree_flatten(layer.parameters())))
        kind = (getattr(layer.self_attn, "span", None), shapes)
        seen[kind] += 1
        found += [index] if seen[kind] <= SAMPLE else []
    return found


def _outline(name: str, model: CausalLM) -> Footprint:
    layers = cast(list[Any], model.layers)
    spans = [getattr(layer.self_attn, "span", None) for layer in layers]
    experts, tied, longest = tuple(map(_experts, layers)), "lm_head" not in model, model.context_length
    hidden = model.model.embed_tokens.weight.shape[1]
    traced = trace(model, 1)
    caches = tuple(_cache(span, cache) for span, cache in zip(spans, traced.caches, strict=True))
    return Footprint(name, 16, (), caches, experts, tied, longest, hidden, model.vocab_size)


def _experts(layer: nn.Module) -> Experts | None:
    stacks, router = _stacks(layer), next((m for m in layer.modules() if isinstance(m, Router)), None)
    if not stacks or router is None:
        return None
    (count, dim, width), chosen = stacks[0].down_proj.weight.shape, cast(Any, router).k
    return Experts(count, chosen, chosen * (2 * dim + 3 * width))  # in and out; gate, up, and what comes of both


def _stacks(module: nn.Module) -> list[Any]:
    """The modules below that hold experts."""
    return [m for m in module.modules() if isinstance(getattr(m, "down_proj", None), ExpertLinear)]


def _nothing(x: mx.array, chosen: mx.array) -> mx.array:
    """In place of experts' outputs, what takes no memory."""
    return mx.broadcast_to(x[..., None, :], (*chosen.shape, x.shape[-1]))


def _cache(span: object, cache: Any) -> LayerCache | None:
    if cache is None:
        return None
    vectors = tuple((array.shape[1], array.shape[-1]) for array in cache.arrays())
    match span:
        case Sliding(window):
            return LayerCache("sliding", vectors, window)
        case Chunked(size):
            return LayerCache("chunked", vectors, size)
        case Latent():
            return LayerCache("latent", vectors)
    return LayerCache("full", vectors)
