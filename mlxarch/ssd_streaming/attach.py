"""Set-up of expert offload: which layers read experts from the SSD, and their slots."""

import re
from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlxarch.blocks import CausalLM, Experts
from mlxarch.checkpoint.lazy_tensor import LazyTensor
from mlxarch.errors import InvalidInput
from mlxarch.ssd_streaming.expert_records import ExpertRecords, Verify, expert_arrays
from mlxarch.ssd_streaming.expert_slots import (
    ExpertSlots,
    set_quantization,
    writes_in_place,
)
from mlxarch.ssd_streaming.experts import ExpertStreaming, OffloadedExperts, StreamedExperts


def experts_of(model: CausalLM) -> dict[int, tuple[str, Experts]]:
    """Path and module of the experts, by the number of the layer; layers without experts are left out."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts) and (layer := re.search(r"\blayers\.(\d+)\.", path)):
            found[int(layer[1])] = path, module
    return dict(sorted(found.items()))


def attach(
    model: CausalLM,
    tensors: Mapping[str, LazyTensor],
    slots: Sequence[int],
    dtype: mx.Dtype,
    verify: Verify,
) -> ExpertStreaming | None:
    """Let every layer with fewer slots than experts read its experts from the SSD.

    Args:
        tensors: lazy tensors of the parameters, by path.
        slots: number of experts to hold in memory for each layer; 0 for a layer without experts.
        dtype: compute dtype.
        verify: when checksums are checked.

    Returns:
        The offloaded experts; None if all experts fit into the slots.

    Raises:
        InvalidInput: not one number for each layer, or 0 for a layer with experts.
        CheckpointError: experts cannot be read one by one from their format.
    """
    layers = len(model.layers)
    experts = experts_of(model)
    if len(slots) != layers or any(slots[layer] < 1 for layer in experts):
        raise InvalidInput(
            f"slots must have a number for each of {layers} layers, from 1 on for layers "
            f"{', '.join(map(str, experts))}, which have experts; found {tuple(slots)}"
        )
    streaming = ExpertStreaming()
    device = mx.default_device()
    gpu = device != mx.cpu
    modules = dict(model.named_modules())
    for layer, (path, module) in experts.items():
        parts = expert_arrays(path, tensors)
        if slots[layer] >= parts[0].tensor.shape[0]:
            continue
        records = ExpertRecords(layer, parts, verify, files=streaming.shared.files)
        set_quantization(module, path, tensors)
        offloaded = OffloadedExperts(module, streaming, layer)
        expert_slots = ExpertSlots(
            offloaded, parts, slots[layer], dtype, writes_in_place(device), join=gpu
        )
        streaming.layers[layer] = StreamedExperts(
            offloaded, records, expert_slots, streaming.shared, not streaming.layers, gpu
        )
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, offloaded)
        streaming.parameters |= {name for name in tensors if name.startswith(f"{path}.")}
    return streaming if streaming.layers else None
