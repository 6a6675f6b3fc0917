"""Effect of a change of one vector within a model on its answers."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np


def of_moves(
    model: Callable[[mx.array], mx.array], tokens: mx.array, change: np.ndarray, move: Callable
) -> float:
    """Mean KL, summed over what follows, when ``move`` adds a change (D,) to one token of each window (B, L) at a time.

    ``move`` is given what is to be added, (B, L, D), and replaces what it was given before.
    """
    before, found = _logs(model, tokens), []
    for place in range(0, tokens.shape[1], 3):
        where = np.zeros((*tokens.shape, 1), np.float32)
        where[:, place] = 1
        move(mx.array(where * change))
        found.append((np.exp(before) * (before - _logs(model, tokens))).sum(-1).sum(1).mean())
    return float(np.mean(found))


def _logs(model: Callable[[mx.array], mx.array], tokens: mx.array) -> np.ndarray:
    logits = np.array(model(tokens)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
