"""Loading of weights: from an open checkpoint to a network that can run."""

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks import CausalLM, Embedding, fuse
from mlxarch.blocks.linear import Matrix
from mlxarch.checkpoint.lazy_tensor import FLOAT_DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, InvalidInput
from mlxarch.loading.execution import Execution
from mlxarch.loading.matformer import Slice, slice_source
from mlxarch.loading.resolve import Resolved, resolve
from mlxarch.progress import Progress, silent
from mlxarch.ssd_streaming.attach import attach
from mlxarch.ssd_streaming.embeddings import attach_tables
from mlxarch.system.backend import claim_process
from mlxarch.system.dtypes import COMPUTE_DTYPES, mlx_dtype

RESIDENT = Execution()

_logger = logging.getLogger(__name__)


@contextmanager
def open_resolved(folder: str | Path, slice: str | Slice | None = None) -> Iterator[Resolved]:
    """Open a checkpoint folder and match its tensors with a network; files are closed at the end of
    the block.

    Headers, index, names, shapes and dtypes are checked; no weight is read.

    Args:
        folder: folder with config.json and safetensors files, quantized or not.
        slice: part of a MatFormer model to take, see ``matformer.slice_source``.

    Raises:
        CheckpointError, ConfigError: the folder is not a sound checkpoint.
        InvalidInput: the slice does not exist.
    """
    source = open_checkpoint(folder)
    try:
        yield resolve(source if slice is None else slice_source(source, slice))
    finally:
        for shard in source.shards:
            shard.close()


def load_model(
    folder: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    slice: str | Slice | None = None,
    progress: Progress = silent,
    execution: Execution = RESIDENT,
) -> tuple[CausalLM, dict[str, Any]]:
    """Load a checkpoint folder: ``open_resolved``, then ``load_weights``.

    Returns:
        The network with its weights evaluated, and config.json.
    """
    with open_resolved(folder, slice) as checkpoint:
        model = load_weights(checkpoint, dtype=dtype, progress=progress, execution=execution)
        return model, checkpoint.source.config


def load_weights(
    checkpoint: Resolved,
    *,
    dtype: str | mx.Dtype | None = None,
    progress: Progress = silent,
    execution: Execution = RESIDENT,
) -> CausalLM:
    """Fill the network of an open checkpoint with its weights.

    Args:
        dtype: dtype to compute in, see ``compute_dtype``.
        progress: called with the bytes of weights read so far.
        execution: which parts stay in memory and which are read from the SSD while the model runs.

    Returns:
        The network of ``checkpoint``, its weights evaluated.

    Raises:
        CheckpointError: a weight cannot be read, or a file changed since it was checked.
        InvalidInput: an unknown ``dtype``, or numbers of slots that do not fit the layers.
        ForkedProcess: the process was forked after another model had been loaded.
    """
    claim_process()
    model = checkpoint.model
    for note in checkpoint.notes:
        _logger.info("%s", note)
    compute = compute_dtype(dtype, checkpoint)
    offloaded: frozenset[str] = frozenset()
    try:
        if execution.slots:
            streaming = attach(
                model, checkpoint.tensors, execution.slots, compute, execution.verify
            )
            if streaming is not None:
                streaming.segment = execution.segment
                offloaded |= streaming.parameters
        if execution.ple == "ssd":
            offloaded |= attach_tables(model, checkpoint.parameters, compute, execution.verify)
        _fill(checkpoint, compute, progress, offloaded)
    except CheckpointError:
        checkpoint.source.check_unchanged()  # a changed file is the more precise error
        raise
    checkpoint.source.check_unchanged()
    return model


def compute_dtype(dtype: str | mx.Dtype | None, resolved: Resolved) -> mx.Dtype:
    """Return the dtype to compute in.

    That is ``dtype`` if given, else float32 on a CPU, which has no other type in hardware, else the
    most frequent float type of the checkpoint.

    Raises:
        InvalidInput: ``dtype`` is none of float32, float16, bfloat16.
    """
    if dtype is not None:
        named = mlx_dtype(dtype) if isinstance(dtype, str) else dtype
        if named is None or named not in FLOAT_DTYPES:
            raise InvalidInput(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, found {dtype!r}")
        return named
    if mx.default_device() == mx.cpu:
        return mx.float32
    tensors = resolved.parameters.values()
    types = [
        t.components["scales"].dtype if isinstance(t, QuantizedTensor) else t.dtype for t in tensors
    ]
    types = [t for t in types if t in FLOAT_DTYPES] or [mx.bfloat16]
    return max(FLOAT_DTYPES, key=types.count)


def _fill(
    resolved: Resolved, dtype: mx.Dtype, progress: Progress, offloaded: Collection[str]
) -> None:
    """Read all weights but those that are ``offloaded``.

    Weights are read layer by layer: while the projections of a layer are fused, only that layer is
    held twice.
    """
    modules = dict(resolved.model.named_modules())
    groups: dict[str, dict[str, LazyTensor]] = {}
    parameters = {
        name: tensor for name, tensor in resolved.parameters.items() if name not in offloaded
    }
    for name, tensor in parameters.items():
        layer = LAYER.match(name)
        groups.setdefault(layer.group() if layer else name.rpartition(".")[0], {})[name] = tensor
    total = sum(tensor.nbytes for tensor in parameters.values())
    done = 0
    for group, tensors in groups.items():
        try:
            for name, tensor in tensors.items():
                path, _, leaf = name.rpartition(".")
                _assign(modules[path], leaf, tensor, dtype)
            mx.eval(modules[group].parameters())
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights of {group} could not be read ({error}); download them again"
            ) from None
        if mx.default_device() != mx.cpu:
            # On a CPU a wider product is no faster, and its parts are not contiguous, which is slow
            # to use
            fuse(modules[group])
        done += sum(tensor.nbytes for tensor in tensors.values())
        progress("loading", done, total)


LAYER = re.compile(r".*?\blayers\.\d+(?=\.)")


def _checked_indices(array: mx.array, leaf: str, limit: int) -> mx.array:
    """Check that all indices are in 0 … ``limit`` - 1: MLX would read arbitrary memory."""
    low = cast(int, array.min().item())
    high = cast(int, array.max().item())
    if low < 0 or high >= limit:
        raise CheckpointError(
            f"tensor {leaf} has indices from {low} to {high}, and 0 to {limit - 1} are allowed; "
            "download the checkpoint again"
        )
    return array


def _assign(module: nn.Module, leaf: str, tensor: LazyTensor, dtype: mx.Dtype) -> None:
    if isinstance(module, Embedding):
        module.dtype = dtype
    if not isinstance(tensor, QuantizedTensor):
        if leaf in (limits := getattr(module, "integers", {})):
            module[leaf] = _checked_indices(tensor.load(), leaf, limits[leaf])
            return
        module[leaf] = tensor.load().astype(
            mx.float32 if leaf in getattr(module, "float32", ()) else dtype
        )
        return
    assert isinstance(module, Matrix)  # resolve() refuses a quantized weight elsewhere
    module.quantization = tensor.quantization
    for part, stored in tensor.components.items():
        array = stored.load()
        module[part] = array.astype(dtype) if array.dtype in FLOAT_DTYPES else array
