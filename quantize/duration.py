"""Duration of a conversion on this machine, estimated before it starts."""

import time

import mlx.core as mx
import numpy as np

from mlxarch.quantization.scheme import check_quantization
from mlxarch.quantize.calibration.input_stats import InputStats
from mlxarch.quantize.methods.matrix_quantizer import MatrixQuantizer
from mlxarch.quantize.methods.row_chunks import ErrorStats
from mlxarch.quantize.schedule import Method

_SIZE = 512  # rows, channels and tokens of the sample
# Time of a whole conversion, a weight, by that of a weight of the sample: 1.0 for the search on
# SmolLM2-135M (164 s on two cores), 4.7 for gptq
_FACTORS: dict[Method, float] = {"search": 1.0, "gptq": 4.7, "round": 0.01}


def estimate_seconds(parameters: int, method: Method = "search") -> float:
    """Estimate how long the quantization of a model takes, from a sample of half a second.

    The estimate is rough: within a factor of two on a machine that does nothing else.

    Args:
        parameters: number of weights.
        method: quantization method.
    """
    return _FACTORS[method] * parameters * _sample_seconds() / _SIZE**2


def _sample_seconds() -> float:
    """Quantize a random matrix by search, with feedback across columns and rows, and time it."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((_SIZE, _SIZE), dtype=np.float32)
    gradients = random.standard_normal((_SIZE, _SIZE), dtype=np.float32)
    weights = mx.array(random.standard_normal((_SIZE, _SIZE), dtype=np.float32))
    mx.eval(weights)
    start = time.perf_counter()
    quantizer = MatrixQuantizer(
        InputStats.from_inputs(inputs, keep=True),
        out_features=_SIZE,
        output_gradients=lambda _, first, stop: gradients[:, first:stop],
        static_groups=True,
    )
    quantization = check_quantization(4, None, "affine")
    parts = quantizer.quantize_rows(weights, 0, quantization, mx.float16, ErrorStats())
    mx.eval(*parts.values())
    return time.perf_counter() - start
