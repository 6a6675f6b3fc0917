"""A model reads passages: the logits for every token in them, a few rows at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx
import numpy as np

from mlxarch.blocks import CausalLM
from mlxarch.errors import InvalidInput, NonFiniteLogits
from mlxarch.quantize.corpus import Passage
from mlxarch.quantize.products import float32_products

ROW_ELEMENTS = 4 << 20  # logits that are held at once; in float64 and with what is made of them, some 100 MB


@dataclass(frozen=True)
class Scores:
    """Logits (R, V) in float32 for R tokens, and these tokens; ``first`` counts the rows before them."""

    logits: np.ndarray
    targets: np.ndarray
    first: int


def scores(model: CausalLM, passages: Sequence[Passage], batch: int) -> Iterator[Scores]:
    """Every window of every passage, ``batch`` of one length at a time, in their order.

    Raises:
        InvalidInput: a window is longer than the model's context, or a token is none of the model's.
        NonFiniteLogits: the model's output is NaN or infinite.
    """
    windows = [window for passage in passages for window in passage.windows]
    longest = max(map(len, windows))
    if longest > model.context_length:
        raise InvalidInput(f"windows of {longest} tokens: the model's context has {model.context_length}; take fewer")
    if (highest := max(map(max, windows))) >= model.vocab_size:
        raise InvalidInput(
            f"token {highest} lies outside of the model's vocabulary, 0 … {model.vocab_size - 1}; tokenizer and "
            "weights belong to different models"
        )
    first = 0
    with float32_products(model):
        for _, alike in groupby(windows, len):
            rest = list(alike)
            while rest:
                some, rest = rest[:batch], rest[batch:]
                for part in _read(model, some, first):
                    yield part
                    first += len(part.targets)


def _read(model: CausalLM, windows: list[list[int]], first: int) -> Iterator[Scores]:
    tokens = mx.array(windows)
    states = model.states(tokens)[:, :-1]
    targets = np.asarray(windows)[:, 1:].reshape(-1)
    mx.eval(states)
    states = states.reshape(1, -1, *states.shape[2:])
    step = max(ROW_ELEMENTS // model.vocab_size, 1)
    for at in range(0, len(targets), step):
        logits = np.array(model.head(states[:, at : at + step])[0].astype(mx.float32))
        if np.isnan(logits).any() or not np.isfinite(logits.max(-1)).all():
            raise NonFiniteLogits(
                "the model's output is not finite: a weight file is damaged, or the precision too low; download or "
                "quantize it again, or compute in float32"
            )
        yield Scores(logits, targets[at : at + step], first + at)
