"""Least length of an answer: until it is reached, no end token may be chosen."""

from collections.abc import Collection

import numpy as np

from mlxarch.engine.request import TokenMatcher


class LeastLength:
    """Constraint on the tokens of one answer, around another one or none.

    Args:
        end_ids: tokens that end an answer.
        tokens: tokens before which none of them is allowed; None forbids them altogether.
        vocab_size: width of the logits.
        inner: further constraint on the tokens; None for none. Where it allows end tokens only, the
            answer ends.
    """

    def __init__(
        self,
        end_ids: Collection[int],
        tokens: int | None,
        vocab_size: int,
        inner: TokenMatcher | None,
    ) -> None:
        self._left = tokens
        self._inner = inner
        self._goes_on = np.ones(vocab_size, bool)
        self._goes_on[[token for token in end_ids if token < vocab_size]] = False

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._inner is not None and self._inner.stopped

    def mask(self) -> np.ndarray | None:
        """Tokens that may come next, bool (V,); None if all may."""
        allowed = None if self._inner is None else self._inner.mask()
        if self._left is not None and self._left <= 0:
            return allowed
        if allowed is None:
            return self._goes_on
        longer = allowed & self._goes_on
        return longer if longer.any() else allowed

    def consume(self, token: int) -> None:
        """Advance by a token of the answer."""
        if self._left is not None:
            self._left -= 1
        if self._inner is not None:
            self._inner.consume(token)
