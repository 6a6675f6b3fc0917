"""Answers as text: pieces of a streamed answer, whole results, and the way from tokens to both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mlxarch.generation.logprobs import TokenLogprobs
from mlxarch.generation.stopping import StopStrings
from mlxarch.generation.thinking.splitter import (
    Segment,
    always_thinks,
    split_at_closing_tag,
    splitter,
)
from mlxarch.generation.timings import Timings
from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.events import (
    CallArguments,
    CallEvent,
    CallFailed,
    CallFinished,
    CallStarted,
    ToolCall,
)
from mlxarch.tool_calls.parser import AnswerPart, CallParser

AnswerEvent = Segment | CallEvent
"""Text of the answer or of the thinking, or an event of a call."""


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
        call: event of a call of a tool; None for text.
        warnings: on the last piece, a sentence for each call that was broken.
        logprobs: log-probabilities of the token, if asked for.
    """

    text: str
    token: int | None
    finish_reason: str | None
    timings: Timings
    thinking: bool = False
    call: CallEvent | None = None
    warnings: Sequence[str] = ()
    logprobs: TokenLogprobs | None = None

    @classmethod
    def of(
        cls,
        event: "AnswerEvent",
        token: int | None,
        finish_reason: str | None,
        timings: Timings,
        warnings: Sequence[str] = (),
        logprobs: TokenLogprobs | None = None,
    ) -> "Piece":
        """Build the piece for an event."""
        if isinstance(event, Segment):
            text, thinking = event
            return cls(
                text, token, finish_reason, timings, thinking, None, warnings, logprobs=logprobs
            )
        return cls("", token, finish_reason, timings, False, event, warnings, logprobs)

    @property
    def event(self) -> "AnswerEvent":
        """The text, or the event of a call."""
        return self.call or Segment(self.text, self.thinking)


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
        calls: functions that the model wants called, with their arguments.
        parsed: the answer as a value, if a schema was given and the answer is complete; else None.
        warnings: a sentence for each part of a request that could not be held.
        logprobs: log-probabilities of ``tokens``, if asked for; else empty.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    parsed: Any = None
    warnings: tuple[str, ...] = ()
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message of the assistant, for the next turn."""
        fields: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            fields["reasoning_content"] = self.thinking
        if self.calls:
            fields["tool_calls"] = [call.message for call in self.calls]
        return fields


class AnswerReader:
    """Incremental conversion of tokens to text and calls, with thinking kept apart from the answer.

    Args:
        tokenizer: the model's tokenizer.
        prompt: token ids of the prompt.
        stop: strings that end the answer; they are searched in its text only.
        calls: parser of calls; None for an answer without tools.
        continues: whether the answer continues the prompt's text, with the blank in front of its
            first word, rather than being a message of its own.
        constrained: whether the answer has a form, and so no tags but those of the prompt.

    Attributes:
        tokenizer: tokenizer of the model.
        ended: whether an end token or a stop string of the answer has appeared.
        warnings: a sentence for each text that looked like a call and was none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: str | Sequence[str],
        calls: CallParser | None = None,
        *,
        continues: bool = False,
        constrained: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self._eos_ids = tokenizer.eos_ids
        self._stops = StopStrings(stop)
        presumes = calls is None and not constrained
        self._splitter = splitter(tokenizer, prompt, continues=continues, presumes=presumes)
        self._calls = calls
        self.warnings: list[str] = [] if calls is None else calls.warnings
        self._recipient = self._splitter.recipient
        self.ended = False

    @property
    def thinking(self) -> bool:
        """Whether the next text belongs to the thinking."""
        return self._splitter.thinking

    @property
    def stop_string(self) -> str | None:
        """Stop string that ended the answer; None if none did."""
        return self._stops.match

    def add(self, token: int) -> list[AnswerEvent]:
        """Segments of text, and events of calls, that ``token`` completes."""
        if token in self._eos_ids:
            self.ended = True
            return []
        if self._calls is None:
            return self._until_stop(self._splitter.add(token))
        return self._until_stop(self._with_calls(self._calls, token))

    def finish(self) -> list[AnswerEvent]:
        """Segments and events that were held back until now."""
        rest: list[AnswerEvent] = []
        if not self._stops.found:
            ending: list[AnswerEvent] = []
            segments = self._splitter.finish()
            if self.ended and (answer := self._splitter.untagged):
                segments.append(Segment(answer, False))
            if self._calls is None:
                ending += segments
            elif self._recipient is not None:
                texts = "".join(segment.text for segment in segments)
                ending += self._calls.end_message(texts)
            else:
                ending += self._read_calls(self._calls, segments)
                ending += _segments(self._calls.finish())
            rest = self._until_stop(ending)
        text = self._stops.flush()
        return [*rest, Segment(text, False)] if text else rest

    def _with_calls(self, calls: CallParser, token: int) -> list[AnswerEvent]:
        """Lead a token to the splitter of thinking or to the parser of calls."""
        reader = self._splitter
        if calls.is_mark(token) and not reader.thinking:
            before: list[AnswerEvent] = []
            if calls.inside:
                before += _segments(calls.add_text("".join(each.text for each in reader.finish())))
            else:
                before += self._read_calls(calls, reader.cut())
            return before + _segments(calls.add_mark(token))
        if calls.inside:
            return _segments(calls.add_text(reader.raw(token)))
        segments = reader.add(token)
        if self._recipient is None and reader.recipient is None:
            return self._read_calls(calls, segments)
        return self._read_message(calls, "".join(each.text for each in segments))

    def _read_message(self, calls: CallParser, text: str) -> list[AnswerEvent]:
        """Read a message that is addressed to a function, or has been until now."""
        events: list[AnswerEvent] = []
        if self._recipient is None:
            self._recipient = self._splitter.recipient
            assert self._recipient is not None
            events.append(calls.begin_message(self._recipient))
        elif self._splitter.recipient is None:
            self._recipient = None
            events += calls.end_message(text)
        else:
            events += calls.add_message(text)
        return events

    @staticmethod
    def _read_calls(calls: CallParser, segments: Sequence[Segment]) -> list[AnswerEvent]:
        """Search the answer's text for calls; thinking passes."""
        events: list[AnswerEvent] = []
        for segment in segments:
            events += [segment] if segment.thinking else _segments(calls.add_text(segment.text))
        return events

    def _until_stop(self, events: Sequence[AnswerEvent]) -> list[AnswerEvent]:
        """Cut the events at the first stop string in the answer's text."""
        result: list[AnswerEvent] = []
        for event in events:
            if not isinstance(event, Segment):
                if held := self._stops.flush():  # a stop string does not reach across a call
                    result.append(Segment(held, False))
                result.append(event)
                continue
            released = event.text if event.thinking else self._stops.feed(event.text)
            if released:
                result.append(Segment(released, event.thinking))
            if self._stops.found:
                self.ended = True
                break
        return result


def _segments(parts: Sequence[AnswerPart]) -> list[AnswerEvent]:
    return [Segment(part, False) if isinstance(part, str) else part for part in parts]


class AnswerCollector:
    """Whole answer, put together from its events.

    Args:
        tokenizer: tokenizer of the model; with it, thinking that was closed without being opened is
            told from the answer.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer
        self._texts = {False: "", True: ""}  # by whether it is thinking
        self._started: dict[int, CallStarted] = {}
        self._arguments: dict[int, str] = {}
        self._failures: list[str] = []
        self.calls: list[ToolCall] = []

    def add(self, event: AnswerEvent) -> None:
        """Append an event."""
        match event:
            case Segment(text, thinking):
                self._texts[thinking] += text
            case CallStarted(index):
                self._started[index] = event
                self._arguments[index] = ""
            case CallArguments(index, text):
                self._arguments[index] += text
            case CallFinished(index):
                text = self._arguments[index] or "{}"
                call = self._started[index]
                self.calls.append(ToolCall(call.id, call.name, msgspec.json.decode(text), text))
            case CallFailed(index, text, reason):
                self._texts[False] += text
                name = self._started[index].name
                self._failures.append(f"a call of {name} is given as text: {reason}")

    def result(
        self, tokens: list[int], reason: str, timings: Timings, warnings: Sequence[str] = ()
    ) -> Result:
        """Complete answer."""
        thinking, text = self._texts[True], self._texts[False]
        if self._tokenizer is not None:
            thinking, text = whole_answer(self._tokenizer, thinking, text)
        return Result(
            text=text,
            tokens=tokens,
            finish_reason=reason,
            timings=timings,
            thinking=thinking,
            calls=self.calls,
            warnings=(*warnings, *self._failures),
        )


def whole_answer(tokenizer: Tokenizer, thinking: str, text: str) -> tuple[str, str]:
    """Return thinking and answer of a complete result.

    They differ from the pieces of a stream where the model closed its thinking without opening it,
    and where an answer was presumed to be thinking.
    """
    if not thinking:
        return split_at_closing_tag(tokenizer, text)
    presumed = thinking == text and always_thinks(tokenizer)
    return ("", text) if presumed else (thinking, text)


class BatchRow:
    """Answer to one prompt of a batch, while it grows.

    Attributes:
        reader: reader of its tokens.
        tokens: tokens so far.
        logprobs: log-probabilities of the tokens, if asked for.
        is_complete: whether its form lets nothing follow.
    """

    def __init__(self, reader: AnswerReader) -> None:
        self.reader = reader
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.is_complete = False
        self._answer = AnswerCollector(reader.tokenizer)

    def add(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Append a token, unless the answer has ended."""
        if not self.reader.ended:
            self.tokens.append(token)
            self.logprobs += [] if logprobs is None else [logprobs]
            for event in self.reader.add(token):
                self._answer.add(event)

    def result(self, timings: Timings) -> Result:
        """Complete answer."""
        for event in self.reader.finish():
            self._answer.add(event)
        reason = "stop" if self.reader.ended or self.is_complete else "length"
        result = self._answer.result(self.tokens, reason, timings, self.reader.warnings)
        result.logprobs = self.logprobs
        return result
