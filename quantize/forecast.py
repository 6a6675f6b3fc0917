"""What a target leaves for each matrix, and the divergence to be expected of it, before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.errors import InvalidInput
from mlxarch.progress import Progress, silent
from mlxarch.quantize.budget import CANDIDATES, Choice, Target, check_room, choose, offers_of, ties
from mlxarch.quantize.calibration import Calibration, Tokens, tokenizer_of
from mlxarch.quantize.corpus import Text, bundled, prefix_of
from mlxarch.quantize.formats import fitting, stored_as
from mlxarch.quantize.gptq import Feedback, pack_fed
from mlxarch.quantize.methods import Method, in_turn
from mlxarch.quantize.relief import left
from mlxarch.quantize.rows import Loss
from mlxarch.quantize.sensitivity import Rounded, costs
from mlxarch.tensors import DTYPES, FLOATS, Packed, Tensor
from mlxarch.tokenizer import Tokenizer
from mlxarch.weights import Resolved, Source

TOKENS = 2048  # in all
WINDOW = 256  # of them that are read together
SHORT = 1.2  # times what a search is expected to cost; see ``forecast``


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
    texts: Sequence[Text] | None = None,
    progress: Progress = silent,
) -> Forecast:
    """Measure every matrix at every number of bits, and choose.

    For a search, costs are as much too low as the choice goes to what is thought cheap, and as what is not foretold:
    codes of few bits that are at the end of their grid and cannot follow, less what rows and layers make up for.
    ``SHORT`` is what that came to on three models, at 3.5 to 5.7 bits.

    Args:
        room: bytes for the matrices, where the target is a size.
        method: how they are going to be packed.
        dtype: of scales and biases; None is the source's.
        calibration: what the method looks at.
        texts: of which the divergence is; None takes those that come with the package. Their ends are read, for
            ``evaluate`` reads their beginnings.

    Raises:
        QuantizationError: the target is out of reach.
        InvalidInput: a text is too short.
        TokenizerError: the source has no tokenizer to read the texts with.
    """
    tokens = ends(bundled() if texts is None else texts, tokenizer_of(source), resolved.model.context_length)
    candidates = [Quantization(bits, group_size) for bits in CANDIDATES]

    def stored(path: str, to: Quantization) -> int:
        tensor = resolved.parameters[path]
        scales = "F32" if _scales(tensor, dtype) == mx.float32 else "BF16"
        fit = fitting(to, tensor.shape[-1]) or to
        return sum(prod(shape) * DTYPES[dtype].size for dtype, shape in stored_as(fit, tensor.shape, scales).values())

    several = resolved.matrices & resolved.parameters.keys()
    matrices = {path for path in several if _fits(resolved, path, candidates[0])}
    elements = sum(prod(resolved.parameters[path].shape) for path in matrices)
    room = int(target.bits * elements / 8) if target.bits is not None else room
    if room is not None:  # told before minutes go by
        least, *_, most = (sum(stored(path, to) for path in matrices) for to in candidates)
        check_room(target, room, least, most, elements)
    searched = calibration.tokens(resolved, progress, trail=False).inputs if calibration and method == "search" else []
    shares = left(resolved, searched, [tokens], progress) if searched else {}
    known = costs(resolved, tokens, candidates, rounder(resolved, method, searched, dtype, progress), progress=progress)
    short = SHORT if searched else 1
    found = {path: {to: short * shares.get(path, 1) * cost for to, cost in of.items()} for path, of in known.items()}
    measured = [path for path in resolved.parameters if path in found and path in matrices]
    offers = offers_of(ties(resolved.model, measured), found, stored)
    choice: Choice = choose(offers, room, target.kl)
    published = resolved.architecture.published
    return Forecast({published(path): to for path, to in choice.settings.items()}, choice.forecast)


def rounder(
    resolved: Resolved,
    method: Method,
    searched: list[mx.array],
    dtype: mx.Dtype | None = None,
    progress: Progress = silent,
) -> Rounded:
    """Pack some rows and unpack them as the conversion will do it: for the inputs that its method looks at, and not
    for those of the texts that tell the divergence, to which a search would fit better than to any other.

    Of what a search feeds errors back by, too much would have to be kept of all layers at once, so that it does less
    here; see ``relief``. gptq gets half of the inputs that tell the divergence.

    Args:
        searched: token ids (B, L) that a search looks at, if it is one.
    """
    matrices = resolved.published_matrices
    turns = in_turn(resolved, "search" if searched else "round", Tokens(searched, []), matrices, progress)
    packs = {turn.name: turn.pack for turn in turns}

    def rounded(path: str, index: int, rows: mx.array, inputs: np.ndarray, to: Quantization) -> mx.array:
        tensor, pieces = resolved.parameters[path], []
        scales, high, pack = _scales(tensor, dtype), tensor.shape[-2], packs[resolved.architecture.published(path)]
        if method == "gptq":
            parts, _, _ = pack_fed(Feedback(inputs[::2]), rows, to, scales)
            return _unpacked(parts, to)
        for start in range(0, len(rows), high):  # rows of one matrix of a stack, which may be fewer than are drawn
            parts = pack(rows[start : start + high], index * high, to, scales, Loss())
            pieces.append(_unpacked(parts, to))
        return mx.concatenate(pieces)

    return rounded


def _unpacked(parts: dict[str, mx.array], to: Quantization) -> mx.array:
    scales, biases = (parts[name].astype(mx.float32) for name in ("scales", "biases"))
    return mx.dequantize(parts["weight"], scales, biases, to.group_size, to.bits)


def _scales(tensor: Tensor, dtype: mx.Dtype | None) -> mx.Dtype:
    kind = dtype or (tensor.parts["scales"].dtype if isinstance(tensor, Packed) else tensor.dtype)
    return kind if kind in FLOATS else mx.float32


def _fits(resolved: Resolved, path: str, to: Quantization) -> bool:
    return fitting(to, resolved.parameters[path].shape[-1]) is not None


def ends(texts: Sequence[Text], tokenizer: Tokenizer, context: int) -> mx.array:
    """Windows (B, L) of the second halves of texts, evenly spaced.

    Raises:
        InvalidInput: a text is too short.
    """
    prefix, share = prefix_of(tokenizer), max(TOKENS // len(texts), WINDOW // 8)
    bodies = [tokenizer.encode(text.content, add_special_tokens=False) for text in texts]
    half = min(len(body) // 2 for body in bodies)
    length = min(WINDOW, share, half, context - len(prefix))
    if length < 2:
        shortest = min(zip(map(len, bodies), texts, strict=True), key=lambda pair: pair[0])[1]
        raise InvalidInput(f"text {shortest.name} is too short to foretell a divergence by; name a longer one")
    count = share // length
    starts = [
        (body, len(body) - length - (len(body) // 2 - length) * i // count) for body in bodies for i in range(count)
    ]
    return mx.array([[*prefix, *body[start : start + length]] for body, start in starts])
