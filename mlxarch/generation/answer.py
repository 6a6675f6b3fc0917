"""Answers as text: pieces of a streamed answer, whole results, and the way from tokens to both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxarch.generation.stopping import StopStrings
from mlxarch.generation.thinking import Segment, splitter
from mlxarch.generation.timings import Timings
from mlxarch.tokenizer.tokenizer import Tokenizer


@dataclass
class Piece:
    """Part of a streamed answer.

    Attributes:
        text: text to append; may be empty while a character or a stop string is incomplete.
        token: token that completed the text; None where remaining text is flushed.
        finish_reason: None until the last piece, then "stop" after an end token or a stop string,
            "length" at the limit, or "loop" where the loop guard ended it.
        timings: timings so far.
        thinking: whether the text belongs to the model's thinking rather than to the answer.
    """

    text: str
    token: int | None
    finish_reason: str | None
    timings: Timings
    thinking: bool = False


@dataclass
class Result:
    """Complete answer.

    Attributes:
        text: the answer without thinking, end token and stop string; empty if the limit came before
            the end of the thinking.
        tokens: all sampled tokens.
        finish_reason: "stop", "length" or "loop".
        timings: duration and token counts.
        thinking: the model's thinking before the answer, without its tags.
        parsed: the answer as a value, if a schema was given and the answer is complete; else None.
        warnings: a sentence for each part of a request that could not be held.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    thinking: str = ""
    parsed: Any = None
    warnings: tuple[str, ...] = ()


class AnswerReader:
    """Incremental conversion of tokens to text, with thinking kept apart from the answer.

    Attributes:
        ended: whether an end token or a stop string of the answer has appeared.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop: str | Sequence[str]
    ) -> None:
        self._eos_ids = tokenizer.eos_ids
        self._stops = StopStrings(stop)
        self._splitter = splitter(tokenizer, prompt)
        self.ended = False

    @property
    def thinking(self) -> bool:
        """Whether the next text belongs to the thinking."""
        return self._splitter.thinking

    @property
    def stop_string(self) -> str | None:
        """Stop string that ended the answer; None if none did."""
        return self._stops.match

    def add(self, token: int) -> list[Segment]:
        """Segments of text that ``token`` completes."""
        if token in self._eos_ids:
            self.ended = True
            return []
        return self._until_stop(self._splitter.add(token))

    def finish(self) -> list[Segment]:
        """Segments of text that were held back until now."""
        segments = [] if self._stops.found else self._until_stop(self._splitter.finish())
        rest = self._stops.flush()
        return [*segments, (rest, False)] if rest else segments

    def _until_stop(self, segments: list[Segment]) -> list[Segment]:
        """Cut the segments at the first stop string in the answer; thinking is not searched."""
        result: list[Segment] = []
        for text, thinking in segments:
            released = text if thinking else self._stops.feed(text)
            if released:
                result.append((released, thinking))
            if self._stops.found:
                self.ended = True
                break
        return result


class BatchRow:
    """Answer to one prompt of a batch, while it grows."""

    def __init__(self, reader: AnswerReader) -> None:
        self.reader = reader
        self.tokens: list[int] = []
        self._texts = {False: "", True: ""}  # by whether it is thinking

    def add(self, token: int) -> None:
        """Append a token, unless the answer has ended."""
        if not self.reader.ended:
            self.tokens.append(token)
            self._append(self.reader.add(token))

    def result(self, timings: Timings) -> Result:
        """Complete answer."""
        self._append(self.reader.finish())
        reason = "stop" if self.reader.ended else "length"
        return Result(self._texts[False], self.tokens, reason, timings, self._texts[True])

    def _append(self, segments: list[Segment]) -> None:
        for text, thinking in segments:
            self._texts[thinking] += text
