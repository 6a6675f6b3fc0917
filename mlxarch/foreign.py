"""Number formats of other makers, as tensors that MLX can compute with: float8 in blocks, MXFP4, compressed-tensors,
AWQ, GPTQ.
"""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlxarch import awq_gptq
from mlxarch.blocks import Quantization
from mlxarch.encodings import Fp8Blocks, Mapped, Words, ZeroPoints
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.tensors import Packed, Shaped, Tensor, without_loss

KEPT_AS_THEY_ARE: tuple[str, ...] = ()  # formats that the rules of a model take apart by the tensors' names

# Of compressed-tensors: the formats, and the values of the keys of a group's weights, that are read
FORMATS: dict[str, dict[str, tuple[Any, ...]]] = {
    "pack-quantized": {
        "type": ("int",),
        "num_bits": (4, 8),
        "symmetric": (True, False),
        "strategy": ("group", "channel"),
        "group_size": (32, 64, 128, None, -1),
        "actorder": (None, False, "static", "weight"),  # "group" would want a group for every input
        "dynamic": (None, False),
    },
    "float-quantized": {
        "type": ("float",),
        "num_bits": (8,),
        "symmetric": (True,),
        "strategy": ("channel", "tensor", "block"),
        "block_structure": (None, [128, 128]),
        "dynamic": (None, False),
    },
}


def unpack_foreign(stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors with those of another maker's number format joined into one each, by the config's own account.

    Raises:
        ConfigError: a format, or a variant of one, that is not read.
        CheckpointError: tensors that belong together are not all there, or do not fit.
    """
    foreign = config.get("quantization_config") or {}
    method = foreign.get("quant_method") if isinstance(foreign, dict) else foreign
    if method == "fp8":
        return _fp8(stored, foreign)
    if method == "compressed-tensors":
        weights = _weights(foreign)
        if foreign["format"] == "float-quantized":
            return _float_quantized(stored, weights["strategy"])
        group = weights["group_size"] if weights["strategy"] == "group" else None
        return _pack_quantized(stored, weights["num_bits"], group, weights["symmetric"])
    if method == "fbgemm_fp8":
        return _float_quantized(stored, "channel")
    if method == "mxfp4":
        return _mxfp4(stored)
    if isinstance(method, str) and method in awq_gptq.KNOWN:
        return awq_gptq.unpack(stored, awq_gptq.settings_of(foreign))
    if method and method not in KEPT_AS_THEY_ARE:
        raise ConfigError(
            f"config.json: the weights are packed by {method!r}, which mlxarch does not read; take the original "
            "checkpoint, or one that is quantized for MLX"
        )
    return dict(stored)


def _fp8(stored: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """``X_scale_inv`` holds the scales of ``X``."""
    block = settings.get("weight_block_size") or [128, 128]
    if block != [128, 128]:
        raise ConfigError(f"config.json: float8 in blocks of {block} is not read; only [128, 128] is")
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    for name, scale in stored.items():
        weight = name.removesuffix("_scale_inv")
        if weight not in tensors:
            raise CheckpointError(f"tensor {name} has no {weight} beside it; download the checkpoint again")
        if weight != name:
            tensors[weight] = Fp8Blocks(weight, tensors[weight], scale)
    return tensors


def _mxfp4(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``X_blocks`` (…, out, in / 32, 16) with ``X_scales`` (…, out, in / 32) are ``X.weight`` in MLX's mode mxfp4.

    Both have the lower four bits of a byte first and scales of 2^(s - 127), so nothing is computed.
    Source: openai/gpt-oss's gpt_oss/torch/weights.py; OCP Microscaling Formats 1.0.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        base, _, part = name.rpartition("_")
        other = {"blocks": "scales", "scales": "blocks"}.get(part)
        if other is None:
            tensors[name] = tensor
        elif f"{base}_{other}" not in stored:
            raise CheckpointError(f"tensor {name} has no {base}_{other} beside it; download the checkpoint again")
        elif part == "blocks":
            parts = {"weight": Words(name, tensor), "scales": stored[f"{base}_scales"]}
            tensors[f"{base}.weight"] = Packed(f"{base}.weight", parts, Quantization(4, 32, "mxfp4"))
    return tensors


def _pack_quantized(stored: Mapping[str, Tensor], bits: int, group: int | None, symmetric: bool) -> dict[str, Tensor]:
    """``X_packed`` (out, in · bits / 32), ``X_scale`` (out, in / group) and ``X_shape`` are ``X`` in MLX's affine mode.

    A code stands for (code - zero) * scale, and the first code has a word's lowest bits, as in MLX: codes and scales
    are taken as they are. Symmetric, zero is 2^(bits - 1) and the bias exact; else it is in ``X_zero_point``, and
    scales and biases are kept in float32. Without a group, a row has one scale.
    Source: the format pack-quantized of github.com/vllm-project/compressed-tensors, as in moonshotai/Kimi-K2-Thinking.
    """
    roles = ("packed", "scale", "shape") if symmetric else ("packed", "scale", "shape", "zero_point")
    lowest = -(2 ** (bits - 1))
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        base = re.sub(rf"(?<=\.weight)_({'|'.join(roles)})$", "", name)
        if base == name:
            tensors[name] = tensor
            continue
        if missing := [f"{base}_{role}" for role in roles if f"{base}_{role}" not in stored]:
            raise CheckpointError(f"tensor {name} has no {missing[0]} beside it; download the checkpoint again")
        if name != f"{base}_packed":
            continue
        scale = stored[f"{base}_scale"]
        if tensor.dtype != mx.int32 or not tensor.shape or not scale.shape:
            raise CheckpointError(f"tensor {name}: packed codes must be int32, found {tensor.dtype} {tensor.shape}")
        weight = Mapped(tensor, tensor.shape[-1], mx.uint32, lambda rows: rows.view(mx.uint32))
        parts: dict[str, Tensor] = {"weight": weight}
        if symmetric:
            parts["scales"] = scale
            parts["biases"] = Mapped(scale, scale.shape[-1], scale.dtype, lambda rows: rows * lowest)
        else:
            parts["scales"] = Mapped(scale, scale.shape[-1], mx.float32, lambda rows: rows.astype(mx.float32))
            parts["biases"] = ZeroPoints(f"{base}_zero_point", stored[f"{base}_zero_point"], scale, bits)
        inputs = tensor.shape[-1] * 32 // bits
        size = group or next((size for size in (128, 64, 32) if inputs % size == 0), 32)
        if group is None and scale.shape[-1] == 1:
            parts |= {part: _spread(parts[part], inputs // size) for part in ("scales", "biases")}
        tensors[base] = Packed(base, parts, Quantization(bits, size))
        tensors[base].origin = without_loss(f"packed by compressed-tensors, {bits} bits", parts["scales"].dtype)
    return tensors


def _spread(tensor: Tensor, times: int) -> Tensor:
    """A column (out, 1) so many times."""
    return Mapped(tensor, times, tensor.dtype, lambda rows: mx.repeat(rows, times, axis=-1))


def _float_quantized(stored: Mapping[str, Tensor], strategy: str) -> dict[str, Tensor]:
    """``X_scale`` holds the scales of the float8 matrix ``X``: one for each row (channel), for all of it or for blocks.

    Scales of activations are left out: here activations are not rounded.
    Source: the format float-quantized of github.com/vllm-project/compressed-tensors; transformers' FbgemmFp8Linear.
    """
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith((".weight_scale", ".input_scale"))}
    for name, scale in stored.items():
        if not name.endswith(".weight_scale"):
            continue
        if (matrix := tensors.get(weight := name.removesuffix("_scale"))) is None:
            raise CheckpointError(f"tensor {name} has no {weight} beside it; download the checkpoint again")
        high, wide = matrix.shape if len(matrix.shape) == 2 else (1, 1)
        block = {"channel": (1, wide), "tensor": (high, wide), "block": (128, 128)}[strategy]
        if strategy == "tensor" and scale.shape in ((), (1,)):
            scale = Shaped(scale, (1, 1))
        tensors[weight] = Fp8Blocks(weight, matrix, scale, block)
    return tensors


def _weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The one kind of weights that a compressed-tensors section describes.

    Raises:
        ConfigError: it describes several, or one that is not read.
    """
    groups = settings.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    weights = [group.get("weights") for group in groups]
    first = weights[0] if weights and isinstance(weights[0], dict) else {}
    kind = settings.get("format")
    known = FORMATS.get(kind) if isinstance(kind, str) else None
    wrong = [] if known else [f"format {kind!r}"]
    for key, allowed in (known or {}).items():
        if not awq_gptq.is_one_of(first.get(key), allowed):
            wrong.append(f"{key} {first.get(key)!r}")
    if first.get("strategy") == "group" and first.get("group_size") in (None, -1):
        wrong.append(f"group_size {first.get('group_size')!r}")
    wrong += ["several kinds of weights"] if any(other != first for other in weights) else []
    if kind != "float-quantized":  # where float8 activations are rounded, it is for speed alone
        activations = ("input_activations", "output_activations")
        wrong += [key for key in activations if any(group.get(key) for group in groups)]
    if wrong:
        raise ConfigError(
            f"config.json: the weights are packed by 'compressed-tensors' with {', '.join(wrong)}, which mlxarch does "
            "not read; it reads pack-quantized integers of 4 or 8 bits, in groups of 32, 64 or 128 or whole rows, and "
            "float-quantized matrices of 8 bits. Take the original checkpoint, or one that is quantized for MLX"
        )
    return first
