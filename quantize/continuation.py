"""Tokens that a model writes itself: text as it knows it, of which no data are needed.

What is large together with what, and how an error goes on through a model, random tokens tell less well than such as
follow from each other. A few that do are enough: passages of 8 do three quarters of what passages of 128 do.
"""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from mlxarch.blocks import Step
from mlxarch.progress import Progress, silent
from mlxarch.quantize import host_attention
from mlxarch.quantize.walk import Walk, quiet
from mlxarch.weights import Resolved

PASSAGE = 8  # tokens, the first of them as it was
LOGITS = 16 << 20  # of them at once


def continued(
    resolved: Resolved, batches: Sequence[mx.array], seed: int = 0, progress: Progress = silent
) -> list[mx.array]:
    """Batches (B, L) in which every ``PASSAGE``-th token is as it was, and the model wrote those behind it.

    The weights are read once for each token of a passage. ``progress`` is told the tokens of a passage that are done.
    """
    if not batches:
        return []
    sizes = [batch.size for batch in batches]
    flat = np.concatenate([np.asarray(batch).ravel() for batch in batches])
    length = min(PASSAGE, resolved.model.context_length)
    firsts = flat[::length]
    with quiet():
        written = _written(resolved, firsts, length, np.random.default_rng(seed), progress)
    pieces = np.split(written.ravel()[: len(flat)], np.cumsum(sizes)[:-1])
    return [mx.array(piece).reshape(batch.shape) for piece, batch in zip(pieces, batches, strict=True)]


def _written(
    resolved: Resolved, firsts: np.ndarray, length: int, draw: np.random.Generator, progress: Progress
) -> np.ndarray:
    """Passages (N, length) that begin with ``firsts`` (N,)."""
    walk = Walk(resolved, [])
    host_attention.install(walk.model)
    caches, passages = walk.model.make_caches(length), [firsts]
    for done in range(1, length):
        progress("writing passages", done - 1, length - 1)
        step, tokens = Step(1, caches), mx.array(passages[-1][:, None])
        with walk.weights(None):
            state = walk.model.embed(tokens, step)
            mx.eval(state)
        for index, layer in enumerate(walk.model.layers):
            with walk.weights(index):
                state = layer(state, step, caches[index])
                mx.eval(state, *(value for value in step.shared.values() if isinstance(value, mx.array)))
        at_once = max(LOGITS // walk.model.vocab_size, 1)
        with walk.weights(None):
            drawn = map(partial(_drawn, walk, draw), (state[i : i + at_once] for i in range(0, len(firsts), at_once)))
            passages.append(np.concatenate(list(drawn)))
    return np.stack(passages, axis=1)


def _drawn(walk: Walk, draw: np.random.Generator, state: mx.array) -> np.ndarray:
    """A token for each of the states (N, 1, …), by its chances."""
    logits = np.array(walk.model.head(state).astype(mx.float32))[:, 0]
    logits -= logits.max(-1, keepdims=True)
    np.exp(logits, out=logits)
    return np.array([drawn(row, draw) for row in logits], np.int64)


def drawn(chances: np.ndarray, draw: np.random.Generator) -> int:
    """One of some tokens, by chances (V,) that need not add up to 1."""
    sums = np.cumsum(chances, dtype=np.float64)
    return min(int(np.searchsorted(sums, draw.random() * sums[-1], "right")), len(sums) - 1)
