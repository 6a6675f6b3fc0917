"""Form of an answer: its grammar, where in the answer it begins, and the finished answer as a value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from mlxarch.generation.answer import Result
from mlxarch.generation.thinking.splitter import may_begin_to_think, splitter
from mlxarch.structured_output.matcher import Grammar, Matcher, Start
from mlxarch.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class AnswerForm:
    """Grammar of an answer, and how the finished answer is read.

    Attributes:
        grammar: compiled grammar.
        parse: text of a complete answer -> value; None leaves it a text.
    """

    grammar: Grammar
    parse: Callable[[str], Any] | None

    def read(self, result: Result) -> Result:
        """Return the result with its parsed answer, and with warnings about what it breaks."""
        warnings = [*result.warnings, *self.grammar.warnings]
        parsed = None
        if result.finish_reason == "stop" and self.parse is not None:
            try:
                parsed = self.parse(result.text)
                warnings += self.grammar.violations(msgspec.json.decode(result.text))
            except msgspec.MsgspecError as problem:
                warnings.append(f"the answer cannot be read: {problem}")
        return replace(result, parsed=parsed, warnings=tuple(warnings))


def constrain(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    grammar: Grammar,
    triggers: frozenset[int] = frozenset(),
) -> Matcher:
    """Return the matcher for the answer to a prompt.

    The model thinks without constraint, if the prompt or the model begins the thinking, and the
    grammar begins behind it.

    Args:
        tokenizer: the model's tokenizer.
        prompt: token ids of the prompt.
        grammar: grammar of the answer.
        triggers: tokens that begin the grammar; empty to begin it behind the thinking.
    """
    tracker = splitter(tokenizer, prompt)
    may_open = None if tracker.thinking else may_begin_to_think(tokenizer, prompt)
    if not tracker.thinking and may_open is None and not triggers:
        return grammar.matcher()
    return grammar.matcher(Start(tracker, may_open, triggers))
