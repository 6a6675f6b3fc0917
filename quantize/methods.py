"""How the codes of a matrix are chosen, and in which order the parameters of a model then are best taken."""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.errors import QuantizationError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.importance import Gathering, Inputs
from mlxarch.quantize.packing import Packer
from mlxarch.quantize.pulls import Pulls, token_bytes
from mlxarch.quantize.rows import Pack, round_rows
from mlxarch.quantize.tables import TOKENS, uses
from mlxarch.weights import Resolved

Method = Literal["search", "gptq", "round"]
METHODS: dict[Method, str] = {
    "search": "scales and biases searched for by the importance of the input channels, then error feedback",
    "gptq": "error feedback and the search for scales and biases in turn",
    "round": "rounded to nearest",
}

PULLED = 4 << 30  # bytes of a file, within which more tokens than the usual ones pass back for gptq


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


class Turn(NamedTuple):
    """A parameter, by its published name.

    Attributes:
        pack: how its rows are packed.
        unreached: experts of it that no token reached.
        together: rows, from the first of a matrix on, that have to come to ``pack`` at once.
    """

    name: str
    pack: Pack
    unreached: Sequence[int] = ()
    together: int = 1


def in_turn(
    resolved: Resolved,
    method: Method,
    batches: Sequence[mx.array],
    todo: Collection[str],
    progress: Progress = silent,
    coupled: bool = True,
    scratch: Path | None = None,
) -> Iterator[Turn]:
    """Each of ``todo``, in the order in which it is best taken.

    What is rounded comes in the order of ``todo``; else layer by layer, for the inputs of a layer are known when those
    before it have been passed. One pass back before that tells of tables, and if ``coupled`` of all outputs, how an
    error costs; what is ``coupled`` is packed whole, row after row. What pulls at the outputs stands in a file without
    a name meanwhile, in the folder ``scratch`` or where the system has its own; see ``scratch_bytes``.
    """
    left = dict.fromkeys(todo)
    with tempfile.TemporaryFile(dir=scratch) as file:
        if method != "round" and left:
            pulls = Pulls(file)
            kept, count = (pulls, tokens_back(resolved, method)) if coupled else (None, TOKENS)
            used = uses(resolved, batches, progress=progress, kept=kept, scratch=scratch, count=count)
            gathering = Gathering(resolved, batches, keep=coupled)
            for paths, found in gathering.layers(progress):
                due = {path: name for path in paths if (name := resolved.architecture.published(path)) in left}
                if not gathering.tables.isdisjoint(due):
                    found |= _tables(used, keep=method == "gptq")
                for path, name in due.items():
                    del left[name]
                    inputs, high = found.pop(path, None), prod(resolved.tensors[path].shape[-2:-1])
                    if inputs is None:
                        yield Turn(name, round_rows)
                        continue
                    ahead = method == "search" and path not in gathering.tables
                    packer = Packer(inputs, high, partial(pulls.of, path), ahead)
                    yield Turn(name, packer.pack, inputs.unreached, packer.span if path in pulls else 1)
                if not left:
                    return
    for name in left:
        yield Turn(name, round_rows)


def tokens_back(resolved: Resolved, method: Method) -> int:
    """How many tokens tell how outputs are pulled at, if there are as many. With errors fed back from column to column
    as well, more of them still gain something; a search has random ones, of which more are no better.
    """
    return max(PULLED // token_bytes(resolved), TOKENS) if method == "gptq" else TOKENS


def scratch_bytes(resolved: Resolved, method: Method, batches: Sequence[mx.array]) -> int:
    """What ``in_turn`` needs of the disk while it goes on."""
    there = sum(batch.size for batch in batches)
    return 0 if method == "round" else min(tokens_back(resolved, method), there) * token_bytes(resolved)


def _tables(used: dict[str, list[np.ndarray]], keep: bool) -> dict[str, Inputs]:
    """The rows are kept of a table that is used in two ways: one weight for each channel cannot stand for both."""
    return {path: Inputs.of(np.concatenate(rows), keep=keep or len(rows) > 1) for path, rows in used.items()}
