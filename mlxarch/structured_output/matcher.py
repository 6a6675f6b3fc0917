"""Masks of the next token: the state of one answer in a compiled grammar."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import llguidance
import numpy as np

from mlxarch.errors import ConstraintError
from mlxarch.structured_output.answer_check import violations


class ThinkingTracker(Protocol):
    """Observer of the tokens of an answer that knows whether the model is thinking."""

    @property
    def thinking(self) -> bool:
        """Whether the next token belongs to the thinking."""
        ...

    def add(self, token: int, /) -> object:
        """Take the next token."""
        ...


@dataclass(frozen=True)
class Start:
    """Beginning of the constrained part of an answer.

    Attributes:
        thinking: tells where the model's thinking ends; None if the answer begins without.
        may_open: token with which the model may begin to think first; None if it may not.
        triggers: tokens of which one must appear before the grammar begins, with this token;
            empty to begin at once. Until then the model writes what it likes.
    """

    thinking: ThinkingTracker | None = None
    may_open: int | None = None
    triggers: frozenset[int] = frozenset()


class Matcher:
    """State of one answer: which tokens may come next.

    Attributes:
        begun: whether the grammar has begun; before, the model thinks or writes free text.
    """

    def __init__(
        self,
        state: llguidance.LLMatcher,
        vocab_size: int,
        start: Start,
        newlines: frozenset[int] = frozenset(),
    ) -> None:
        """Build a matcher; ``Grammar.matcher`` does.

        Args:
            state: state of llguidance, which this object changes.
            vocab_size: width of the logits.
            start: where the grammar begins.
            newlines: tokens of nothing but newlines, allowed between thinking and answer.
        """
        self._state = state
        self._vocab_size = vocab_size
        self._start = start
        self._newlines = newlines
        self._gap: frozenset[int] = frozenset()  # tokens allowed besides those of the grammar
        self._ended = False
        self.begun = start == Start()
        if not self.begun and not self._is_thinking and start.may_open is not None:
            self._gap = frozenset({start.may_open})

    @property
    def _is_thinking(self) -> bool:
        return self._start.thinking is not None and self._start.thinking.thinking

    @property
    def stopped(self) -> bool:
        """Whether the grammar is complete, so that no further token can follow."""
        return self._ended or (self.begun and self._state.is_stopped())

    def mask(self) -> np.ndarray | None:
        """Tokens that may come next.

        Returns:
            Booleans (V,) that are true for allowed tokens; None if every token is allowed.

        Raises:
            ConstraintError: the grammar exceeds its limits, or no token of the vocabulary fits.
        """
        if not self.begun and (self._is_thinking or self._start.triggers):
            return None
        data = np.frombuffer(self._state.compute_bitmask(), np.uint8)
        if self._state.is_error():
            raise self._error()
        allowed = np.unpackbits(data, bitorder="little", count=self._vocab_size).view(np.bool_)
        if not self.begun and self._gap:
            allowed[list(self._gap)] = True
        if not allowed.any():
            raise ConstraintError(
                "no token of the vocabulary can continue the answer in its grammar; change the "
                "grammar, or answer without one"
            )
        return allowed

    def consume(self, token: int) -> None:
        """Take the token that was chosen.

        Raises:
            ConstraintError: the grammar does not allow it.
        """
        if self._ended:
            return
        if not self.begun and not self._begin(token):
            return
        if not self._state.consume_token(token):
            raise self._error()

    def end(self) -> None:
        """Take an end token outside of the grammar: nothing follows."""
        self._ended = True

    def _begin(self, token: int) -> bool:
        """Follow the tokens before the grammar. Return whether ``token`` is the first within it."""
        was_thinking = self._is_thinking
        if self._start.thinking is not None:
            self._start.thinking.add(token)
        if was_thinking or self._is_thinking:
            if not self._is_thinking:
                self._gap = self._newlines
            return False
        if token in self._gap:
            self._gap = frozenset()
            return False
        if self._start.triggers and token not in self._start.triggers:
            return False
        self.begun = True
        return True

    def _error(self) -> ConstraintError:
        reason = self._state.get_error().strip().splitlines()
        return ConstraintError(
            f"the grammar of the answer failed: {reason[0][:300] if reason else 'no reason given'}"
        )


@dataclass(frozen=True)
class Grammar:
    """Compiled grammar; ``matcher`` gives a fresh state for each answer.

    Attributes:
        rule: the grammar as an expression of a Lark rule, to be built into a larger grammar.
        warnings: a sentence for each part of a schema that the grammar does not hold.
        schema: the JSON schema that the finished answer is checked against; None if the grammar
            holds all of it.
    """

    rule: str
    warnings: tuple[str, ...]
    schema: Any
    _state: llguidance.LLMatcher
    _vocab_size: int
    _newlines: frozenset[int]

    @property
    def is_json(self) -> bool:
        """Whether the answer is JSON."""
        return self.rule.startswith("%json")

    def matcher(self, start: Start | None = None) -> Matcher:
        """Return the state for one answer.

        Args:
            start: where the constrained part begins; None begins with the first token.
        """
        state = self._state.deep_copy()
        return Matcher(state, self._vocab_size, start or Start(), self._newlines)

    def violations(self, answer: Any) -> Sequence[str]:
        """Say where a finished, parsed answer breaks what the grammar could not hold."""
        return [] if self.schema is None else violations(answer, self.schema)
