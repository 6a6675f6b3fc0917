"""Matchers: what may come before the grammar begins, and how an answer ends."""

import numpy as np
import pytest
from random_answers import make_compiler

from mlxarch.errors import ConstraintError
from mlxarch.structured_output.matcher import Matcher, Start

TOKENIZER, COMPILER = make_compiler("qwen3")
OPEN, CLOSE, TRIGGER = 100, 101, 102  # any tokens will do for these roles
NEWLINE = TOKENIZER.encode("\n")[0]


class Thinking:
    """Tracker with an opening and a closing token."""

    def __init__(self, thinking: bool) -> None:
        self.thinking = thinking

    def add(self, token: int) -> None:
        self.thinking = token == OPEN or (self.thinking and token != CLOSE)


def allowed(matcher: Matcher) -> set[int] | None:
    mask = matcher.mask()
    return None if mask is None else set(np.flatnonzero(mask).tolist())


def digit(text: str) -> int:
    return TOKENIZER.encode(text, add_special_tokens=False)[0]


def test_a_grammar_begins_behind_the_thinking_and_a_newline() -> None:
    matcher = COMPILER.regex("[0-9]").matcher(Start(thinking=Thinking(True)))
    plain = allowed(COMPILER.regex("[0-9]").matcher())
    assert plain is not None
    for token in (5, digit("7"), TRIGGER):
        assert allowed(matcher) is None
        matcher.consume(token)
    matcher.consume(CLOSE)
    after = allowed(matcher)
    assert after is not None and after > plain and NEWLINE in after
    matcher.consume(NEWLINE)
    assert allowed(matcher) == plain  # no second newline
    assert not matcher.stopped
    matcher.consume(digit("7"))
    assert matcher.stopped


def test_a_model_may_open_its_thinking_itself_or_answer_at_once() -> None:
    grammar = COMPILER.regex("[0-9]")
    plain = allowed(grammar.matcher())
    thinks = grammar.matcher(Start(thinking=Thinking(False), may_open=OPEN))
    assert plain is not None and allowed(thinks) == plain | {OPEN}
    thinks.consume(OPEN)
    assert allowed(thinks) is None
    thinks.consume(CLOSE)
    thinks.consume(digit("3"))
    assert thinks.stopped
    answers = grammar.matcher(Start(thinking=Thinking(False), may_open=OPEN))
    answers.consume(digit("3"))
    assert answers.stopped


def test_a_trigger_begins_the_grammar_and_belongs_to_it() -> None:
    grammar = COMPILER.lark(f"start: <[{TRIGGER}]> /[0-9]/")
    start = Start(thinking=Thinking(True), triggers=frozenset({TRIGGER}))
    matcher = grammar.matcher(start)
    for token in (TRIGGER, CLOSE, 7, 8):  # the first one is in the thinking
        matcher.consume(token)
        assert allowed(matcher) is None
        assert not matcher.stopped
    matcher.consume(TRIGGER)
    assert digit("4") in (allowed(matcher) or ())
    assert len(allowed(matcher) or ()) < 20


def test_a_token_that_the_grammar_excludes_is_refused() -> None:
    matcher = COMPILER.regex("[0-9]").matcher()
    with pytest.raises(ConstraintError, match="grammar of the answer"):
        matcher.consume(digit("x"))


def test_a_vocabulary_without_a_fitting_token_is_named() -> None:
    matcher = COMPILER.lark('start: "a" <[102]>').matcher()
    matcher.consume(digit("a"))
    matcher._vocab_size = 100  # as if the logits ended before the only token
    with pytest.raises(ConstraintError, match="no token of the vocabulary"):
        matcher.mask()
