"""Mixed precision for a target: a size, an average of bits per weight or a KL divergence."""

from dataclasses import replace

from mlxarch.errors import QuantizationError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.conversion import Conversion
from mlxarch.quantize.mixed_precision.bit_allocation import Target
from mlxarch.quantize.mixed_precision.expected_kl import allocate_for_target
from mlxarch.quantize.mixed_precision.recipes import replace_quantizations
from mlxarch.system.dtypes import mlx_dtype
from mlxarch.system.durable_files import format_bytes


def toward(conversion: Conversion, target: Target, progress: Progress = silent) -> Conversion:
    """Return the conversion with bits chosen for each matrix so that the output meets a target.

    This reads the source's weights several times. The result's ``expected_kl`` is the KL divergence
    from the source that is forecast for it, in nats per token; a note says so too.

    Args:
        conversion: conversion in affine mode; its group size and method stay.
        target: the limit to meet.
        progress: called with the work done.

    Raises:
        QuantizationError: the target is out of reach, or the conversion is not to affine
            quantization.
        InvalidInput: an evaluation text is too short.
        TokenizerError: the source has no tokenizer.
    """
    quantization = conversion.quantization
    if quantization is None or quantization.mode != "affine":
        raise QuantizationError(
            "a target chooses bits of mode affine; leave out the other mode, or the target"
        )
    byte_budget = None
    if target.size is not None:
        entries = conversion.layout.entries.values()
        chosen = {
            conversion.resolved.architecture.published_name(path)
            for path in conversion.resolved.matrices
        }
        quantized_bytes = sum(
            entry.nbytes
            for entry in entries
            if entry.treatment == "quantized" and entry.path in chosen
        )
        byte_budget = target.size - (conversion.disk_bytes - quantized_bytes)
    allocation = allocate_for_target(
        conversion.source,
        conversion.resolved,
        target,
        byte_budget,
        method=conversion.method,
        group_size=quantization.group_size,
        calibration=conversion.calibration,
        texts=conversion.texts,
        dtype=mlx_dtype(conversion.dtype),
        progress=progress,
    )
    expected_kl = allocation.expected_kl
    note = f"bits chosen for {describe_target(target)}; expected KL {expected_kl:.3g} nats a token"
    changed = replace_quantizations(conversion, allocation.quantizations, note)
    return replace(changed, expected_kl=expected_kl)


def describe_target(target: Target) -> str:
    """Describe a target in words, such as "5 bits per weight"."""
    if target.size is not None:
        return f"a size of {format_bytes(target.size)}"
    if target.bits is not None:
        return f"{target.bits:g} bits per weight"
    return f"a KL of {target.kl:g}"
