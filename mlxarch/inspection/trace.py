"""Trace one token through a model without weights to find the order of each layer's submodules.

MLX is lazy and the arrays are never evaluated, so tracing costs neither memory nor time. A module
whose input is the very array that another module returned follows that module; any other input
means that something was added in between, usually a residual connection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import Cache, CausalLM, ExpertLinear, Router
from mlxarch.blocks.layer import token_mixer
from mlxarch.blocks.linear import Matrix
from mlxarch.blocks.recurrent.state_layer import StateLayer

SubmoduleKind = Literal["norm", "attention", "recurrence", "feed-forward", "other"]


@dataclass(frozen=True)
class FeedForwardShape:
    """Activation and sizes of the feed-forward network of a layer.

    Attributes:
        activation: name of the function between the matrices, for example "swiglu"; empty for a
            layer without feed-forward network.
        intermediate_size: features between the matrices; of one expert in an MoE layer.
        num_experts: experts of the layer; 0 in a dense layer.
        experts_per_token: experts that the router chooses for each token; 0 in a dense layer.
        shared_intermediate_size: intermediate size of the dense networks that see every token
            beside the routed experts, such as shared experts.
    """

    activation: str
    intermediate_size: int
    num_experts: int = 0
    experts_per_token: int = 0
    shared_intermediate_size: int = 0


NO_FEED_FORWARD = FeedForwardShape("", 0)


@dataclass(frozen=True)
class Submodule:
    """A module that a layer calls.

    Attributes:
        name: attribute name in the layer.
        kind: role of the module.
        num_experts: experts in it; 0 without experts.
        intermediate_size: width of a feed-forward network, of one expert in an MoE; 0 otherwise.
        label: kind of a recurrent layer; empty for other modules.
    """

    name: str
    kind: SubmoduleKind
    num_experts: int = 0
    intermediate_size: int = 0
    label: str = ""


Stage = tuple[Submodule, ...]  # modules in parallel, which take the same input
Branch = tuple[Stage, ...]  # one residual branch: from the residual stream until it is added back


@dataclass(frozen=True)
class Block:
    """A kind of layer.

    Attributes:
        branches: residual branches in execution order.
        feed_forward: its feed-forward network.
        layers: indices of the layers of this kind.
    """

    branches: tuple[Branch, ...]
    feed_forward: FeedForwardShape
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """Result of ``trace``.

    Attributes:
        blocks: the kinds of layers, the most frequent first.
        caches: KV cache of each layer after one token, unevaluated; None for a layer without a
            cache of its own.
    """

    blocks: tuple[Block, ...]
    caches: list[Cache | None]


@dataclass(frozen=True)
class _ModuleCall:
    """One call of a module. Holding input and output keeps their identities comparable."""

    name: str
    input: Any
    output: Any


def trace(model: CausalLM, capacity: int) -> Trace:
    """Run one token through a model without weights.

    It replaces the classes of the submodules, so the model cannot be used for anything else
    afterwards.

    Args:
        model: model without weights.
        capacity: tokens that the KV caches are allocated for.
    """
    calls = [_record_calls(layer) for layer in _layers(model)]
    caches = model.make_caches(capacity)
    model.hidden_state(mx.zeros((1, 1), mx.int32), caches)
    layers_by_structure: dict[tuple[tuple[Branch, ...], FeedForwardShape], list[int]] = {}
    for index, layer in enumerate(_layers(model)):
        key = (_group_into_branches(layer, calls[index]), _feed_forward_shape(layer))
        layers_by_structure.setdefault(key, []).append(index)
    blocks = [
        Block(branches, feed_forward, tuple(layers))
        for (branches, feed_forward), layers in layers_by_structure.items()
    ]
    blocks.sort(key=lambda block: (-len(block.layers), not block.feed_forward.num_experts))
    return Trace(tuple(blocks), caches)


def _layers(model: CausalLM) -> Sequence[nn.Module]:
    return cast(Sequence[nn.Module], model.layers)


def _record_calls(layer: nn.Module) -> list[_ModuleCall]:
    """Return a list to which every later call of a submodule of the layer is appended."""
    calls: list[_ModuleCall] = []
    for name, child in layer.children().items():
        if isinstance(child, nn.Module):
            child.__class__ = _recording_subclass(type(child), name, calls)
    return calls


def _recording_subclass(module_class: type, name: str, calls: list[_ModuleCall]) -> type:
    def call(self: Any, x: Any, *arguments: Any, **named: Any) -> Any:
        output = module_class.__call__(self, x, *arguments, **named)
        calls.append(_ModuleCall(name, x, output))
        return output

    return type(module_class.__name__, (module_class,), {"__call__": call})


def _group_into_branches(layer: nn.Module, calls: Sequence[_ModuleCall]) -> tuple[Branch, ...]:
    """Group the calls into residual branches of stages.

    A call whose input is the output of an earlier call goes into the stage after it. Any other
    input was computed in between, so a new branch begins. There are two exceptions: a norm
    continues a branch that ends in several parallel modules, because its input is their sum; and
    modules of the kind "other" share one branch.
    """
    submodules = {name: _describe_submodule(layer, name) for name in layer.children()}
    branches: list[list[list[_ModuleCall]]] = []
    for call in calls:
        if _append_to_producer(branches, call):
            continue
        kind = submodules[call.name].kind
        last_stage = branches[-1][-1] if branches else []
        if kind == "norm":
            continues = len(last_stage) > 1
        else:
            continues = (
                kind == "other"
                and bool(last_stage)
                and submodules[last_stage[0].name].kind == "other"
            )
        if continues:
            branches[-1].append([call])
        else:
            branches.append([[call]])
    return tuple(
        tuple(tuple(submodules[call.name] for call in stage) for stage in branch)
        for branch in branches
    )


def _append_to_producer(branches: list[list[list[_ModuleCall]]], call: _ModuleCall) -> bool:
    """Add the call to the stage after its input's; return False if there is no such stage."""
    for branch in reversed(branches):
        for index, stage in enumerate(branch):
            if any(earlier.output is call.input for earlier in stage):
                if index + 1 < len(branch):
                    branch[index + 1].append(call)
                else:
                    branch.append([call])
                return True
    return False


def _describe_submodule(layer: nn.Module, name: str) -> Submodule:
    module = layer[name]
    if "norm" in type(module).__name__.lower():
        return Submodule(name, "norm")
    if module is token_mixer(layer):
        if isinstance(module, StateLayer):
            return Submodule(name, "recurrence", label=module.kind)
        return Submodule(name, "attention")
    projections = _down_projections(module) if isinstance(module, nn.Module) else []
    if not projections:
        return Submodule(name, "other")
    stacks = [matrix for matrix in projections if isinstance(matrix, ExpertLinear)]
    num_experts = stacks[0].weight.shape[0] if stacks else 0
    return Submodule(
        name, "feed-forward", num_experts, max(map(_input_features, stacks or projections))
    )


def _down_projections(module: nn.Module) -> list[Matrix]:
    """Return the down projections of all feed-forward networks in ``module``."""
    named = [
        m for path, m in module.named_modules() if path.split(".")[-1] in ("down_proj", "c_proj")
    ]
    return [matrix for matrix in named if isinstance(matrix, Matrix)]


def _input_features(matrix: Matrix) -> int:
    return matrix.weight.shape[-1]


def _feed_forward_shape(layer: nn.Module) -> FeedForwardShape:
    networks: list[nn.Module] = [
        layer[name]
        for name in layer.children()
        if _describe_submodule(layer, name).kind == "feed-forward"
    ]
    if not networks:
        return NO_FEED_FORWARD
    modules = [module for network in networks for module in network.modules()]
    projections = [matrix for network in networks for matrix in _down_projections(network)]
    activation = _activation_name(modules)
    stack = next((matrix for matrix in projections if isinstance(matrix, ExpertLinear)), None)
    if stack is None:
        return FeedForwardShape(activation, max(map(_input_features, projections)))
    router = cast(Any, next(module for module in layer.modules() if isinstance(module, Router)))
    return FeedForwardShape(
        activation,
        _input_features(stack),
        stack.weight.shape[0],
        router.k,
        sum(_input_features(matrix) for matrix in projections if matrix is not stack),
    )


def _activation_name(modules: Sequence[nn.Module]) -> str:
    functions = (vars(module).get("activation") for module in modules)
    activation = next(filter(callable, functions), None)
    if activation is None:
        return "gelu"
    return getattr(activation, "__qualname__", type(activation).__name__).split(".")[0]
