"""How much of its error a matrix is rid of when a search feeds errors back from column to column: foretold, not done.

Codes at their bits move each column by as much as another, on the whole. What error feedback makes of that on inputs
that it has not seen follows from the inputs alone, so that it is known of every matrix before anything is packed.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxarch.progress import Progress, silent
from mlxarch.quantize.importance import Gathering, Inputs
from mlxarch.quantize.packing import Recent, enough
from mlxarch.quantize.walk import quiet
from mlxarch.weights import Resolved


def left(
    resolved: Resolved, heard: Sequence[mx.array], judged: Sequence[mx.array], progress: Progress = silent
) -> dict[str, float]:
    """The share of its expected squared error that feedback leaves a matrix: path -> about 0.3 to 1, for each that has
    inputs. The activations of one layer are in memory at a time.

    Args:
        heard: token ids (B, L), by which errors are fed back.
        judged: others, on whose way through the model errors count.
        progress: told the bytes of the weights passed.
    """
    ways = [Gathering(resolved, batches, keep=True) for batches in (heard, judged)]
    shares, recent = dict[str, float](), Recent()
    for (_, known), (_, seen) in zip(ways[0].layers(progress), ways[1].layers(), strict=True):
        for path, inputs in known.items():
            with quiet():
                shares[path] = _left(inputs, seen[path], recent)
        recent.forget()
    return shares


def _left(known: Inputs, seen: Inputs, recent: Recent) -> float:
    with_feedback = without = 0.0
    for rows, others, count in zip(known.rows, seen.rows, known.counts, strict=True):
        x = np.concatenate(others)
        before = float(np.vdot(x, x))
        after = recent.of(rows, ahead=True).errors(x) if enough(count, x.shape[1], ahead=True) else before
        with_feedback, without = with_feedback + after, without + before
    return with_feedback / without if 0 < without < np.inf and np.isfinite(with_feedback) else 1.0
