"""Limit on a model's thinking: at the limit, the token that ends it is the only one allowed."""

from collections.abc import Sequence

import numpy as np

from mlxarch.engine.request import TokenMatcher
from mlxarch.generation.thinking.splitter import TAGS, splitter
from mlxarch.tokenizer.tokenizer import Tokenizer


def end_of_thinking(tokenizer: Tokenizer) -> int | None:
    """Token that ends the thinking; None for a model without such a token."""
    ids = (tokenizer.token_id(closing) for _, closing in TAGS)
    return next((token for token in ids if token is not None), None)


class ThinkingBudget:
    """Constraint on the tokens of one answer, around another one or none.

    Args:
        tokenizer: the model's tokenizer.
        prompt: token ids of the prompt, whose end says whether the answer begins with thinking.
        end: token that ends the thinking.
        budget: tokens that the model may think.
        vocab_size: width of the logits.
        inner: further constraint on the tokens; None for none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        end: int,
        budget: int,
        vocab_size: int,
        inner: TokenMatcher | None,
    ) -> None:
        self._tracker = splitter(tokenizer, prompt)
        self._left = budget
        self._inner = inner
        self._only_end = np.zeros(vocab_size, bool)
        self._only_end[end] = True

    @property
    def stopped(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._inner is not None and self._inner.stopped

    def mask(self) -> np.ndarray | None:
        """Tokens that may come next, bool (V,); None if all may."""
        if self._tracker.thinking and self._left <= 0:
            return self._only_end
        return None if self._inner is None else self._inner.mask()

    def consume(self, token: int) -> None:
        """Advance by a token of the answer."""
        self._left -= self._tracker.thinking
        self._tracker.add(token)
        if self._inner is not None:
            self._inner.consume(token)
