"""A tensor as it passes through: a few rows at a time, checked on the way in and on the way out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.errors import QuantizationError
from mlxarch.quantize.plan import Entry
from mlxarch.quantize.rounding import all_finite, quantize
from mlxarch.tensors import DTYPES, FLOATS, Packed, Tensor


def chunks(tensor: Tensor, limit: int, together: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most ``limit`` bytes in float32, and of one row at least.

    Rows that belong ``together``, so many of each matrix (..., rows, columns) at a time, stay so.
    """
    high = tensor.row_count if together == 1 else tensor.shape[-2]
    step = max(limit // (4 * max(prod(tensor.shape[-1:]), 1)) // together, 1) * together
    for first in range(0, tensor.row_count, max(high, 1)):
        for start in range(first, first + high, step):
            yield start, min(start + step, first + high)


@dataclass
class Loss:
    """How far a matrix is from its original, whose rows are added one after the other: sums of squares."""

    squared_error: float = 0.0
    squares: float = 0.0
    weighted_error: float = 0.0
    weighted_rounded: float = 0.0

    @property
    def relative(self) -> float | None:
        """Squared error over squares; None where nothing was added."""
        return self.squared_error / self.squares if self.squares else None

    @property
    def against_rounding(self) -> float | None:
        """What a method made of the errors by its own measure, over what rounding makes of them; None of rounding."""
        return self.weighted_error / self.weighted_rounded if self.weighted_rounded else None

    def add_weighted(self, error: np.ndarray, rounded: np.ndarray) -> None:
        """Errors as a method weighs them: its own, and those of rounding."""
        self.weighted_error += float(error.sum(dtype=np.float64))
        self.weighted_rounded += float(rounded.sum(dtype=np.float64))

    def add(self, original: mx.array, stored: mx.array) -> None:
        """Rows as they were, and as they are."""
        exact = np.asarray(original.astype(mx.float32))
        error = np.asarray(stored.astype(mx.float32)) - exact
        self.squared_error += float(np.square(error).sum(dtype=np.float64))
        self.squares += float(np.square(exact).sum(dtype=np.float64))


Pack = Callable[[mx.array, int, Quantization, mx.Dtype, Loss], dict[str, mx.array]]
"""Rows of a matrix, from the given one on, as they are stored: with affine scales of a dtype."""


def round_rows(rows: mx.array, start: int, to: Quantization, dtype: mx.Dtype, loss: Loss) -> dict[str, mx.array]:
    """The Pack that needs to know nothing."""
    return quantize(rows, to, dtype)


def converted(
    entry: Entry, tensor: Tensor, start: int, stop: int, loss: Loss, pack: Pack = round_rows
) -> dict[str, mx.array]:
    """Some rows of a parameter, evaluated: part -> rows as they are stored. What is quantized is added to ``loss``.

    Raises:
        QuantizationError: an element is not finite, before or after the cast.
    """
    if entry.treatment == "kept packed" and isinstance(tensor, Packed):
        rows = {part: stored.rows(start, stop) for part, stored in tensor.parts.items()}
    else:
        rows = {"weight": tensor.rows(start, stop)}
    _check_finite(entry, rows, "NaN or infinity; take an intact copy of the source")
    if entry.treatment == "quantized" and entry.quantization:
        weight, scales = rows["weight"], DTYPES[entry.parts["scales"].dtype]
        rows = pack(weight, start, entry.quantization, scales, loss)
        mx.eval(rows)
        loss.add(weight, _unpacked(rows, entry.quantization))
    else:
        rows = {part: values.astype(DTYPES[entry.parts[part].dtype]) for part, values in rows.items()}
    mx.eval(rows)
    _check_finite(entry, rows, "a value too large for the dtype; choose bfloat16 or float32")
    return rows


def _unpacked(rows: Mapping[str, mx.array], quantization: Quantization) -> mx.array:
    scales, biases = rows["scales"], rows.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return quantization.dequantize(rows["weight"], scales, biases, mx.float32)


def _check_finite(entry: Entry, rows: Mapping[str, mx.array], problem: str) -> None:
    for part, values in rows.items():
        if values.dtype in FLOATS and not all_finite(values):
            name = entry.parts[part].name if part in entry.parts else entry.path
            raise QuantizationError(f"tensor {name} holds {problem}")
