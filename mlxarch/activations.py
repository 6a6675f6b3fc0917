"""How much memory one step takes beyond the weights, read off the operations of which it consists.

A model without weights lists every operation of a step with the shapes that go in and come out
(``mx.export_function``). Walking the list as MLX does, with what each array needs and when it is let go of, gives the
peak; nothing is computed and nothing is held.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxarch.blocks import CausalLM, Quantization, Step
from mlxarch.blocks.head_linear import HeadLinear
from mlxarch.cache import Cache

# MLX prepares operations before the earlier ones have run, and what those read cannot be let go of until then. It waits
# when more than ten tasks of ten parts are under way. Up to nine parts may stand behind these, and the part that ends a
# task says so before it lets go of what it read. See ``_parts``.
PARTS_AHEAD = 110
MAPPED = 1 << 20  # bytes from which on an array has pages of its own, which come when it is written to: see ``limits``
# MLX gives these the memory of what they are made of
VIEWS = {
    "AsStrided",
    "Broadcast",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
}
VIEWS |= {"Transpose", "Unflatten", "View"}
# These cannot write over an input, even if nobody else needs it
KEEPING = {"AddMM", "ArgPartition", "ArgSort", "Concatenate", "Gather", "GatherAxis", "GatherMM", "GatherQMM"}
KEEPING |= {"Hadamard", "Matmul", "QuantizedMatmul", "Reduce", "ScaledDotProductAttention"}
WIDTH = 20  # operations side by side that MLX looks at (MLX_BFS_MAX_WIDTH)
MARK = "Depends"  # of ``blocks.pace``: all up to here is begun, and its second input waited for
Skip = Callable[[tuple[int, ...]], bool]


@dataclass
class _Memory:
    """Buffers: which arrays share one, and who still needs it."""

    size: dict[str, int] = field(default_factory=dict)
    of: dict[str, str] = field(default_factory=dict)  # array -> buffer
    arrays: Counter[str] = field(default_factory=Counter)  # buffer -> arrays that are not let go of
    pending: Counter[str] = field(default_factory=Counter)  # buffer -> operations that have yet to read it
    active: int = 0
    peak: int = 0

    def new(self, name: str, nbytes: int) -> None:
        self.of[name], self.size[name] = name, nbytes
        self.arrays[name] += 1
        self.active += nbytes
        self.peak = max(self.peak, self.active)

    def share(self, name: str, other: str) -> None:
        if buffer := self.of.get(other):
            self.of[name] = buffer
            self.arrays[buffer] += 1

    def alone(self, name: str) -> bool:
        """Whether nobody else needs the memory of an array."""
        buffer = self.of.get(name)
        return buffer is not None and self.arrays[buffer] == 1 and not self.pending[buffer]

    def forget(self, name: str) -> None:
        if buffer := self.of.pop(name, None):
            self.arrays[buffer] -= 1
            self.release(buffer)

    def release(self, buffer: str) -> None:
        if not self.arrays[buffer] and not self.pending[buffer]:
            self.active -= self.size.pop(buffer, 0)


class Peak(NamedTuple):
    """Bytes of a step: ``prepared`` as MLX counts them, ``touched`` what of it the process really has at a time."""

    prepared: int
    touched: int


class Operations(NamedTuple):
    """A list from ``mx.export_function``, made ready for ``peak_bytes``.

    Attributes:
        inputs: (name, shape, dtype) of the first ones.
        steps: in the order in which MLX runs them, but those that only view a constant.
        outputs: names.
        views: of constants, and of how many operations each consists.
    """

    inputs: list[tuple[str, Sequence[int], mx.Dtype]]
    steps: list[dict[str, Any]]
    outputs: list[str]
    views: dict[str, int]

    @classmethod
    def of(cls, items: Sequence[dict[str, Any]]) -> "Operations":
        """The items as the callback got them."""
        inputs, outputs, steps, views = [], [], [], dict[str, int]()
        for item in items:
            match item["type"]:
                case "inputs":
                    inputs += item["inputs"]
                case "outputs":
                    outputs = [name for name, *_ in item["outputs"]]
                case "constants":
                    views |= {name: 0 for name, _ in item["constants"]}
                case "primitive":
                    steps.append(item)
        return cls(inputs, in_order(_without_views(steps, views), outputs), outputs, views)


def peak_bytes(
    operations: Operations,
    ahead: int = PARTS_AHEAD,
    skip: Skip = lambda shape: False,
    sizes: tuple[int, int] = (0, 2**63),
) -> int:
    """The most that the arrays of a step take at once, its first inputs included. Constants are weights: nothing.

    Args:
        ahead: parts of operations that MLX prepares before the first of them has run.
        skip: shapes of arrays that another back end would not make.
        sizes: of arrays that count, in bytes.
    """

    def counted(shape: Sequence[int], dtype: mx.Dtype) -> int:
        nbytes = prod(shape) * dtype.size
        return 0 if skip(tuple(shape)) or not sizes[0] <= nbytes < sizes[1] else nbytes

    memory, (inputs, steps, outputs, views) = _Memory(), operations
    for name, shape, dtype in inputs:
        memory.new(name, counted(shape, dtype))
    scattered = dict[str, str]()  # views whose rows do not lie one behind the other -> product that would copy them
    uses = Counter(name for step in steps for name, *_ in step["inputs"]) + Counter(outputs)
    under_way: deque[tuple[int, set[str]]] = deque()  # parts that were prepared up to here, and buffers to be read
    begun, waited, parts = dict[str, int](), 0, 0  # marks and the parts up to them; parts that were waited for
    for step in steps:
        while under_way and under_way[0][0] <= max(parts - ahead, waited):
            for buffer in under_way.popleft()[1]:
                memory.pending[buffer] -= 1
                memory.release(buffer)
        read, made = [name for name, *_ in step["inputs"]], step["outputs"]
        taken = _taken_over(step, uses, memory)
        for name, shape, dtype in made:
            if taken is not None:
                memory.share(name, taken)
            else:
                memory.new(name, counted(shape, dtype))
        parts += _parts(step) + sum(views.get(name, 0) for name in read)
        for name, shape, dtype in step["inputs"]:
            if scattered.get(name) == step["name"]:
                memory.new(copy := f"{made[0][0]} of {name}", counted(shape, dtype))
                read, uses[copy], parts = [*read, copy], 1, parts + 1
        if step["name"] == "Broadcast" and step["inputs"]:
            scattered[made[0][0]] = "QuantizedMatmul"
        elif step["name"] == "Slice" and step["inputs"][0][1][-1] != made[0][1][-1]:
            scattered[made[0][0]] = "Matmul"
        written = {memory.of.get(name) for name, *_ in made}
        held = {buffer for name in read if (buffer := memory.of.get(name)) and buffer not in written}
        memory.pending.update(held)
        for name in read:
            uses[name] -= 1
            if not uses[name]:
                memory.forget(name)
        for name, *_ in made:
            if not uses[name]:
                memory.forget(name)
        under_way.append((parts, held))
        if step["name"] == MARK:
            begun[made[0][0]], waited = parts, begun.get(step["inputs"][1][0], parts)
    return memory.peak


def _parts(step: dict[str, Any]) -> int:
    """Into how many parts MLX takes an operation: what it does, and letting go of what it read."""
    match step["name"]:
        case "Concatenate":
            return len(step["inputs"]) + 1
        case "Hadamard" | "Pad":
            return 3
        case name:
            return 1 if name in VIEWS else 2


def _without_views(steps: Sequence[dict[str, Any]], views: dict[str, int]) -> list[dict[str, Any]]:
    """The operations but those that only view a constant, as a number for all elements or a transposed matrix.

    The list has each of these once, and MLX makes it anew wherever it is used. ``views`` tells of how many operations
    a view consists; at first it holds the constants.
    """
    rest = []
    for step in steps:
        read = [name for name, *_ in step["inputs"]]
        if step["name"] in VIEWS and read and all(name in views for name in read):
            views |= {name: 1 + sum(map(views.__getitem__, read)) for name, *_ in step["outputs"]}
        else:
            rest.append(step)
    return rest


def in_order(steps: Sequence[dict[str, Any]], outputs: Sequence[str]) -> list[dict[str, Any]]:
    """The operations in the order in which MLX runs them to have the ``outputs``.

    It goes from the outputs to the inputs, level by level while fewer than ``WIDTH`` operations wait there and else
    depth first, and runs them backwards. What bears a mark is evaluated before.
    """
    maker = {name: index for index, step in enumerate(steps) for name, *_ in step["outputs"]}
    needs = [[maker[name] for name, *_ in step["inputs"] if name in maker] for step in steps]
    order: list[int] = []
    for marked in [index for index, step in enumerate(steps) if step["name"] == MARK]:
        order += _one_evaluation([marked], needs, set(order))
    order += _one_evaluation([maker[name] for name in outputs if name in maker], needs, set(order))
    return [steps[index] for index in order]


def _one_evaluation(asked: Sequence[int], needs: Sequence[Sequence[int]], done: set[int]) -> list[int]:
    """The operations that are not done, in the order in which they run to have those that are ``asked``."""
    wanted, todo, seen = Counter[int](), [-1], set[int]()

    def below(index: int) -> Sequence[int]:
        return asked if index < 0 else needs[index]

    while todo:
        for index in below(todo.pop()):
            if index in done:
                continue
            wanted[index] += 1
            if index not in seen:
                seen.add(index)
                todo.append(index)
    order, later, at = [-1], list[tuple[int, int]](), 0
    while at < len(order) or later:
        if at < len(order):
            current, first, at = order[at], 0, at + 1
        else:
            current, first = later.pop()
        for place in range(first, len(below(current))):
            index = below(current)[place]
            if index in done:
                continue
            if len(order) - at >= WIDTH:
                later.append((current, place))
                break
            wanted[index] -= 1
            if not wanted[index]:
                order.append(index)
    return order[:0:-1]


def _taken_over(step: dict[str, Any], uses: Counter[str], memory: _Memory) -> str | None:
    """The input in whose memory the output lies: that of a view, or one that nobody else needs."""
    kind, inputs, outputs = step["name"], step["inputs"], step["outputs"]
    if not inputs:
        return None
    if kind in VIEWS:
        return inputs[0][0]
    candidates: Iterable[Any] = inputs[:1] if "Update" in kind else [] if kind in KEEPING else inputs
    for name, shape, dtype in candidates:
        fits = len(outputs) == 1 and prod(shape) * dtype.size == prod(outputs[0][1]) * outputs[0][2].size
        if fits and uses[name] == 1 and memory.alone(name):
            return name
    return None


def step_bytes(
    model: CausalLM,
    caches: Sequence[Cache | None],
    tokens: int,
    layers: Sequence[int],
    *,
    skip: Skip = lambda shape: False,
) -> Peak:
    """Bytes beyond the weights, and beyond what the ``caches`` hold, while ``tokens`` more pass through.

    Args:
        model: with ``stand_ins`` for its weights.
        caches: as ``fill`` leaves them; they are of no other use.
        layers: that stand for all of them, in their order.
        skip: see ``peak_bytes``.
    """
    chosen = [caches[index] for index in layers]
    held = [array for cache in chosen for _, array in _arrays(cache)]
    items: list[dict[str, Any]] = []

    def step(ids: mx.array, *arrays: mx.array) -> list[mx.array]:
        new = iter(arrays)
        for cache in chosen:
            _replace(cache, lambda _: next(new))
        _through(model, layers, ids, caches)
        return [array for cache in chosen for _, array in _arrays(cache)]

    mx.export_function(items.append, step, mx.zeros((1, tokens), mx.int32), *held)
    before = sum(array.nbytes for array in held)
    small, large = (0, MAPPED), (MAPPED, 2**63)
    listed = Operations.of(items)
    touched = peak_bytes(listed, skip=skip, sizes=small) + peak_bytes(listed, 0, skip, large)
    prepared = peak_bytes(listed, skip=skip)
    return Peak(prepared - before, min(touched, prepared) - before)


def _through(model: CausalLM, layers: Sequence[int], ids: mx.array, caches: Sequence[Cache | None]) -> mx.array:
    """The state behind some of the layers."""
    step = Step(ids.shape[1], caches)
    state = model.embed(ids, step)
    for index in layers:
        state = model.layers[index](state, step, caches[index])
    return state


def fill(model: CausalLM, caches: Sequence[Cache | None], tokens: int, layers: Sequence[int]) -> None:
    """Let ``caches`` hold ``tokens`` tokens, without the memory for them.

    Args:
        model: whose caches they are, with ``stand_ins`` for its weights.
        layers: that stand for all of them, the first among them; only their caches are filled.
    """
    if tokens < 1:
        return

    def first(ids: mx.array) -> mx.array:
        return _through(model, layers, ids, caches)

    # as a list of operations, for parts of attention would begin to compute
    mx.export_function(lambda item: None, first, mx.zeros((1, 1), mx.int32))
    for cache in caches:
        if cache is not None:
            _replace(cache, lambda array: stand_in(array.shape, array.dtype))
            cache.length = tokens


def stand_ins(module: nn.Module, dtype: mx.Dtype) -> None:
    """Arrays of the right shapes that take no memory, for all parameters."""
    module.update(tree_map(lambda array: stand_in(array.shape, dtype), module.parameters()))


def pack_heads(model: CausalLM, form: Quantization, dtype: mx.Dtype) -> None:
    """Let the matrices that each head has of its own be packed, in a model with ``stand_ins``."""
    for module in model.modules():
        if isinstance(module, HeadLinear) and module.weight.shape[-1] % form.group_size == 0:
            shape, module.quantization = module.weight.shape, form
            module.weight = stand_in(form.packed_shape(shape), mx.uint32)
            module.scales = module.biases = stand_in(form.scales_shape(shape), dtype)


def stand_in(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of which all elements are one in memory."""
    array = mx.broadcast_to(mx.zeros((), dtype), tuple(shape))
    mx.eval(array)
    return array


def _arrays(cache: Cache | None) -> list[tuple[str, mx.array]]:
    """Keys and values, however a cache holds them."""
    found = tree_flatten(dict(vars(cache))) if cache else []
    return [(name, array) for name, array in found if isinstance(array, mx.array) and array.ndim == 4]


def _replace(cache: Cache | None, new: Callable[[mx.array], mx.array]) -> None:
    if cache is not None:
        is_held = lambda value: isinstance(value, mx.array) and value.ndim == 4  # noqa: E731
        vars(cache).update(tree_map(lambda value: new(value) if is_held(value) else value, dict(vars(cache))))
