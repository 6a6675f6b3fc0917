"""Simulate MLX's memory use over a list of operations, to predict its peak without computing.

``mx.export_function`` lists every operation with the shapes that go in and come out. The simulation
runs through the list in MLX's order and tracks which buffers exist: an array is allocated when its
operation is dispatched, and freed when nothing needs it any more.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx

# MLX allocates the outputs of operations before the earlier ones have run, and cannot free their
# inputs until then. It waits when more than ten tasks of ten dispatches are under way. Up to nine
# more dispatches may be queued behind these, and the dispatch that ends a task reports that before
# it frees its inputs. See ``_dispatch_count``.
DISPATCHES_AHEAD = 110
# Operations whose output shares the buffer of the first input
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
    "Transpose",
    "Unflatten",
    "View",
}
# Operations that never write their output into the buffer of an input
NEVER_IN_PLACE = {
    "AddMM",
    "ArgPartition",
    "ArgSort",
    "Concatenate",
    "Gather",
    "GatherAxis",
    "GatherMM",
    "GatherQMM",
    "Hadamard",
    "Matmul",
    "QuantizedMatmul",
    "Reduce",
    "ScaledDotProductAttention",
}
BFS_MAX_WIDTH = 20  # operations that MLX sorts breadth-first (MLX_BFS_MAX_WIDTH)
# Marks an evaluation of ``blocks.attention.bounded_eval``: everything up to here is dispatched, and
# the second input is waited for
EVALUATION = "Depends"

Operation = dict[str, Any]  # as ``mx.export_function`` reports it
ShapeFilter = Callable[[tuple[int, ...]], bool]


class OperationList(NamedTuple):
    """Operations of a step, prepared for ``peak_bytes``.

    Attributes:
        inputs: (name, shape, dtype) of the first inputs.
        operations: operations in the order in which MLX runs them, without views of constants.
        outputs: names of the outputs.
        constant_views: number of operations that make up each view of a constant.
    """

    inputs: list[tuple[str, Sequence[int], mx.Dtype]]
    operations: list[Operation]
    outputs: list[str]
    constant_views: dict[str, int]

    @classmethod
    def from_export(cls, items: Sequence[dict[str, Any]]) -> "OperationList":
        """Build the list from the items that ``mx.export_function`` passed to its callback."""
        inputs = []
        outputs = []
        operations = []
        views = dict[str, int]()
        for item in items:
            match item["type"]:
                case "inputs":
                    inputs += item["inputs"]
                case "outputs":
                    outputs = [name for name, *_ in item["outputs"]]
                case "constants":
                    views |= {name: 0 for name, _ in item["constants"]}
                case "primitive":
                    operations.append(item)
        operations = _remove_constant_views(operations, views)
        return cls(inputs, execution_order(operations, outputs), outputs, views)


def peak_bytes(
    operations: OperationList,
    ahead: int = DISPATCHES_AHEAD,
    skip: ShapeFilter = lambda shape: False,
    sizes: tuple[int, int] = (0, 2**63),
) -> int:
    """Peak bytes of all arrays of a step, including its first inputs, without constants (weights).

    Args:
        ahead: dispatches that MLX prepares before the first of them has run.
        skip: whether arrays of a shape do not count, because another backend never creates them.
        sizes: smallest and largest (exclusive) size in bytes of the arrays that count.
    """

    def array_bytes(shape: Sequence[int], dtype: mx.Dtype) -> int:
        nbytes = prod(shape) * dtype.size
        return 0 if skip(tuple(shape)) or not sizes[0] <= nbytes < sizes[1] else nbytes

    return _Simulation(operations, ahead, array_bytes).run()


@dataclass
class _Buffers:
    """Allocated buffers, the arrays that share them, and the operations that still read them."""

    size: dict[str, int] = field(default_factory=dict)
    buffer_of: dict[str, str] = field(default_factory=dict)  # array -> buffer
    references: Counter[str] = field(default_factory=Counter)  # buffer -> arrays in use
    pending_reads: Counter[str] = field(default_factory=Counter)  # buffer -> operations to read it
    active: int = 0
    peak: int = 0

    def allocate(self, name: str, nbytes: int) -> None:
        self.buffer_of[name] = name
        self.size[name] = nbytes
        self.references[name] += 1
        self.active += nbytes
        self.peak = max(self.peak, self.active)

    def share(self, name: str, other: str) -> None:
        """Let an array use the buffer of another."""
        if buffer := self.buffer_of.get(other):
            self.buffer_of[name] = buffer
            self.references[buffer] += 1

    def is_exclusive(self, name: str) -> bool:
        """Whether nothing else needs the buffer of an array."""
        buffer = self.buffer_of.get(name)
        if buffer is None:
            return False
        return self.references[buffer] == 1 and not self.pending_reads[buffer]

    def drop(self, name: str) -> None:
        """Drop an array, and free its buffer if nothing else needs it."""
        if buffer := self.buffer_of.pop(name, None):
            self.references[buffer] -= 1
            self._free_if_unused(buffer)

    def finish_read(self, buffer: str) -> None:
        """Note that an operation has read a buffer, and free it if nothing else needs it."""
        self.pending_reads[buffer] -= 1
        self._free_if_unused(buffer)

    def _free_if_unused(self, buffer: str) -> None:
        if not self.references[buffer] and not self.pending_reads[buffer]:
            self.active -= self.size.pop(buffer, 0)


class _Simulation:
    """Dispatch of the operations of a step, one after the other."""

    def __init__(
        self,
        listed: OperationList,
        ahead: int,
        array_bytes: Callable[[Sequence[int], mx.Dtype], int],
    ) -> None:
        self.operations = listed.operations
        self.constant_views = listed.constant_views
        self.ahead = ahead
        self.array_bytes = array_bytes
        self.buffers = _Buffers()
        for name, shape, dtype in listed.inputs:
            self.buffers.allocate(name, array_bytes(shape, dtype))
        # how often each array is still to be read
        self.uses = Counter(
            name for operation in self.operations for name, *_ in operation["inputs"]
        )
        self.uses += Counter(listed.outputs)
        # views with rows that are not contiguous -> the kind of product that copies them
        self.strided: dict[str, str] = {}
        self.dispatches = 0
        # (dispatches up to and including an operation, buffers that it reads), not finished yet
        self.under_way: deque[tuple[int, set[str]]] = deque()
        self.evaluations: dict[str, int] = {}  # output of an evaluation -> dispatches up to it
        self.waited_for = 0  # dispatches that have certainly finished

    def run(self) -> int:
        """Return the peak in bytes."""
        for operation in self.operations:
            self._finish_earlier()
            read = [name for name, *_ in operation["inputs"]]
            self._allocate_outputs(operation)
            self.dispatches += _dispatch_count(operation)
            self.dispatches += sum(self.constant_views.get(name, 0) for name in read)
            read += self._copy_strided_inputs(operation)
            self._note_strided_output(operation)
            self._drop_unused(operation, read)
            if operation["name"] == EVALUATION:
                awaited = operation["inputs"][1][0]
                self.waited_for = self.evaluations.get(awaited, self.dispatches)
                self.evaluations[operation["outputs"][0][0]] = self.dispatches
        return self.buffers.peak

    def _finish_earlier(self) -> None:
        """Finish the operations that MLX has waited for before it dispatches another."""
        finished = max(self.dispatches - self.ahead, self.waited_for)
        while self.under_way and self.under_way[0][0] <= finished:
            for buffer in self.under_way.popleft()[1]:
                self.buffers.finish_read(buffer)

    def _allocate_outputs(self, operation: Operation) -> None:
        reused = _reused_input(operation, self.uses, self.buffers)
        for name, shape, dtype in operation["outputs"]:
            if reused is not None:
                self.buffers.share(name, reused)
            else:
                self.buffers.allocate(name, self.array_bytes(shape, dtype))

    def _copy_strided_inputs(self, operation: Operation) -> list[str]:
        """Copy the inputs that the operation needs contiguous; return the names of the copies."""
        copies = []
        for name, shape, dtype in operation["inputs"]:
            if self.strided.get(name) == operation["name"]:
                copy = f"{operation['outputs'][0][0]} of {name}"
                self.buffers.allocate(copy, self.array_bytes(shape, dtype))
                copies.append(copy)
                self.uses[copy] = 1
                self.dispatches += 1
        return copies

    def _note_strided_output(self, operation: Operation) -> None:
        inputs = operation["inputs"]
        name, shape, *_ = operation["outputs"][0]
        if operation["name"] == "Broadcast" and inputs:
            self.strided[name] = "QuantizedMatmul"
        elif operation["name"] == "Slice" and inputs[0][1][-1] != shape[-1]:
            self.strided[name] = "Matmul"

    def _drop_unused(self, operation: Operation, read: list[str]) -> None:
        """Drop the arrays that no later operation reads; their buffers wait for this one to run."""
        buffer_of = self.buffers.buffer_of
        outputs = [name for name, *_ in operation["outputs"]]
        written = {buffer_of.get(name) for name in outputs}
        held = {
            buffer for name in read if (buffer := buffer_of.get(name)) and buffer not in written
        }
        self.buffers.pending_reads.update(held)
        for name in read:
            self.uses[name] -= 1
            if not self.uses[name]:
                self.buffers.drop(name)
        for name in outputs:
            if not self.uses[name]:
                self.buffers.drop(name)
        self.under_way.append((self.dispatches, held))


def _dispatch_count(operation: Operation) -> int:
    """Dispatches of an operation: its work, and freeing its inputs."""
    match operation["name"]:
        case "Concatenate":
            return len(operation["inputs"]) + 1
        case "Hadamard" | "Pad":
            return 3
        case name:
            return 1 if name in VIEWS else 2


def _reused_input(operation: Operation, uses: Counter[str], buffers: _Buffers) -> str | None:
    """Input whose buffer the output uses: that of a view, or one that nothing else needs."""
    kind = operation["name"]
    inputs = operation["inputs"]
    outputs = operation["outputs"]
    if not inputs:
        return None
    if kind in VIEWS:
        return inputs[0][0]
    candidates: Iterable[Any] = inputs
    if "Update" in kind:
        candidates = inputs[:1]
    elif kind in NEVER_IN_PLACE:
        candidates = []
    for name, shape, dtype in candidates:
        same_size = (
            len(outputs) == 1
            and prod(shape) * dtype.size == prod(outputs[0][1]) * outputs[0][2].size
        )
        if same_size and uses[name] == 1 and buffers.is_exclusive(name):
            return name
    return None


# Order of execution ------------------------------------------------------------------------------


def _remove_constant_views(
    operations: Sequence[Operation], views: dict[str, int]
) -> list[Operation]:
    """Remove operations that only view a constant, such as a transposed weight.

    They are listed once, but MLX repeats them wherever their output is used.

    Args:
        views: the constants, each with 0; the views are added, each with its number of operations.
    """
    rest = []
    for operation in operations:
        read = [name for name, *_ in operation["inputs"]]
        if operation["name"] in VIEWS and read and all(name in views for name in read):
            count = 1 + sum(views[name] for name in read)
            views |= {name: count for name, *_ in operation["outputs"]}
        else:
            rest.append(operation)
    return rest


def execution_order(operations: Sequence[Operation], outputs: Sequence[str]) -> list[Operation]:
    """Operations in the order in which MLX runs them to compute the ``outputs``.

    MLX traverses the graph from the outputs to the inputs, breadth-first while fewer than
    ``BFS_MAX_WIDTH`` operations wait and depth-first otherwise, and runs them in reverse. What is
    marked as an evaluation is computed first.
    """
    producer = {
        name: index
        for index, operation in enumerate(operations)
        for name, *_ in operation["outputs"]
    }
    dependencies = [
        [producer[name] for name, *_ in operation["inputs"] if name in producer]
        for operation in operations
    ]
    evaluations = [
        index for index, operation in enumerate(operations) if operation["name"] == EVALUATION
    ]
    order: list[int] = []
    for index in evaluations:
        order += _evaluation_order([index], dependencies, set(order))
    targets = [producer[name] for name in outputs if name in producer]
    order += _evaluation_order(targets, dependencies, set(order))
    return [operations[index] for index in order]


def _evaluation_order(
    targets: Sequence[int], dependencies: Sequence[Sequence[int]], done: set[int]
) -> list[int]:
    """Indices of the operations to run for the ``targets``, in order, except those done."""

    def dependencies_of(index: int) -> Sequence[int]:
        return targets if index < 0 else dependencies[index]

    # how many operations still need each
    dependents = Counter[int]()
    seen = set[int]()
    stack = [-1]
    while stack:
        for index in dependencies_of(stack.pop()):
            if index in done:
                continue
            dependents[index] += 1
            if index not in seen:
                seen.add(index)
                stack.append(index)

    order = [-1]
    position = 0
    postponed: list[tuple[int, int]] = []  # operation, and the first dependency not yet visited
    while position < len(order) or postponed:
        if position < len(order):
            current = order[position]
            first = 0
            position += 1
        else:
            current, first = postponed.pop()
        for n in range(first, len(dependencies_of(current))):
            index = dependencies_of(current)[n]
            if index in done:
                continue
            if len(order) - position >= BFS_MAX_WIDTH:
                postponed.append((current, n))
                break
            dependents[index] -= 1
            if not dependents[index]:
                order.append(index)
    return order[:0:-1]
