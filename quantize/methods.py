"""How the codes of a matrix are chosen, and in which order the parameters of a model then are best taken."""

from collections.abc import Collection, Iterator, Sequence
from math import prod
from typing import Literal

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.errors import QuantizationError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.gptq import Feedback
from mlxarch.quantize.importance import Gathering, Inputs
from mlxarch.quantize.rounding import affine
from mlxarch.quantize.rows import Loss, Pack, round_rows
from mlxarch.quantize.search import search
from mlxarch.quantize.tables import uses
from mlxarch.weights import Resolved

Method = Literal["search", "gptq", "round"]
METHODS: dict[Method, str] = {
    "search": "scales and biases searched for by the importance of the input channels",
    "gptq": "error feedback on searched scales and biases",
    "round": "rounded to nearest",
}


def checked(method: str | None, wanted: Quantization | None, calibration: object = None) -> Method:
    """The method asked for. Without one, a search wherever there are scales and biases to search for.

    Raises:
        QuantizationError: it does not exist, or not for these settings; or a calibration text without a use for it.
    """
    affine = wanted is not None and wanted.mode == "affine"
    known: list[Method] = list(METHODS)
    if method is None:
        chosen: Method = "search" if affine else "round"
    elif method not in known:
        raise QuantizationError(f"method {method!r} does not exist; allowed: {', '.join(known)}")
    else:
        chosen = known[known.index(method)]
    if chosen != "round" and not affine:
        raise QuantizationError(
            f"method {chosen!r} chooses scales and biases, which only mode affine has; leave it out"
        )
    if chosen == "round" and calibration is not None:
        raise QuantizationError("rounding looks at no text; leave out the calibration, or choose method search or gptq")
    return chosen


def in_turn(
    resolved: Resolved, method: Method, batches: Sequence[mx.array], todo: Collection[str], progress: Progress = silent
) -> Iterator[tuple[str, Pack, list[int]]]:
    """Each of ``todo``, by its published name, with how to pack it, and those of its experts that no token reached.

    What is rounded comes in the order of ``todo``; else layer by layer, for the inputs of a layer are known when those
    before it have been passed, and of tables when the likelihood has been passed back.
    """
    left = dict.fromkeys(todo)
    gathering = None if method == "round" else Gathering(resolved, batches, keep=method == "gptq")
    for paths, found in gathering.layers(progress) if gathering else ():
        due = {path: name for path in paths if (name := resolved.architecture.published(path)) in left}
        if gathering and not gathering.tables.isdisjoint(due):
            found |= _tables(uses(resolved, batches, progress=progress), keep=method == "gptq")
        for path, name in due.items():
            del left[name]
            inputs, high = found.get(path), prod(resolved.tensors[path].shape[-2:-1])
            if inputs is None:
                yield name, round_rows, []
            else:
                yield name, (_feeder if inputs.rows else _searcher)(inputs, high), inputs.unreached
        if not left:
            return
    for name in left:
        yield name, round_rows, []


def _tables(used: dict[str, list[np.ndarray]], keep: bool) -> dict[str, Inputs]:
    """The rows are kept of a table that is used in two ways: one weight for each channel cannot stand for both."""
    return {path: Inputs.of(np.concatenate(rows), keep=keep or len(rows) > 1) for path, rows in used.items()}


def _searcher(inputs: Inputs, high: int) -> Pack:
    """For a matrix of ``high`` rows, or for one of each expert's."""
    importance = mx.array(inputs.importance())

    def pack(rows: mx.array, start: int, to: Quantization, dtype: mx.Dtype, loss: Loss) -> dict[str, mx.array]:
        own = importance[0] if len(importance) == 1 else importance[mx.arange(start, start + len(rows)) // high]
        found = search(rows, to, dtype, own)
        loss.add_weighted(np.asarray(found.error), np.asarray(found.rounded))
        return affine(mx.unflatten(rows.astype(mx.float32), -1, (-1, to.group_size)), found.grid, to.bits, dtype)

    return pack


def _feeder(inputs: Inputs, high: int) -> Pack:
    """As ``_searcher``, with error feedback; an expert that no token reached is only searched."""
    searched = _searcher(inputs, high)
    held: dict[int, Feedback] = {}  # one at a time

    def pack(rows: mx.array, start: int, to: Quantization, dtype: mx.Dtype, loss: Loss) -> dict[str, mx.array]:
        pieces, at, count = [], start, len(inputs.rows)
        while at < start + len(rows):
            expert = at // high if count > 1 else 0
            end = min(start + len(rows), (expert + 1) * high) if count > 1 else start + len(rows)
            part = rows[at - start : end - start]
            if inputs.counts[expert] == 0:
                pieces.append(searched(part, at, to, dtype, loss))
            else:
                if expert not in held:
                    held.clear()
                    held[expert] = Feedback(np.concatenate(inputs.rows[expert]))
                parts, error, rounded = held[expert].pack(part, to, dtype)
                loss.add_weighted(error, rounded)
                pieces.append(parts)
            at = end
        return {name: mx.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    return pack
