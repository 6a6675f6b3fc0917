"""How the codes of a matrix are chosen, and in which order the parameters of a model then are best taken."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Quantization
from mlxarch.errors import QuantizationError
from mlxarch.progress import Progress, silent
from mlxarch.quantize.calibration import Tokens
from mlxarch.quantize.families import Families
from mlxarch.quantize.importance import Gathering, Inputs
from mlxarch.quantize.packing import Packer, Recent
from mlxarch.quantize.pulls import Pulls, token_bytes
from mlxarch.quantize.rows import Pack, round_rows
from mlxarch.quantize.tables import TOKENS, uses
from mlxarch.quantize.trail import Trail
from mlxarch.tensors import Tensor
from mlxarch.weights import Resolved

Method = Literal["search", "gptq", "round"]
METHODS: dict[Method, str] = {
    "search": "scales and biases searched for by the importance of the input channels, then error feedback",
    "gptq": "error feedback and the search for scales and biases in turn",
    "round": "rounded to nearest",
}

Stored = Callable[[str], Tensor | None]
"""A parameter as it was quantized, by its published name; None of one that was not."""

PULLED = 4 << 30  # bytes of a file, within which more tokens than the usual ones pass back


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
    tokens: Tokens,
    todo: Collection[str],
    progress: Progress = silent,
    stored: Stored | None = None,
    scratch: Path | None = None,
) -> Iterator[Turn]:
    """Each of ``todo``, in the order in which it is best taken.

    What is rounded comes in the order of ``todo``; else tables first and then layer by layer, each in the order of its
    products, for the inputs of a layer are known when those before it have been passed. One pass back before that tells
    of tables.

    Given ``stored``, which tells what became of a parameter that was taken before, errors are fed back between rows and
    columns, and later matrices make up for earlier ones, as far as other tokens tell; see ``trail``. The pass back
    tells of all outputs then, and what it told of is packed whole, row after row. What pulls at the outputs stands in a
    file without a name meanwhile, in the folder ``scratch`` or where the system has its own; see ``scratch_bytes``.
    """
    left = dict.fromkeys(todo)
    if method == "round" or not left:
        yield from (Turn(name, round_rows) for name in left)
        return
    published, coupled = resolved.architecture.published, stored is not None

    def packed(path: str) -> Tensor | None:
        name = published(path)
        return None if stored is None or name in left else stored(name)

    with tempfile.TemporaryFile(dir=scratch) as file:
        pulls, recent = Pulls(file), Recent()
        kept, count = (pulls, tokens_back(resolved)) if coupled else (None, TOKENS)
        used = uses(resolved, tokens.inputs, progress=progress, kept=kept, scratch=scratch, count=count)

        def turn(
            path: str, inputs: Inputs | None, owed: np.ndarray | None = None, related: Families | None = None
        ) -> Turn:
            name, high = published(path), prod(resolved.tensors[path].shape[-2:-1])
            del left[name]
            if inputs is None:
                return Turn(name, round_rows)
            ahead = method == "search" and path not in used
            packer = Packer(inputs, high, partial(pulls.of, path), ahead, owed, recent, related)
            return Turn(name, packer.pack, inputs.unreached, packer.span if path in pulls else 1)

        for path, own in used.items():
            if published(path) in left:
                # one weight for each channel cannot stand for both ways in which a table is used
                keep = method == "gptq" or len(own.rows) > 1
                related = own.families(resolved.tensors[path].shape[0]) if coupled and keep else None
                yield turn(path, Inputs.of(np.concatenate(own.rows), keep=keep), related=related)
        gathering = Gathering(resolved, tokens.inputs, keep=coupled)
        trail = Trail(resolved, tokens.trail, packed) if coupled and tokens.trail else None
        if trail:
            trail.begin()
        for index, (paths, found) in enumerate(gathering.layers(progress)):
            for path in [path for path in paths if path not in found] + list(found):
                if published(path) in left:
                    inputs = found.pop(path, None)
                    owed = trail.owed(path) if trail else None
                    yield turn(path, inputs, owed)
            recent.forget()
            if trail and index < trail.count:
                trail.advance()
            if not left:
                return
        yield from (Turn(name, round_rows) for name in left)


def tokens_back(resolved: Resolved) -> int:
    """How many tokens tell how outputs are pulled at, if there are as many."""
    return max(PULLED // token_bytes(resolved), TOKENS)


def scratch_bytes(resolved: Resolved, method: Method, batches: Sequence[mx.array]) -> int:
    """What ``in_turn`` needs of the disk while it goes on."""
    there = sum(batch.size for batch in batches)
    return 0 if method == "round" else min(tokens_back(resolved), there) * token_bytes(resolved)
