"""From the engine's outputs of one request to the events of its answer."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence

from mlxarch.engine.request import RequestTimings, RowOutput
from mlxarch.generation.answer import AnswerEvent, AnswerReader, whole_answer
from mlxarch.generation.logprobs import TokenLogprobs
from mlxarch.generation.thinking.splitter import Segment
from mlxarch.server.answers.events import Delta, End, Event, PromptRead, Usage
from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.events import CallFinished
from mlxarch.tool_calls.parser import CallParser

_OPENING_TAG = "<think>\n"
_CLOSING_TAG = "\n</think>\n\n"


class OutputReader:
    """Conversion of one request's outputs to events.

    Args:
        tokenizer: tokenizer of the model.
        prompt: token ids of the prompt; its end says whether the answer begins with thinking.
        stop: stop strings.
        check: called with the text of a complete answer.
        calls: parser of calls; None for an answer without tools.
        warn: called with a sentence for each text that looks like a call and is none.
        continues: whether the answer continues the text of the prompt.
        inline_thinking: give the thinking as part of the text, between tags, for clients that know
            no other place for it.

    Attributes:
        usage: token counts so far.
        ended: whether the last event has been made.
        first_difference: token of the prompt from which on the prefix cache held something else.
        end: the last event; None before it, and after an error.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str],
        check: Callable[[str], None] | None = None,
        calls: CallParser | None = None,
        warn: Callable[[str], None] | None = None,
        *,
        continues: bool = False,
        inline_thinking: bool = False,
    ) -> None:
        self._inline = inline_thinking
        self._tag_is_open = False
        self._check = check
        self._text = ""  # of the answer, if it is checked
        self._answer = AnswerReader(
            tokenizer,
            prompt,
            stop,
            calls,
            continues=continues,
            constrained=check is not None,
        )
        self._continues = continues
        self._warn = warn
        self._calls = 0  # complete ones
        self._eos_ids: Collection[int] = tokenizer.eos_ids
        self._held: list[TokenLogprobs] = []  # of tokens whose text is incomplete
        self._started = time.monotonic()
        self._prompt_read = self._started
        self.usage = Usage(prompt=len(prompt))
        self.ended = False
        self.end: End | None = None
        self.first_difference: int | None = None

    def read(self, output: RowOutput) -> Iterator[Event]:
        """Yield the events of one output.

        Raises:
            MlxArchError: the error that ended the request.
        """
        if self.ended:
            return
        if output.error is not None:
            self.ended = True
            raise output.error
        if output.prompt is not None:
            self._prompt_read = time.monotonic()
            self.usage.cached = output.prompt.cached_tokens
            self.first_difference = output.prompt.first_difference
            yield PromptRead(output.prompt)
        for index, token in enumerate(output.tokens):
            entry = output.logprobs[index] if index < len(output.logprobs) else None
            yield from self._read_token(token, entry)
            if self._answer.ended:
                break
        if self._answer.ended or output.finish_reason is not None:
            yield from self._finish(output)

    def whole(self, thinking: str, text: str) -> tuple[str, str]:
        """Return thinking and answer of a whole answer; see ``whole_answer``."""
        if self._inline or self._continues:
            return thinking, text
        return whole_answer(self._answer.tokenizer, thinking, text)

    def _read_token(self, token: int, entry: TokenLogprobs | None) -> Iterator[Event]:
        reader = self._answer
        was_thinking = reader.thinking
        segments = reader.add(token)
        in_answer = not (was_thinking or reader.thinking)
        self.usage.answer += 1
        self.usage.thinking += not in_answer
        if entry is not None and in_answer and token not in self._eos_ids:
            self._held.append(entry)
        yield from self._deltas(segments)

    def _deltas(self, events: Sequence[AnswerEvent]) -> Iterator[Event]:
        for event in events:
            if not isinstance(event, Segment):
                self._calls += isinstance(event, CallFinished)
                self._held.clear()  # of tokens that belong to the call
                yield event
            elif not event.text and not self._held:
                continue
            elif event.thinking:
                yield self._thought(event.text)
            else:
                self._text += event.text if self._check is not None else ""
                closing = _CLOSING_TAG if self._tag_is_open else ""
                self._tag_is_open = False
                yield Delta(closing + event.text, logprobs=tuple(self._held))
                self._held.clear()

    def _thought(self, text: str) -> Delta:
        if not self._inline:
            return Delta(text, thinking=True)
        opening = "" if self._tag_is_open else _OPENING_TAG
        self._tag_is_open = True
        return Delta(opening + text)

    def _finish(self, output: RowOutput) -> Iterator[Event]:
        reader = self._answer
        self.ended = True
        events = reader.finish()
        reason = "stop" if reader.ended else output.finish_reason or "stop"
        if reason == "length":
            events = [_whole_characters(event) for event in events]
        yield from self._deltas(events)
        if self._calls and reason == "stop":
            reason = "tool_calls"
        if self._check is not None and reason == "stop":
            self._check(self._text)
        if self._warn is not None:
            for warning in reader.warnings:
                self._warn(warning)
        timings = output.timings or self._timings_so_far()
        self.end = End(reason, reader.stop_string, self.usage, timings)
        yield self.end

    def _timings_so_far(self) -> RequestTimings:
        """Timings of an answer that a stop string ended, before the engine has told them."""
        reading = self._prompt_read - self._started
        return RequestTimings(0.0, reading, time.monotonic() - self._prompt_read)


def _whole_characters(event: AnswerEvent) -> AnswerEvent:
    """Event without the part of a character at its end, in which the limit has cut the answer."""
    if not isinstance(event, Segment):
        return event
    return event._replace(text=event.text.rstrip("\N{REPLACEMENT CHARACTER}"))
