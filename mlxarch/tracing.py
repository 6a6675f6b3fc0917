"""What a layer is made of and in which order it uses it, seen by sending one token through a model without weights.

The arrays of such a model are never evaluated, so this takes neither memory nor time. Where a module takes the very
array that another one gave, it stands behind it; where it takes another, something was added in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Cache, CausalLM, ExpertLinear, Layer, Router
from mlxarch.blocks.linear import Matrix

Kind = Literal["norm", "attention", "feed-forward", "other"]


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward of a layer.

    Attributes:
        gate: name of what stands between the matrices, "swiglu" for example.
        width: features between them, of one expert where there are experts.
        experts, chosen: in a layer, and for a token; 0 in a dense layer.
        beside: width of what sees every token beside the experts: shared experts, a dense part.
    """

    gate: str
    width: int
    experts: int = 0
    chosen: int = 0
    beside: int = 0


@dataclass(frozen=True)
class Part:
    """A module that a layer uses.

    Attributes:
        name: that it has there.
        experts: in it; 0 where it has none.
        width: of a feed-forward, of one expert where there are experts; else 0.
    """

    name: str
    kind: Kind
    experts: int = 0
    width: int = 0


Stage = tuple[Part, ...]  # modules side by side, which take the same input
Branch = tuple[Stage, ...]  # from where it leaves the residual stream to where it is added to it


@dataclass(frozen=True)
class Block:
    """Layers that are built alike: ``branches`` in the order of use, and the indices of the ``layers``."""

    branches: tuple[Branch, ...]
    feed_forward: FeedForward
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """``blocks``: the kinds of layers, the most frequent first; ``caches``: as one token leaves them, unevaluated."""

    blocks: tuple[Block, ...]
    caches: list[Cache | None]


@dataclass(frozen=True)
class _Call:
    """One use of a module; the arrays are held, so that their identity means something."""

    name: str
    taken: Any
    given: Any


def trace(model: CausalLM, capacity: int) -> Trace:
    """Send a token through a ``model`` that has no weights. The model is of no other use afterwards.

    Args:
        capacity: tokens that the caches are allocated for.
    """
    calls = [_watch(layer) for layer in _modules(model)]
    caches = model.make_caches(capacity)
    model.states(mx.zeros((1, 1), mx.int32), caches)
    kinds: dict[tuple[tuple[Branch, ...], FeedForward], list[int]] = {}
    for index, layer in enumerate(_modules(model)):
        kinds.setdefault((_branches(layer, calls[index]), _feed_forward_of(layer)), []).append(index)
    blocks = [Block(branches, feed, tuple(layers)) for (branches, feed), layers in kinds.items()]
    blocks.sort(key=lambda block: (-len(block.layers), not block.feed_forward.experts))
    return Trace(tuple(blocks), caches)


def _modules(model: CausalLM) -> Sequence[nn.Module]:
    return cast(Sequence[nn.Module], model.layers)


def _watch(layer: nn.Module) -> list[_Call]:
    """A list that will grow with every call of one of the layer's modules."""
    calls: list[_Call] = []
    for name, child in layer.children().items():
        if isinstance(child, nn.Module):
            child.__class__ = _watched(type(child), name, calls)
    return calls


def _watched(kind: type, name: str, calls: list[_Call]) -> type:
    def call(self: Any, x: Any, *arguments: Any, **named: Any) -> Any:
        given = kind.__call__(self, x, *arguments, **named)
        calls.append(_Call(name, x, given))
        return given

    return type(kind.__name__, (kind,), {"__call__": call})


def _branches(layer: nn.Module, calls: Sequence[_Call]) -> tuple[Branch, ...]:
    """The calls as branches of stages.

    A call stands behind the one that gave what it takes. Where something has been computed in between, a new branch
    begins; but a norm goes on with the branch before it where that ends in several modules, whose sum it takes.
    """
    parts = {name: _part(layer, name) for name in layer.children()}
    found: list[list[list[_Call]]] = []
    for call in calls:
        for branch in reversed(found):
            at = next((n for n, stage in enumerate(branch) if any(c.given is call.taken for c in stage)), None)
            if at is not None:
                branch[at + 1 : at + 2] = [[*(branch[at + 1] if at + 1 < len(branch) else []), call]]
                break
        else:
            kind, last = parts[call.name].kind, found[-1][-1] if found else []
            joins = len(last) > 1 if kind == "norm" else kind == "other" and parts[last[0].name].kind == "other"
            if joins:
                found[-1].append([call])
            else:
                found.append([[call]])
    return tuple(tuple(tuple(parts[call.name] for call in stage) for stage in branch) for branch in found)


def _part(layer: nn.Module, name: str) -> Part:
    module = layer[name]
    if "norm" in type(module).__name__.lower():
        return Part(name, "norm")
    if module is cast(Layer, layer).self_attn:
        return Part(name, "attention")
    last = _last_matrices(module) if isinstance(module, nn.Module) else []
    if not last:
        return Part(name, "other")
    stacks = [matrix for matrix in last if isinstance(matrix, ExpertLinear)]
    experts = stacks[0].weight.shape[0] if stacks else 0
    return Part(name, "feed-forward", experts, max(map(_inputs, stacks or last)))


def _last_matrices(module: nn.Module) -> list[Matrix]:
    """Those that lead out of the feed-forwards below ``module``."""
    named = [m for path, m in module.named_modules() if path.split(".")[-1] in ("down_proj", "c_proj")]
    return [matrix for matrix in named if isinstance(matrix, Matrix)]


def _inputs(matrix: Matrix) -> int:
    return matrix.weight.shape[-1]


def _feed_forward_of(layer: nn.Module) -> FeedForward:
    modules: list[nn.Module] = [layer[name] for name in layer.children() if _part(layer, name).kind == "feed-forward"]
    inner = [part for module in modules for part in module.modules()]
    last = [matrix for module in modules for matrix in _last_matrices(module)]
    gate = next((gate for part in inner if callable(gate := vars(part).get("gate"))), None)
    name = getattr(gate, "__qualname__", type(gate).__name__).split(".")[0] if gate else "gelu"
    stack = next((matrix for matrix in last if isinstance(matrix, ExpertLinear)), None)
    if stack is None:
        return FeedForward(name, max(map(_inputs, last)))
    router = cast(Any, next(part for part in inner if isinstance(part, Router)))
    beside = sum(_inputs(matrix) for matrix in last if matrix is not stack)
    return FeedForward(name, _inputs(stack), stack.weight.shape[0], router.k, beside)
