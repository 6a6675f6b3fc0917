"""A tensor as it passes through: a few rows at a time, checked on the way in and on the way out."""

from collections.abc import Iterator, Mapping
from math import prod

import mlx.core as mx

from mlxarch.errors import QuantizationError
from mlxarch.quantize.plan import Entry
from mlxarch.quantize.rounding import all_finite, quantize
from mlxarch.tensors import DTYPES, FLOATS, Packed, Tensor


def chunks(tensor: Tensor, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most ``limit`` bytes in float32, and of one row at least."""
    step = max(limit // (4 * max(prod(tensor.shape[-1:]), 1)), 1)
    for start in range(0, tensor.row_count, step):
        yield start, min(start + step, tensor.row_count)


def converted(entry: Entry, tensor: Tensor, start: int, stop: int) -> dict[str, mx.array]:
    """Some rows of a parameter, evaluated: part -> rows as they are stored.

    Raises:
        QuantizationError: an element is not finite, before or after the cast.
    """
    if entry.treatment == "kept packed" and isinstance(tensor, Packed):
        rows = {part: stored.rows(start, stop) for part, stored in tensor.parts.items()}
    else:
        rows = {"weight": tensor.rows(start, stop)}
    _check_finite(entry, rows, "NaN or infinity; take an intact copy of the source")
    if entry.treatment == "quantized" and entry.quantization:
        scales = DTYPES[entry.parts["scales"].dtype]
        rows = quantize(rows["weight"], entry.quantization, scales)
    else:
        rows = {part: values.astype(DTYPES[entry.parts[part].dtype]) for part, values in rows.items()}
    mx.eval(rows)
    _check_finite(entry, rows, "a value too large for the dtype; choose bfloat16 or float32")
    return rows


def _check_finite(entry: Entry, rows: Mapping[str, mx.array], problem: str) -> None:
    for part, values in rows.items():
        if values.dtype in FLOATS and not all_finite(values):
            name = entry.parts[part].name if part in entry.parts else entry.path
            raise QuantizationError(f"tensor {name} holds {problem}")
