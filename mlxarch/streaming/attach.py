"""Which layers of a model stream their experts, and how they are set up for it."""

import re
from collections.abc import Sequence

import mlx.core as mx

from mlxarch.blocks import Experts
from mlxarch.errors import InvalidInput
from mlxarch.streaming.banks import Bank, settle, slot_bytes, writes_in_place
from mlxarch.streaming.experts import StreamedExperts, Streaming
from mlxarch.streaming.records import Records, Verify, parts_of
from mlxarch.weights import Resolved


def experts_of(resolved: Resolved) -> dict[int, tuple[str, Experts]]:
    """Path and module of the experts of each layer that has some, by the layer's number."""
    found = {}
    for path, module in resolved.model.named_modules():
        if isinstance(module, Experts) and (layer := re.search(r"\blayers\.(\d+)\.", path)):
            found[int(layer[1])] = path, module
    return dict(sorted(found.items()))


def expert_bytes(resolved: Resolved, dtype: mx.Dtype) -> list[int]:
    """What a slot for one expert takes in memory, for each layer; 0 for a layer without experts.

    Args:
        dtype: that is computed in: scales, and weights that are not packed, are held in it.
    """
    experts = experts_of(resolved)
    return [
        slot_bytes(parts_of(experts[layer][0], resolved.tensors), dtype) if layer in experts else 0
        for layer in range(len(resolved.model.layers))
    ]


def attach(resolved: Resolved, slots: Sequence[int], dtype: mx.Dtype, verify: Verify) -> Streaming | None:
    """Set up the layers that have fewer slots than experts; None where there is none.

    Raises:
        InvalidInput: not one number for each layer, or none for a layer with experts.
        CheckpointError: experts are stored in a form that cannot be read one by one.
    """
    layers, experts = len(resolved.model.layers), experts_of(resolved)
    if len(slots) != layers or any(slots[layer] < 1 for layer in experts):
        raise InvalidInput(
            f"slots must have a number for each of {layers} layers, from 1 on for layers "
            f"{', '.join(map(str, experts))}, which have experts; found {tuple(slots)}"
        )
    streaming, device = Streaming(), mx.default_device()
    gpu = device != mx.cpu
    for layer, (path, module) in experts.items():
        parts = parts_of(path, resolved.tensors)
        if slots[layer] >= parts[0].tensor.shape[0]:
            continue
        records = Records(layer, parts, verify, files=streaming.shared.files)
        settle(module, path, resolved.tensors)
        bank = Bank(module, parts, slots[layer], dtype, writes_in_place(device), join=gpu)
        streaming.layers[layer] = StreamedExperts(module, records, bank, streaming.shared, not streaming.layers, gpu)
        module.streamed = streaming.layers[layer]
        streaming.parameters |= {name for name in resolved.tensors if name.startswith(f"{path}.")}
    if not streaming.layers:
        return None
    resolved.model.streaming = streaming
    return streaming
