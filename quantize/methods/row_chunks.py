"""Conversion of a parameter a few rows at a time, with checks for NaN and infinity."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from mlxarch.checkpoint.layout import OutputTensor
from mlxarch.checkpoint.lazy_tensor import DTYPES, FLOAT_DTYPES, LazyTensor
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.errors import QuantizationError
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.methods.rounding import all_finite, round_to_nearest


def row_ranges(tensor: LazyTensor, limit: int, block_rows: int = 1) -> Iterator[tuple[int, int]]:
    """Split the rows of a tensor into ranges (start, stop) that cover it in order.

    Args:
        tensor: parameter of any shape; a row is a slice along the last axis.
        limit: size of a range in float32 bytes, at most; a range has at least ``block_rows`` rows.
        block_rows: rows of one matrix that must stay in one range, counted from the first row of
            each matrix of a stack.
    """
    matrix_rows = tensor.row_count if block_rows == 1 else tensor.shape[-2]
    row_bytes = 4 * max(prod(tensor.shape[-1:]), 1)
    step = max(limit // row_bytes // block_rows, 1) * block_rows
    for first in range(0, tensor.row_count, max(matrix_rows, 1)):
        end = first + matrix_rows
        for start in range(first, end, step):
            yield start, min(start + step, end)


@dataclass
class ErrorStats:
    """Quantization error of a matrix, summed while its rows are quantized.

    Attributes:
        squared_error: sum of the squared errors of the weights.
        squared_norm: sum of the squared weights.
        weighted_error: error by the measure of the quantization method, such as d H dᵀ in GPTQ.
        weighted_rounding_error: the same measure for rounding to nearest.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    weighted_error: float = 0.0
    weighted_rounding_error: float = 0.0

    @property
    def relative_error(self) -> float | None:
        """Squared error divided by squared norm; None if nothing was quantized."""
        return self.squared_error / self.squared_norm if self.squared_norm else None

    @property
    def against_rounding(self) -> float | None:
        """Weighted error divided by that of rounding to nearest; None for rounding itself."""
        if not self.weighted_rounding_error:
            return None
        return self.weighted_error / self.weighted_rounding_error

    def add_weighted(self, error: np.ndarray, rounding_error: np.ndarray) -> None:
        """Add weighted errors of the method and of rounding to nearest, in arrays of any shape."""
        self.weighted_error += float(error.sum(dtype=np.float64))
        self.weighted_rounding_error += float(rounding_error.sum(dtype=np.float64))

    def add_rows(self, original: mx.array, dequantized: mx.array) -> None:
        """Add the squared errors and squared weights of some rows."""
        exact = np.asarray(original.astype(mx.float32))
        error = np.asarray(dequantized.astype(mx.float32)) - exact
        self.squared_error += float(np.square(error).sum(dtype=np.float64))
        self.squared_norm += float(np.square(exact).sum(dtype=np.float64))


QuantizeRows = Callable[[mx.array, int, Quantization, mx.Dtype, ErrorStats], dict[str, mx.array]]
"""Quantize consecutive rows of a matrix.

Arguments: rows (R, in); index of the first row; quantization format; type of affine scales and
    biases; statistics that
the weighted errors are added to. Returns: the arrays of ``mx.quantize`` ("weight", "scales",
"biases").
"""


def round_rows(
    rows: mx.array, start: int, to: Quantization, dtype: mx.Dtype, stats: ErrorStats
) -> dict[str, mx.array]:
    """Quantize rows by rounding to nearest; a QuantizeRows that needs no calibration."""
    return round_to_nearest(rows, to, dtype)


def convert_rows(
    entry: OutputTensor,
    tensor: LazyTensor,
    start: int,
    stop: int,
    stats: ErrorStats,
    quantize_rows: QuantizeRows = round_rows,
) -> dict[str, mx.array]:
    """Read rows ``start`` to ``stop`` of a parameter and quantize, cast or copy them as planned.

    Args:
        entry: planned output of the parameter.
        tensor: the parameter.
        stats: receives the error of rows that are quantized.
        quantize_rows: quantization method.

    Returns:
        Evaluated arrays by name: "weight", and for quantized rows "scales" and "biases".

    Raises:
        QuantizationError: an element is NaN or infinite, before or after the cast.
    """
    if entry.treatment == "kept packed" and isinstance(tensor, QuantizedTensor):
        arrays = {name: part.read_rows(start, stop) for name, part in tensor.components.items()}
    else:
        arrays = {"weight": tensor.read_rows(start, stop)}
    _check_finite(entry, arrays, "NaN or infinity; take an intact copy of the source")
    if entry.treatment == "quantized" and entry.quantization:
        weight = arrays["weight"]
        scale_dtype = DTYPES[entry.tensors["scales"].dtype]
        arrays = quantize_rows(weight, start, entry.quantization, scale_dtype, stats)
        mx.eval(arrays)
        stats.add_rows(weight, _dequantize(arrays, entry.quantization))
    else:
        arrays = {
            name: values.astype(DTYPES[entry.tensors[name].dtype])
            for name, values in arrays.items()
        }
    mx.eval(arrays)
    _check_finite(entry, arrays, "a value too large for the dtype; choose bfloat16 or float32")
    return arrays


def _dequantize(arrays: Mapping[str, mx.array], quantization: Quantization) -> mx.array:
    scales = arrays["scales"]
    biases = arrays.get("biases")
    if biases is not None:
        scales = scales.astype(mx.float32)
        biases = biases.astype(mx.float32)
    return quantization.dequantize(arrays["weight"], scales, biases, mx.float32)


def _check_finite(entry: OutputTensor, arrays: Mapping[str, mx.array], problem: str) -> None:
    for part, values in arrays.items():
        if values.dtype in FLOAT_DTYPES and not all_finite(values):
            name = entry.tensors[part].name if part in entry.tensors else entry.path
            raise QuantizationError(f"tensor {name} holds {problem}")
