"""Streaming parser of an answer that may call functions: text and control tokens in, events out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mlxarch.tool_calls.events import CallEvent, CallFailed, CallWriter
from mlxarch.tool_calls.form import CallForm
from mlxarch.tool_calls.scanner import FIRST_MARK, MAX_MARKS, Broken, Scanner, Steps
from mlxarch.tool_calls.tool import Tool

_REPLACEMENTS = {FIRST_MARK + index: "\ufffd" for index in range(MAX_MARKS)}

AnswerPart = str | CallEvent
"""Text of the answer, or an event of a call."""


class CallParser:
    """Parser of one answer.

    Attributes:
        inside: whether the position is within a call, where text belongs to no answer.
        warnings: a sentence for each text that looked like a call and was none.
    """

    def __init__(self, form: CallForm, tools: Sequence[Tool], warnings: Sequence[str] = ()) -> None:
        self._form = form
        self._tools: Mapping[str, Tool] = {tool.name: tool for tool in tools}
        marks = form.marks.values() if form.openings else ()
        self._codes = {mark.token: mark.code for mark in marks if mark.token is not None}
        self._texts = {ord(mark.code): mark.text for mark in marks if mark.token is not None}
        self._scan = Scanner()
        self._calls = CallWriter(*form.id_format)
        self._steps = self._run()
        self._last = "\n"  # last character of the answer's text
        self._began = False  # whether the answer has text or a call
        self._message = ""  # text of a call that is a message of its own
        self.inside = False
        self.warnings = list(warnings)

    def is_mark(self, token: int) -> bool:
        """Whether a token delimits calls."""
        return token in self._codes

    def add_text(self, text: str) -> list[AnswerPart]:
        """Add text, and return what it completes."""
        self._scan.buffer += text.translate(_REPLACEMENTS)
        return self._advance()

    def add_mark(self, token: int) -> list[AnswerPart]:
        """Add a token that delimits calls, and return what it completes."""
        self._scan.buffer += self._codes[token]
        return self._advance()

    def finish(self) -> list[AnswerPart]:
        """End the answer, and return what was held back."""
        self._scan.ended = True
        return self._advance()

    def begin_message(self, name: str) -> CallEvent:
        """Start a call that is a message of its own, addressed to a function."""
        self._message = ""
        return self._calls.start(name)

    def add_message(self, text: str) -> list[CallEvent]:
        """Add text of such a message."""
        text = text if self._message else text.lstrip()
        self._message += text
        return [self._calls.arguments(text)] if text else []

    def end_message(self, text: str) -> list[CallEvent]:
        """Add the last text of such a message, and end the call."""
        return [*self.add_message(text), self._calls.finish(self._message)]

    def _advance(self) -> list[AnswerPart]:
        parts: list[AnswerPart] = []
        for part in self._steps:
            if part is None:
                break
            if isinstance(part, CallFailed):
                parts.append(replace(part, text=part.text.translate(self._texts)))
            elif not isinstance(part, str):
                parts.append(part)
            elif part:
                parts.append(part.translate(self._texts))
        return parts

    def _run(self) -> Steps[None]:
        """Alternate between free text and calls until the answer ends."""
        scan = self._scan
        while (yield from self._free_text()):
            self.inside = True
            self._began = True
            scan.begin()
            try:
                yield from self._form.read(scan, self._calls, self._tools)
                if scan.taken.strip() and self._calls.open:
                    raise Broken("the call has no end")
            except Broken as problem:
                yield from self._give_up(problem)
            self.inside = False

    def _give_up(self, problem: Broken) -> Steps[None]:
        """Give out a broken call as text."""
        written = self._scan.taken
        if self._scan.ended:
            written += self._scan.take(len(self._scan.buffer))
        reason = str(problem).translate(self._texts)
        if self._calls.open:
            yield self._calls.fail(written, reason)
            return
        self.warnings.append(f"what looks like a call is none, and is given as text: {reason}")
        self._last = written[-1:] or self._last
        yield written

    def _free_text(self) -> Steps[bool]:
        """Pass on text up to the beginning of a call. Return whether one begins."""
        scan = self._scan
        while True:
            opening = self._find_opening()
            if opening is not None:
                yield self._text(scan.take(opening).rstrip("\n"))
                return True
            if scan.ended:
                yield self._text(scan.take(len(scan.buffer)))
                return False
            yield self._text(scan.take(self._certain()))
            yield None

    def _text(self, text: str) -> str:
        if text:
            self._last = text[-1]
            self._began = self._began or bool(text.strip())
        return text

    def _find_opening(self) -> int | None:
        buffer = self._scan.buffer
        found: list[int] = []
        for text, place in self._form.openings:
            at = buffer.find(text)
            while at >= 0 and not self._fits(at, place):
                at = buffer.find(text, at + 1)
            if at >= 0:
                found.append(at)
        return min(found, default=None)

    def _fits(self, at: int, place: str) -> bool:
        before = self._scan.buffer[:at]
        if place == "start":
            return not self._began and not before.strip()
        if place == "line":
            return (before[-1:] or self._last) == "\n"
        return True

    def _certain(self) -> int:
        """Number of characters that cannot belong to an opening, nor to newlines before one."""
        buffer = self._scan.buffer
        held = 0
        for text, _ in self._form.openings:
            longest = min(len(text) - 1, len(buffer))
            held = max(
                held, next((n for n in range(longest, 0, -1) if buffer.endswith(text[:n])), 0)
            )
        certain = len(buffer) - held
        while certain and buffer[certain - 1] == "\n":
            certain -= 1
        return 0 if not self._began and not buffer[:certain].strip() else certain
