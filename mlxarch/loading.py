"""A checkpoint folder becomes a model with its weights in memory."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import CausalLM, Embedding, fuse
from mlxarch.blocks.linear import Matrix
from mlxarch.errors import CheckpointError, InvalidInput
from mlxarch.execution import Execution
from mlxarch.progress import Progress, silent
from mlxarch.slicing import Slice, slice_source
from mlxarch.streaming.attach import attach
from mlxarch.streaming.embeddings import attach_tables
from mlxarch.tensors import FLOATS, Packed, Tensor
from mlxarch.weights import Resolved, open_source, resolve

DTYPE_NAMES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
RESIDENT = Execution()


def load_model(
    folder: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    slice: str | Slice | None = None,
    progress: Progress = silent,
    execution: Execution = RESIDENT,
) -> tuple[CausalLM, dict[str, Any]]:
    """Read a folder of safetensors, quantized for MLX or not.

    Args:
        folder: with config.json; headers, index, names, shapes and dtypes are checked before any weight is read.
        dtype: to compute in; None takes the checkpoint's, and float32 on MLX's CPU back end, which has no other
            type in hardware.
        slice: of a Gemma 3n, the part of it to load; see ``slicing.slice_source``.
        progress: told the bytes of the weights read.
        execution: what stays in memory, and what is read from the folder while the model runs.

    Returns:
        The model, its weights evaluated, and config.json.

    Raises:
        CheckpointError, ConfigError: the folder is not a sound checkpoint.
        InvalidInput: an unknown ``dtype``, or a slice that there is not.
    """
    source = open_source(folder)
    if slice is not None:
        source = slice_source(source, slice)
    resolved = resolve(source)
    compute = compute_dtype(dtype, resolved)
    try:
        streaming = attach(resolved, execution.slots, compute, execution.verify) if execution.slots else None
        streamed = streaming.parameters if streaming else frozenset()
        if execution.ple == "ssd":
            streamed |= attach_tables(resolved.model, resolved.parameters, compute, execution.verify)
        _fill(resolved, compute, progress, streamed)
    except CheckpointError:
        source.check_unchanged()  # says more
        raise
    finally:
        for shard in source.shards:
            shard.close()
    source.check_unchanged()
    resolved.model.chunk = execution.chunk
    if streaming is not None:
        streaming.segment = execution.segment
    return resolved.model, source.config


def compute_dtype(dtype: str | mx.Dtype | None, resolved: Resolved) -> mx.Dtype:
    """The type to compute in: the one asked for, else float32 on a CPU, else the checkpoint's most frequent.

    Raises:
        InvalidInput: it is none of float32, float16, bfloat16.
    """
    if dtype is not None:
        named = DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
        if named is None or named not in FLOATS:
            raise InvalidInput(f"dtype must be one of {', '.join(DTYPE_NAMES)}, found {dtype!r}")
        return named
    if mx.default_device() == mx.cpu:
        return mx.float32
    tensors = resolved.parameters.values()
    types = [t.parts["scales"].dtype if isinstance(t, Packed) else t.dtype for t in tensors]
    types = [t for t in types if t in FLOATS] or [mx.bfloat16]
    return max(FLOATS, key=types.count)


def _fill(resolved: Resolved, dtype: mx.Dtype, progress: Progress, streamed: Collection[str]) -> None:
    """Layer by layer, so that no more than one layer is held twice while its projections are joined; what is
    ``streamed`` is left out.
    """
    modules = dict(resolved.model.named_modules())
    groups: dict[str, dict[str, Tensor]] = {}
    parameters = {name: tensor for name, tensor in resolved.parameters.items() if name not in streamed}
    for name, tensor in parameters.items():
        layer = LAYER.match(name)
        groups.setdefault(layer.group() if layer else name.rpartition(".")[0], {})[name] = tensor
    total, done = sum(tensor.nbytes for tensor in parameters.values()), 0
    for group, tensors in groups.items():
        try:
            for name, tensor in tensors.items():
                path, _, leaf = name.rpartition(".")
                _assign(modules[path], leaf, tensor, dtype)
            mx.eval(modules[group].parameters())
        except RuntimeError as error:
            raise CheckpointError(f"the weights of {group} could not be read ({error}); download them again") from None
        if mx.default_device() != mx.cpu:
            # on a CPU a wider product is no faster, and what is split off it is not contiguous: slow to go on with
            fuse(modules[group])
        done += sum(tensor.nbytes for tensor in tensors.values())
        progress("loading", done, total)


LAYER = re.compile(r".*?\blayers\.\d+(?=\.)")


def _assign(module: nn.Module, leaf: str, tensor: Tensor, dtype: mx.Dtype) -> None:
    if isinstance(module, Embedding):
        module.dtype = dtype
    if not isinstance(tensor, Packed):
        module[leaf] = tensor.load().astype(mx.float32 if leaf in getattr(module, "float32", ()) else dtype)
        return
    assert isinstance(module, Matrix)  # resolve() allows no other module a packed weight
    module.quantization = tensor.settings
    for part, stored in tensor.parts.items():
        array = stored.load()
        module[part] = array.astype(dtype) if array.dtype in FLOATS else array
