"""Application of weight-mapping rules: from published tensors to parameters.

The rules of an architecture are in the ``WEIGHTS`` table of its file in ``models/``.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import assert_never

import numpy as np

from mlxarch.blocks import DecoderConfig
from mlxarch.blocks.weight_mapping import (
    AddModelPrefix,
    Flatten,
    Ignore,
    IgnoreExtraLayers,
    IgnoreFrom,
    Join,
    Rename,
    Rule,
    SplitHeads,
    SplitRows,
    SplitSizes,
    Stack,
    SubtractOne,
    Transpose,
    TransposeTo,
)
from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.tensor_views import (
    Concatenated,
    Flattened,
    Reshaped,
    SelectedRows,
    Shifted,
    Stacked,
    Transposed,
)
from mlxarch.errors import CheckpointError


def apply_rule(
    rule: Rule,
    tensors: dict[str, LazyTensor],
    config: DecoderConfig,
    ignored: dict[str, str],
    carried: set[str],
) -> dict[str, LazyTensor]:
    """Apply one rule to the tensors.

    Tensors that it leaves out are added to ``ignored`` with their purpose, and to ``carried`` if
    they are kept.
    """
    match rule:
        case Rename(pattern, to):
            return {re.sub(pattern, to, name): tensor for name, tensor in tensors.items()}
        case AddModelPrefix():
            return _add_model_prefix(tensors)
        case Ignore(pattern, what):
            ignored |= {name: what for name in tensors if re.search(pattern, name)}
        case IgnoreExtraLayers():
            extra = _from_layer(config.num_hidden_layers, tensors)
            ignored |= dict.fromkeys(extra, "layers that predict further tokens")
        case IgnoreFrom(first, pattern, what, carry):
            named = [
                name
                for name in _from_layer(getattr(config, first), tensors)
                if re.search(pattern, name)
            ]
            ignored |= dict.fromkeys(named, what)
            carried |= set(named if carry else ())
        case Transpose(pattern):
            return _view(pattern, tensors, Transposed)
        case TransposeTo(pattern, columns, swap_square):
            wanted = getattr(config, columns)
            swap = partial(_swap_to, columns=wanted, swap_square=swap_square)
            return _view(pattern, tensors, swap)
        case Flatten(pattern):
            return _view(pattern, tensors, Flattened)
        case SubtractOne(pattern, convolutions):
            summed = any(
                re.search(convolutions, name) and tensor.shape[-1] == 1
                for name, tensor in tensors.items()
            )
            return {
                name: Shifted(tensor, -1.0) if summed and re.search(pattern, name) else tensor
                for name, tensor in tensors.items()
            }
        case Stack():
            return _stack(rule, tensors)
        case Join():
            return _join(rule, tensors)
        case SplitRows():
            return _split(rule, tensors)
        case SplitSizes():
            return _split_sizes(rule, tensors, config)
        case SplitHeads():
            return _split_heads(rule, tensors, config)
        case _:
            assert_never(rule)
    return {
        name: tensor for name, tensor in tensors.items() if name not in ignored or name in carried
    }


def _view(
    pattern: str, tensors: dict[str, LazyTensor], view: Callable[[LazyTensor], LazyTensor]
) -> dict[str, LazyTensor]:
    """Put a view in place of every tensor whose name matches."""
    return {n: view(t) if re.search(pattern, n) else t for n, t in tensors.items()}


def _swap_to(tensor: LazyTensor, columns: int, swap_square: bool) -> LazyTensor:
    """Swap the last two axes if that gives the last one the size ``columns``."""
    if len(tensor.shape) < 2 or isinstance(tensor, QuantizedTensor):
        return tensor
    rows, last = tensor.shape[-2:]
    swapped = swap_square if rows == last else last != columns and rows == columns
    return Transposed(tensor) if swapped else tensor


def _add_model_prefix(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    bare = any(re.match(r"layers\.\d+\.", name) for name in tensors)
    if not bare or any(name.startswith("model.") for name in tensors):
        return tensors
    outside = ("lm_head.", "mtp.")
    return {
        name if name.startswith(outside) else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }


def _from_layer(first: int, names: Iterable[str]) -> list[str]:
    """Names of tensors in layer ``first`` and later ones."""
    layers = {name: re.search(r"\blayers\.(\d+)\.", name) for name in names}
    return [name for name, match in layers.items() if match and int(match[1]) >= first]


def _stack(rule: Stack, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    out, groups = _grouped(rule.pattern, rule.to, "expert", tensors)
    for target, experts in groups.items():
        if len({(e.shape, e.dtype, type(e)) for e in experts}) > 1:
            raise CheckpointError(
                f"tensor {target} has experts of different shapes or types; download the checkpoint again"
            )
        first = experts[0]
        if isinstance(first, QuantizedTensor):
            each = [
                expert
                for expert in experts
                if isinstance(expert, QuantizedTensor) and expert.quantization == first.quantization
            ]
            if len(each) < len(experts):
                raise CheckpointError(
                    f"tensor {target} has experts that are quantized in different ways"
                )
            parts = {
                part: Stacked([expert.components[part] for expert in each])
                for part in first.components
            }
            out[target] = QuantizedTensor(target, parts, first.quantization)
        else:
            out[target] = Stacked(experts)
    return out


def _join(rule: Join, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    out, groups = _grouped(rule.pattern, rule.to, "rank", tensors)
    for target, slices in groups.items():
        if any(len(s.shape) != 2 for s in slices) or len({(s.shape, s.dtype) for s in slices}) > 1:
            raise CheckpointError(
                f"tensor {target} has slices of different shapes or types; download the checkpoint again"
            )
        out[target] = Concatenated(slices, rule.axis)
    return out


def _grouped(
    pattern: str, to: str, key: str, tensors: dict[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], dict[str, list[LazyTensor]]]:
    """Collect tensors that one target takes.

    Returns:
        All tensors, the first of each group in place of the group; and the groups, ordered by the
        number that ``key`` names in the pattern.
    """
    out: dict[str, LazyTensor] = {}
    groups: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if not (found := re.search(pattern, name)):
            out[name] = tensor
            continue
        target = name[: found.start()] + found.expand(to) + name[found.end() :]
        out.setdefault(target, tensor)  # holds the place in the order
        groups.setdefault(target, {})[int(found[key])] = tensor
    for target, members in groups.items():
        if missing := sorted(set(range(max(members) + 1)) - set(members)):
            raise CheckpointError(
                f"tensor {target} lacks {key} {missing[0]}; download the checkpoint again"
            )
    return out, {
        target: [members[index] for index in sorted(members)] for target, members in groups.items()
    }


def _split(rule: SplitRows, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    out: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if not (found := re.search(rule.pattern, name)):
            out[name] = tensor
            continue
        count = len(rule.to)
        rows = tensor.shape[-1 if rule.vector else -2]
        if rows % count:
            raise CheckpointError(
                f"tensor {name} of shape {tensor.shape} does not hold {count} equal parts"
            )
        for index, to in enumerate(rule.to):
            size = rows // count
            if rule.interleaved:
                indices = np.arange(index, rows, count)
            else:
                indices = np.arange(index * size, (index + 1) * size)
            target = name[: found.start()] + found.expand(to) + name[found.end() :]
            if isinstance(tensor, QuantizedTensor):
                out[target] = tensor.map_components(
                    target, lambda part, indices=indices: SelectedRows(part, indices)
                )
            else:
                out[target] = SelectedRows(tensor, indices, rule.vector)
    return out


def _split_sizes(
    rule: SplitSizes, tensors: dict[str, LazyTensor], config: DecoderConfig
) -> dict[str, LazyTensor]:
    sizes = getattr(config, rule.sizes)
    out: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if not (found := re.search(rule.pattern, name)):
            out[name] = tensor
            continue
        if tensor.shape[-2] != sum(sizes):
            raise CheckpointError(
                f"tensor {name} has shape {tensor.shape}, but config.json makes it {sum(sizes)} "
                "rows; the two files belong to different models"
            )
        start = 0
        for to, size in zip(rule.to, sizes, strict=True):
            target = name[: found.start()] + found.expand(to) + name[found.end() :]
            indices = np.arange(start, start + size)
            if isinstance(tensor, QuantizedTensor):
                out[target] = tensor.map_components(
                    target, lambda part, indices=indices: SelectedRows(part, indices)
                )
            else:
                out[target] = SelectedRows(tensor, indices)
            start += size
    return out


def _split_heads(
    rule: SplitHeads, tensors: dict[str, LazyTensor], config: DecoderConfig
) -> dict[str, LazyTensor]:
    """Split each head; a quantized matrix is dequantized, as its transpose has other groups."""
    heads = config.num_attention_heads
    sizes = [getattr(config, key) for key in rule.sizes]
    out: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if not (found := re.search(rule.pattern, name)):
            out[name] = tensor
            continue
        if len(tensor.shape) != 2 or tensor.shape[0] != heads * sum(sizes):
            raise CheckpointError(
                f"tensor {name} has shape {tensor.shape}, but config.json makes it {heads} heads of {sum(sizes)} rows; "
                "the two files belong to different models"
            )
        rows = np.arange(tensor.shape[0]).reshape(heads, -1)
        halves = (rows[:, : sizes[0]], rows[:, sizes[0] :])
        for to, indices, size in zip(rule.to, halves, sizes, strict=True):
            target = name[: found.start()] + found.expand(to) + name[found.end() :]
            selected = SelectedRows(tensor, indices.flatten())
            part = Reshaped(selected, (heads, size, tensor.shape[1]))
            out[target] = Transposed(part) if to == rule.to[0] else part
    return out
