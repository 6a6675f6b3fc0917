"""A model reads passages: the logits for every token in them, a few rows at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx
import numpy as np

from mlxarch.errors import InvalidInput, NonFiniteLogits
from mlxarch.progress import Progress
from mlxarch.quantize import host_attention
from mlxarch.quantize.corpus import Passage
from mlxarch.quantize.walk import Walk
from mlxarch.weights import Resolved

HEAD_LOGITS = 64 << 20  # that the head makes at once: its matrix is read again for the next
ROW_LOGITS = 4 << 20  # of those, handed out at once: in float64 and with what is made of them, some 100 MB


@dataclass(frozen=True)
class Scores:
    """Logits (R, V) in float32 for R tokens, and these tokens; ``first`` counts the rows before them."""

    logits: np.ndarray
    targets: np.ndarray
    first: int


def scores(
    resolved: Resolved, passages: Sequence[Passage], batch: int, progress: Progress, label: str
) -> Iterator[Scores]:
    """Every window of every passage, in their order, all computed in float32.

    The model's weights pass through the memory layer by layer, once for each ``batch`` windows; ``progress`` is told
    their bytes.

    Raises:
        InvalidInput: a window is longer than the model's context, or a token is none of the model's.
        NonFiniteLogits: the model's output is NaN or infinite.
    """
    windows = [window for passage in passages for window in passage.windows]
    _check(windows, resolved)
    batches = [group[at : at + batch] for group in _alike(windows) for at in range(0, len(group), batch)]
    walk = Walk(resolved, [mx.array(group) for group in batches])
    host_attention.install(walk.model)
    total, layers = sum(tensor.nbytes for tensor in resolved.parameters.values()), len(walk.model.layers)
    states = walk.embed()
    for index in range(layers):
        progress(label, total * index // layers, total)
        states = walk.layer(index, states)
    first = 0
    with walk.weights(None):
        for group, state in zip(batches, states, strict=True):
            state, targets = state[:, :-1], np.asarray(group)[:, 1:].reshape(-1)
            state = state.reshape(1, -1, *state.shape[2:])
            yield from _heads(walk, state, targets, first)
            first += len(targets)
    progress(label, total, total)


def _heads(walk: Walk, state: mx.array, targets: np.ndarray, first: int) -> Iterator[Scores]:
    many, few = (max(limit // walk.model.vocab_size, 1) for limit in (HEAD_LOGITS, ROW_LOGITS))
    for start in range(0, len(targets), many):
        logits = np.asarray(walk.model.head(state[:, start : start + many])[0])
        for at in range(0, len(logits), few):
            part = logits[at : at + few]
            if np.isnan(part).any() or not np.isfinite(part.max(-1)).all():
                raise NonFiniteLogits(
                    "the model's output is not finite: a weight is damaged; download or quantize the model again"
                )
            yield Scores(part, targets[start + at :][: len(part)], first + start + at)


def _alike(windows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Neighbours of one length."""
    return (list(group) for _, group in groupby(windows, len))


def _check(windows: list[list[int]], resolved: Resolved) -> None:
    longest, highest = max(map(len, windows)), max(map(max, windows))
    if longest > resolved.model.context_length:
        raise InvalidInput(
            f"windows of {longest} tokens: the model's context has {resolved.model.context_length}; take fewer"
        )
    if highest >= resolved.model.vocab_size:
        raise InvalidInput(
            f"token {highest} lies outside of the model's vocabulary, 0 … {resolved.model.vocab_size - 1}; tokenizer "
            "and weights belong to different models"
        )
