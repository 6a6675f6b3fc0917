"""What a target leaves for each matrix, and the divergence to be expected of it, before anything is written."""

from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.errors import QuantizationError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.budget import CANDIDATES, Choice, Target, choose, offers_of, ties
from mlxarch.quantize.calibration import Calibration, tokenizer_of
from mlxarch.quantize.corpus import bundled
from mlxarch.quantize.formats import fitting, stored_as
from mlxarch.quantize.gptq import Feedback
from mlxarch.quantize.methods import Method
from mlxarch.quantize.rounding import affine, quantize
from mlxarch.quantize.search import search
from mlxarch.quantize.sensitivity import Rounded, costs
from mlxarch.tensors import DTYPES, FLOATS, Packed
from mlxarch.weights import Resolved, Source

WINDOW = 256  # tokens, of each text that comes with the package
TOKENS = 1024  # of a text of the user's


@dataclass(frozen=True)
class Forecast:
    """Settings by published name, and nats per token that they are expected to cost."""

    settings: dict[str, Quantization]
    kl: float


def forecast(
    source: Source,
    resolved: Resolved,
    target: Target,
    room: int | None,
    *,
    method: Method = "search",
    group_size: int = 64,
    dtype: mx.Dtype | None = None,
    calibration: Calibration | None = None,
    progress: Progress = silent,
) -> Forecast:
    """Measure every matrix at every number of bits, and choose.

    Args:
        room: bytes for the matrices, where the target is a size.
        method: how they are going to be packed.
        dtype: of scales and biases; None is the source's.
        calibration: what to measure by; None takes the ends of the texts that come with the package.

    Raises:
        QuantizationError: the target is out of reach.
        TokenizerError: the source has no tokenizer to read the texts with.
    """
    tokens = _tokens(source, resolved, calibration)
    candidates = [Quantization(bits, group_size) for bits in CANDIDATES]
    found = costs(resolved, tokens, candidates, rounder(method), progress=progress)
    matrices = [path for path in resolved.parameters if path in found and _fits(resolved, path, candidates[0])]
    if target.bits is not None:
        room = int(target.bits * sum(prod(resolved.parameters[path].shape) for path in matrices) / 8)

    def stored(path: str, to: Quantization) -> int:
        tensor = resolved.parameters[path]
        kind = dtype or (tensor.parts["scales"].dtype if isinstance(tensor, Packed) else tensor.dtype)
        scales = "F32" if kind not in FLOATS or kind == mx.float32 else "BF16"
        fit = fitting(to, tensor.shape[-1]) or to
        return sum(prod(shape) * DTYPES[dtype].size for dtype, shape in stored_as(fit, tensor.shape, scales).values())

    offers = offers_of(ties(resolved.model, matrices), found, stored)
    choice: Choice = choose(offers, room, target.kl)
    published = resolved.architecture.published
    return Forecast({published(path): to for path, to in choice.settings.items()}, choice.forecast)


def rounder(method: Method) -> Rounded:
    """Pack some rows and unpack them: as the conversion will do it, for inputs that half of the tokens tell of."""

    def rounded(path: str, rows: mx.array, inputs: np.ndarray, to: Quantization) -> mx.array:
        known = inputs[::2]
        if method == "round":
            parts = quantize(rows, to, mx.float32)
        elif method == "gptq":
            parts, _, _ = Feedback(known).pack(rows, to, mx.float32)
        else:
            importance = mx.array(np.square(known).mean(0))
            grid = search(rows, to, mx.float32, importance).grid
            parts = affine(mx.unflatten(rows, -1, (-1, to.group_size)), grid, to.bits, mx.float32)
        return mx.dequantize(parts["weight"], parts["scales"], parts["biases"], to.group_size, to.bits)

    return rounded


def _fits(resolved: Resolved, path: str, to: Quantization) -> bool:
    return fitting(to, resolved.parameters[path].shape[-1]) is not None


def _tokens(source: Source, resolved: Resolved, calibration: Calibration | None) -> mx.array:
    """(B, L)"""
    if calibration is not None:
        batch = calibration.batches[0]
        return batch[: max(TOKENS // batch.shape[1], 1), :TOKENS]
    tokenizer, length = tokenizer_of(source), min(WINDOW, resolved.model.context_length)
    ends = [tokenizer.encode(text.content, add_special_tokens=False)[-length:] for text in bundled()]
    shortest = min(map(len, ends))
    if shortest < 2:
        raise QuantizationError("the tokenizer makes nothing of the texts; name one with --calibration")
    return mx.array([end[-shortest:] for end in ends])
