"""Conversion of other quantization formats to MLX's, according to ``quantization_config``.

Supported: float8 in blocks, MXFP4, compressed-tensors, AWQ and GPTQ.
"""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlxarch.checkpoint.formats import awq_gptq
from mlxarch.checkpoint.formats.fp8_mxfp4 import (
    BytesAsWords,
    Fp8BlockTensor,
    RowwiseMapped,
    ZeroPointBiases,
)
from mlxarch.checkpoint.lazy_tensor import LazyTensor, lossless_origin
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.tensor_views import Reshaped
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.quantization.scheme import Quantization
from mlxarch.system.untrusted_files import short_repr

# Supported formats of compressed-tensors, and for each the supported values of a group's weight
# keys.
COMPRESSED_TENSORS_FORMATS: dict[str, dict[str, tuple[Any, ...]]] = {
    "pack-quantized": {
        "type": ("int",),
        "num_bits": (4, 8),
        "symmetric": (True, False),
        "strategy": ("group", "channel"),
        "group_size": (32, 64, 128, None, -1),
        "actorder": (None, False, "static", "weight"),  # "group" needs a group index per input
        "dynamic": (None, False),
    },
    "float-quantized": {
        "type": ("float",),
        "num_bits": (8,),
        "symmetric": (True,),
        "strategy": ("channel", "tensor", "block"),
        "dynamic": (None, False),
    },
}


UNEXPLAINED = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "a float8 format",
    ".weight_scale_inv": "a float8 format",
}
"""Ends of tensor names that need a ``quantization_config``, and whose they are."""

ACTIVATION_SCALES = (".input_scale", ".activation_scale", "_proj_activation_scale")
"""Ends of the names of scales that float8 activations are divided by."""


def convert_to_mlx(
    stored: Mapping[str, LazyTensor], config: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """Convert quantized tensors of other formats to MLX's form, one lazily read tensor per matrix.

    Tensors of a checkpoint without ``quantization_config`` are returned unchanged.

    Raises:
        ConfigError: an unsupported format, or variant of one.
        CheckpointError: a tensor of a matrix is missing, or shapes do not match.
    """
    section = config.get("quantization_config") or {}
    if not isinstance(section, dict):
        raise ConfigError(
            f"config.json: quantization_config must be a table with a quant_method, found "
            f"{short_repr(section)}; take the original model's config.json"
        )
    method = section.get("quant_method")
    if method == "fp8":
        return _convert_float8(stored, _float8_block(section, "weight_block_size", [128, 128]))
    if method == "compressed-tensors":
        weights = _weights_scheme(section)
        if section["format"] == "float-quantized":
            return _convert_float8(stored, _float8_block(weights, "block_structure", None))
        group = weights["group_size"] if weights["strategy"] == "group" else None
        return _convert_packed_integers(stored, weights["num_bits"], group, weights["symmetric"])
    if method == "fbgemm_fp8":
        return _convert_float8(stored, None)
    if method == "mxfp4":
        return _convert_mxfp4(stored)
    if isinstance(method, str) and method in awq_gptq.SUPPORTED:
        return awq_gptq.convert_tensors(stored, awq_gptq.parse_config(section))
    if method:
        raise ConfigError(
            f"config.json: the weights are packed by {method!r}, which mlxarch does not read; take "
            "the original "
            "checkpoint, or one that is quantized for MLX"
        )
    for ending, makers in UNEXPLAINED.items():
        if name := next((name for name in stored if name.endswith(ending)), None):
            raise ConfigError(
                f"tensor {name} is packed as {makers} packs it, and config.json has no "
                "quantization_config that says how; put the settings there, with a quant_method "
                "(older repositories have them in quantize_config.json, quant_config.json or "
                "hf_quant_config.json), or take another repository of the model"
            )
    return dict(stored)


def _float8_block(section: Mapping[str, Any], key: str, default: Any) -> tuple[int, int] | None:
    """Return rows and columns of a block; None if the section says that scales are not per block.

    Raises:
        ConfigError: it is no pair of positive numbers.
    """
    block = section.get(key, default)
    if block is None:
        return None
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or any(type(size) is not int or size < 1 for size in block)
    ):
        raise ConfigError(
            f"config.json: {key} of float8 must be two positive numbers or null, found "
            f"{short_repr(block)}; take the original model's config.json"
        )
    return block[0], block[1]


def _convert_float8(
    stored: Mapping[str, LazyTensor], block: tuple[int, int] | None
) -> dict[str, LazyTensor]:
    """Join each float8 matrix ``X`` with its scales, ``X_scale_inv`` or ``X_scale``.

    The shape of the scales says whether there is one for a matrix, for each row or for each block.
    Scales of activations are dropped, because activations are not quantized here.
    Source: the format float-quantized of github.com/vllm-project/compressed-tensors; transformers'
    FineGrainedFP8 and FbgemmFp8Linear; github.com/neuralmagic/AutoFP8.

    Args:
        stored: tensors of the checkpoint.
        block: rows and columns of a block; None if the config has no blocks.
    """
    tensors: dict[str, LazyTensor] = {}
    scales: dict[str, tuple[str, LazyTensor]] = {}
    for name, tensor in stored.items():
        weight = re.sub(r"(_scale_inv|(?<=\.weight)_scale)$", "", name)
        if name.endswith(ACTIVATION_SCALES):
            continue
        if weight == name:
            tensors[name] = tensor
        else:
            scales[weight] = name, tensor
    for weight, (name, scale) in scales.items():
        if weight not in tensors:
            raise CheckpointError(
                f"tensor {name} has no {weight} beside it; download the checkpoint again"
            )
        tensors[weight] = _scaled_float8(weight, tensors[weight], scale, block)
    return tensors


def _scaled_float8(
    name: str, matrix: LazyTensor, scale: LazyTensor, block: tuple[int, int] | None
) -> LazyTensor:
    """Multiply a float8 matrix by its scales, whose shape says what each is for."""
    *stack, rows, columns = matrix.shape if len(matrix.shape) > 1 else (1, 1)
    per_matrix = (*stack, 1, 1)
    if scale.shape == (*stack, 1) or (not stack and scale.shape == ()):
        scale = Reshaped(scale, per_matrix)
    if scale.shape == per_matrix:
        block = rows, columns
    elif block is None or scale.shape == (*stack, rows, 1):
        block = 1, columns
    return Fp8BlockTensor(name, matrix, scale, block)


def _convert_mxfp4(stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Join ``X_blocks`` and ``X_scales`` as ``X.weight`` in MLX's mode mxfp4.

    Shapes: (…, out, in / 32, 16) and (…, out, in / 32). As in MLX, the lower four bits of a byte
    come first and a scale is 2^(s - 127), so nothing is computed.
    Source: openai/gpt-oss's gpt_oss/torch/weights.py; OCP Microscaling Formats 1.0.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        base, _, role = name.rpartition("_")
        other = {"blocks": "scales", "scales": "blocks"}.get(role)
        if other is None:
            tensors[name] = tensor
        elif f"{base}_{other}" not in stored:
            raise CheckpointError(
                f"tensor {name} has no {base}_{other} beside it; download the checkpoint again"
            )
        elif role == "blocks":
            scales = stored[f"{base}_scales"]
            components = {"weight": BytesAsWords(name, tensor), "scales": scales}
            tensors[f"{base}.weight"] = QuantizedTensor(
                f"{base}.weight", components, Quantization(4, 32, "mxfp4")
            )
    return tensors


def _convert_packed_integers(
    stored: Mapping[str, LazyTensor], bits: int, group: int | None, symmetric: bool
) -> dict[str, LazyTensor]:
    """Join ``X_packed``, ``X_scale`` and ``X_shape`` as ``X`` in MLX's affine mode.

    Shapes: codes (out, in · bits / 32), scales (out, in / group). A code stands for (code - zero) *
    scale, and the first code has a word's lowest bits, as in MLX: codes and scales need no change.
    With symmetric quantization, zero is 2^(bits - 1) and the bias exact; otherwise zero is in
    ``X_zero_point``, and scales and biases are kept in float32. Without groups, a row has one
    scale.
    Source: the format pack-quantized of github.com/vllm-project/compressed-tensors, as in
    moonshotai/Kimi-K2-Thinking.
    """
    roles = ["packed", "scale", "shape"]
    if not symmetric:
        roles.append("zero_point")
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        base = re.sub(rf"(?<=\.weight)_({'|'.join(roles)})$", "", name)
        if base == name:
            tensors[name] = tensor
            continue
        if missing := [f"{base}_{role}" for role in roles if f"{base}_{role}" not in stored]:
            raise CheckpointError(
                f"tensor {name} has no {missing[0]} beside it; download the checkpoint again"
            )
        if name != f"{base}_packed":
            continue
        scale = stored[f"{base}_scale"]
        if tensor.dtype != mx.int32 or not tensor.shape or not scale.shape:
            raise CheckpointError(
                f"tensor {name}: packed codes must be int32, found {tensor.dtype} {tensor.shape}"
            )
        zeros = None if symmetric else stored[f"{base}_zero_point"]
        scales, biases = _scales_and_biases(base, scale, zeros, bits)
        inputs = tensor.shape[-1] * 32 // bits
        group_size = group or next((size for size in (128, 64, 32) if inputs % size == 0), 32)
        if group is None and scale.shape[-1] == 1:
            scales = _repeat_column(scales, inputs // group_size)
            biases = _repeat_column(biases, inputs // group_size)
        weight = RowwiseMapped(
            tensor, tensor.shape[-1], mx.uint32, lambda rows: rows.view(mx.uint32)
        )
        components = {"weight": weight, "scales": scales, "biases": biases}
        tensors[base] = QuantizedTensor(base, components, Quantization(bits, group_size))
        tensors[base].origin = lossless_origin(
            f"packed by compressed-tensors, {bits} bits", scales.dtype
        )
    return tensors


def _scales_and_biases(
    base: str, scale: LazyTensor, zeros: LazyTensor | None, bits: int
) -> tuple[LazyTensor, LazyTensor]:
    """Return affine scales and biases; without stored zero points, zero is 2^(bits - 1)."""
    width = scale.shape[-1]
    if zeros is None:
        lowest = -(2 ** (bits - 1))
        return scale, RowwiseMapped(scale, width, scale.dtype, lambda rows: rows * lowest)
    biases = ZeroPointBiases(f"{base}_zero_point", zeros, scale, bits)
    return RowwiseMapped(scale, width, mx.float32, lambda rows: rows.astype(mx.float32)), biases


def _repeat_column(tensor: LazyTensor, times: int) -> LazyTensor:
    """Repeat a column: (out, 1) -> (out, times)."""
    return RowwiseMapped(tensor, times, tensor.dtype, lambda rows: mx.repeat(rows, times, axis=-1))


def _weights_scheme(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization scheme of the weights in a compressed-tensors section.

    Raises:
        ConfigError: the section has several schemes, or an unsupported one.
    """
    config_groups = section.get("config_groups")
    groups = []
    if isinstance(config_groups, dict):
        groups = [group for group in config_groups.values() if isinstance(group, dict)]
    weights = [group.get("weights") for group in groups]
    first = weights[0] if weights and isinstance(weights[0], dict) else {}
    name = section.get("format")
    supported = COMPRESSED_TENSORS_FORMATS.get(name) if isinstance(name, str) else None
    wrong = [] if supported else [f"format {name!r}"]
    for key, allowed in (supported or {}).items():
        if not awq_gptq.is_one_of(first.get(key), allowed):
            wrong.append(f"{key} {first.get(key)!r}")
    if first.get("strategy") == "group" and first.get("group_size") in (None, -1):
        wrong.append(f"group_size {first.get('group_size')!r}")
    if any(other != first for other in weights):
        wrong.append("several kinds of weights")
    if name != "float-quantized":  # quantizing activations to float8 serves speed alone
        activations = ("input_activations", "output_activations")
        wrong += [key for key in activations if any(group.get(key) for group in groups)]
    if wrong:
        raise ConfigError(
            f"config.json: the weights are packed by 'compressed-tensors' with {', '.join(wrong)}, "
            "which mlxarch does "
            "not read; it reads pack-quantized integers of 4 or 8 bits, in groups of 32, 64 or 128 "
            "or whole rows, and "
            "float-quantized matrices of 8 bits. Take the original checkpoint, or one that is "
            "quantized for MLX"
        )
    return first
