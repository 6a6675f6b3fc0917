"""Log-probabilities of tokens, by the model itself: before bias, penalties, temperature and masks."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxarch.errors import InvalidInput

MAX_TOP_LOGPROBS = 20

LogprobArrays = tuple[mx.array, mx.array, mx.array]
"""Log-probability of each token (B,), and the most likely tokens (B, n) with theirs."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities by the model itself, before bias, penalties, temperature and masks.

    Attributes:
        token: token that was chosen, or that stands in the prompt.
        logprob: its log-probability.
        top: most likely tokens with theirs, the most likely one first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def check_top_logprobs(count: int | None) -> None:
    """Refuse a number of most likely tokens that is out of its range.

    Raises:
        InvalidInput: it is not None and not a whole number from 0 to 20.
    """
    if count is not None and (type(count) is not int or not 0 <= count <= MAX_TOP_LOGPROBS):
        raise InvalidInput(
            f"top_logprobs must be a whole number from 0 to {MAX_TOP_LOGPROBS}, found {count!r}"
        )


def compute_logprobs(
    logits: mx.array, total: mx.array, tokens: mx.array, count: int
) -> LogprobArrays:
    """Log-probabilities of the tokens (B,) and of the ``count`` most likely ones (B, count).

    Args:
        logits: logits (B, V).
        total: logarithm of the sum of exp(logit), (B,).
        tokens: chosen tokens (B,).
        count: number of most likely tokens.
    """
    logits = logits.astype(mx.float32)
    own = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - total
    if not count:
        return own, mx.zeros((len(tokens), 0), mx.uint32), mx.zeros((len(tokens), 0))
    count = min(count, logits.shape[-1])
    top = mx.argpartition(-logits, count - 1, axis=-1)[:, :count]
    values = mx.take_along_axis(logits, top, axis=-1) - total[:, None]
    return own, top, values


def read_logprobs(tokens: Sequence[int], arrays: LogprobArrays) -> list[TokenLogprobs]:
    """Wait for log-probabilities, and return them for each of the tokens (B,)."""
    results: list[TokenLogprobs] = []
    for token, logprob, ids, those in zip(tokens, *map(np.asarray, arrays), strict=True):
        order = np.argsort(-those, kind="stable")
        pairs = tuple((int(ids[index]), float(those[index])) for index in order)
        results.append(TokenLogprobs(token, float(logprob), pairs))
    return results


class LogprobRecorder:
    """Log-probabilities of one row's tokens: computed with each step, read in the same order.

    Args:
        count: number of most likely tokens beside each chosen one.

    Attributes:
        latest: those of the token that was read last.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pending: deque[LogprobArrays] = deque()
        self.latest: TokenLogprobs | None = None

    @property
    def state(self) -> list[LogprobArrays]:
        """Arrays that are not read yet."""
        return list(self._pending)

    def compute(self, logits: mx.array, tokens: mx.array) -> None:
        """Add the log-probabilities of a token (1,), from logits (1, V), to the graph."""
        total = mx.logsumexp(logits.astype(mx.float32), axis=-1)
        self._pending.append(compute_logprobs(logits, total, tokens, self._count))

    def read(self, token: int) -> None:
        """Wait for those of the oldest token that is not read yet: ``latest``."""
        [self.latest] = read_logprobs([token], self._pending.popleft())
