"""Activation memory of one step, predicted from its operations; nothing is computed or allocated.

A model with stand-ins for its weights is exported as a list of operations, whose peak memory is
simulated: see ``peak_memory``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxarch.blocks import CausalLM, ForwardContext
from mlxarch.blocks.per_head_linear import PerHeadLinear
from mlxarch.cpu_kernels import native
from mlxarch.kv_cache import Cache
from mlxarch.planner.peak_memory import OperationList, ShapeFilter, peak_bytes
from mlxarch.quantization.scheme import Quantization

# Arrays of at least so many bytes have memory pages of their own, which the system provides when
# they are written to: see ``mlx_limits``
MMAP_THRESHOLD = 1 << 20


class Peak(NamedTuple):
    """Peak bytes of a step.

    Attributes:
        allocated: bytes as MLX counts them.
        touched: bytes of memory pages that the process really has at a time.
    """

    allocated: int
    touched: int


def step_peak(
    model: CausalLM,
    caches: Sequence[Cache | None],
    tokens: int,
    layers: Sequence[int],
    *,
    skip: ShapeFilter = lambda shape: False,
) -> Peak:
    """Peak bytes beyond weights and KV caches while ``tokens`` more tokens pass through the model.

    Args:
        model: model with ``use_stand_ins`` applied.
        caches: caches after ``fill_caches``; they cannot be used afterwards.
        layers: indices of the layers to run, in order, as a sample of all layers.
        skip: see ``peak_bytes``.
    """
    sampled = [caches[index] for index in layers]
    held = [array for cache in sampled for array in _cached_arrays(cache)]
    items: list[dict[str, Any]] = []

    def step(ids: mx.array, *arrays: mx.array) -> list[mx.array]:
        inputs = iter(arrays)
        for cache in sampled:
            _replace_cached_arrays(cache, lambda _: next(inputs))
        _run_layers(model, layers, ids, caches)
        return [array for cache in sampled for array in _cached_arrays(cache)]

    with native.suspended():
        mx.export_function(items.append, step, mx.zeros((1, tokens), mx.int32), *held)
    operations = OperationList.from_export(items)
    allocated = peak_bytes(operations, skip=skip)
    # pages of a large array are touched only once its operation runs
    small = peak_bytes(operations, skip=skip, sizes=(0, MMAP_THRESHOLD))
    large = peak_bytes(operations, ahead=0, skip=skip, sizes=(MMAP_THRESHOLD, 2**63))
    before = sum(array.nbytes for array in held)
    return Peak(allocated - before, min(small + large, allocated) - before)


def _run_layers(
    model: CausalLM, layers: Sequence[int], ids: mx.array, caches: Sequence[Cache | None]
) -> mx.array:
    """Run the embedding and some of the layers, and return the hidden state."""
    context = ForwardContext(ids.shape[1], caches)
    state = model.embed(ids, context)
    for index in layers:
        state = model.layers[index](state, context, caches[index])
    return state


def fill_caches(
    model: CausalLM, caches: Sequence[Cache | None], tokens: int, layers: Sequence[int]
) -> None:
    """Make KV caches hold ``tokens`` tokens without allocating memory for them.

    Args:
        model: model of the caches, with ``use_stand_ins`` applied.
        layers: indices of the layers whose caches are filled; the first layer must be among them.
    """
    if tokens < 1:
        return

    def first_step(ids: mx.array) -> mx.array:
        return _run_layers(model, layers, ids, caches)

    # exported and not called, because attention evaluates some of its arrays at once
    with native.suspended():
        mx.export_function(lambda item: None, first_step, mx.zeros((1, 1), mx.int32))
    for cache in caches:
        if cache is not None:
            _replace_cached_arrays(cache, lambda array: stand_in(array.shape, array.dtype))
            cache.length = tokens


def use_stand_ins(module: nn.Module, dtype: mx.Dtype) -> None:
    """Replace all parameters by stand-ins of ``dtype``, which take no memory; integers stay such."""

    def replaced(array: mx.array) -> mx.array:
        is_float = mx.issubdtype(array.dtype, mx.floating)
        return stand_in(array.shape, dtype if is_float else array.dtype)

    module.update(tree_map(replaced, module.parameters()))


def quantize_per_head_stand_ins(
    model: CausalLM, quantization: Quantization, dtype: mx.Dtype
) -> None:
    """Give per-head matrices the stand-ins of quantized weights, in a model with stand-ins."""
    for module in model.modules():
        if not isinstance(module, PerHeadLinear):
            continue
        shape = module.weight.shape
        if shape[-1] % quantization.group_size == 0:
            module.quantization = quantization
            module.weight = stand_in(quantization.packed_shape(shape), mx.uint32)
            module.scales = module.biases = stand_in(quantization.scales_shape(shape), dtype)


def stand_in(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """Return an evaluated array whose elements all share one place in memory."""
    array = mx.broadcast_to(mx.zeros((), dtype), tuple(shape))
    mx.eval(array)
    return array


def _is_cached_array(value: object) -> bool:
    return isinstance(value, mx.array) and value.ndim > 2


def _cached_arrays(cache: Cache | None) -> list[mx.array]:
    """Arrays of keys and values, whatever attributes of the cache hold them."""
    parts = cache.parts if cache else ()
    found = [pair for part in parts for pair in tree_flatten(dict(vars(part)))]
    return [array for _, array in found if isinstance(array, mx.array) and array.ndim > 2]


def _replace_cached_arrays(cache: Cache | None, new: Callable[[mx.array], mx.array]) -> None:
    for part in cache.parts if cache else ():
        vars(part).update(
            tree_map(
                lambda value: new(value) if _is_cached_array(value) else value, dict(vars(part))
            )
        )
