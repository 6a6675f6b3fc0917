"""Scanner of streamed text: parsers are generators that wait for more text by yielding None.

Control tokens stand in the text as single noncharacters of Unicode (U+FDD0 on), so that a mark is
told from its spelling in ordinary text.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from mlxarch.tool_calls.events import CallEvent

FIRST_MARK = 0xFDD0
MAX_MARKS = 32
_MAX_DEPTH = 128
_BLANKS = " \t\r\n"

T = TypeVar("T")
Steps = Generator[CallEvent | str | None, None, T]
"""Parser: yields events, texts of the answer, and None where it waits for more text."""


class Broken(Exception):
    """The text is no call of the expected form."""


@dataclass(frozen=True)
class Mark:
    """Text that delimits a call.

    Attributes:
        text: its spelling.
        token: its token id; None if it is spelled with ordinary tokens.
        code: how it stands in the scanned text.
    """

    text: str
    token: int | None
    code: str

    @property
    def lark(self) -> str:
        """The mark in a Lark rule."""
        return quoted(self.text) if self.token is None else f"<[{self.token}]>"


def quoted(text: str) -> str:
    """Return a text as a string of a Lark rule."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def is_mark(character: str) -> bool:
    """Whether a character of the scanned text stands for a control token."""
    return FIRST_MARK <= ord(character) < FIRST_MARK + MAX_MARKS


class Scanner:
    """Text that arrives in pieces, with a position in it.

    Attributes:
        buffer: text from the position on, as far as it has arrived.
        taken: text before the position, since ``begin``.
        ended: whether no more text will arrive.
    """

    def __init__(self) -> None:
        self.buffer = ""
        self.taken = ""
        self.ended = False

    def begin(self) -> None:
        """Remember from here on what is taken."""
        self.taken = ""

    def take(self, count: int) -> str:
        """Move the position by a number of characters that have arrived."""
        text = self.buffer[:count]
        self.buffer = self.buffer[count:]
        self.taken += text
        return text

    def rewind(self, length: int) -> None:
        """Move the position back to where ``taken`` had a length."""
        self.buffer = self.taken[length:] + self.buffer
        self.taken = self.taken[:length]

    def wait(self) -> Steps[bool]:
        """Wait until a character has arrived. Return whether one has."""
        while not self.buffer and not self.ended:
            yield None
        return bool(self.buffer)

    def blanks(self) -> Steps[str]:
        """Skip blanks and newlines."""
        skipped = ""
        while (yield from self.wait()) and self.buffer[0] in _BLANKS:
            skipped += self.take(1)
        return skipped

    def accept(self, *literals: str) -> Steps[str | None]:
        """Take one of some texts if it comes next; the longest that fits."""
        while True:
            partial = [
                each for each in literals if each.startswith(self.buffer) and each != self.buffer
            ]
            if not partial or self.ended:
                break
            yield None
        fitting = [each for each in literals if each and self.buffer.startswith(each)]
        return self.take(len(max(fitting, key=len))) if fitting else None

    def expect(self, *literals: str) -> Steps[str]:
        """Take one of some texts.

        Raises:
            Broken: another text comes next.
        """
        found = yield from self.accept(*literals)
        if found is None:
            raise Broken(f'"{literals[0]}" is missing')
        return found

    def until(self, *ends: str, limit: int = 1 << 20) -> Steps[tuple[str, str]]:
        """Take the text before one of some ends, and the end.

        Raises:
            Broken: the answer is over before, or the text is too long.
        """
        while True:
            found = [(at, end) for end in ends if (at := self.buffer.find(end)) >= 0]
            if found:
                at, end = min(found)
                return self.take(at), self.take(len(end))
            if self.ended or len(self.buffer) > limit:
                raise Broken(f'"{ends[0]}" is missing')
            yield None

    def pieces_until(self, end: str, emit: Callable[[str], CallEvent | str]) -> Steps[None]:
        """Pass on the text before an end as it arrives, and take the end.

        Raises:
            Broken: the answer is over before.
        """
        while (at := self.buffer.find(end)) < 0:
            held = next(
                (
                    n
                    for n in range(min(len(end) - 1, len(self.buffer)), 0, -1)
                    if self.buffer.endswith(end[:n])
                ),
                0,
            )
            if self.ended:
                raise Broken(f'"{end}" is missing')
            if len(self.buffer) > held:
                yield emit(self.take(len(self.buffer) - held))
            yield None
        if at:
            yield emit(self.take(at))
        self.take(len(end))

    def json_value(self, emit: Callable[[str], CallEvent] | None = None) -> Steps[str]:
        """Take a JSON value, without checking more than its brackets and strings.

        Args:
            emit: receives the text as it arrives; its events are yielded.

        Returns:
            The text of the value.

        Raises:
            Broken: the answer is over before, or a mark is inside.
        """
        yield from self.blanks()
        state = _JsonState()
        value = ""
        while not state.complete:
            if not (yield from self.wait()):
                if state.scalar and value:
                    break
                raise Broken("the answer is over within a JSON value")
            piece = self.take(state.advance(self.buffer))
            value += piece
            if piece and emit is not None:
                yield emit(piece)
        return value


class _JsonState:
    """Position within a JSON value: depth of brackets, and whether in a string."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.escaped = False
        self.complete = False
        self.scalar = False

    def advance(self, text: str) -> int:
        """Read on. Return how many characters belong to the value."""
        for index, character in enumerate(text):
            if is_mark(character):
                if self.scalar:
                    self.complete = True
                    return index
                raise Broken("a control token stands within a JSON value")
            if self.in_string:
                self._in_string(character)
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.depth += 1
                if self.depth > _MAX_DEPTH:
                    raise Broken("the arguments nest too deeply")
            elif character in "}]" and self.depth:
                self.depth -= 1
                self.complete = self.depth == 0
            elif self.depth == 0:
                if character in "}]," or character in _BLANKS:
                    self.complete = True
                    return index
                self.scalar = True
            if self.complete:
                return index + 1
        return len(text)

    def _in_string(self, character: str) -> None:
        if self.escaped:
            self.escaped = False
        elif character == "\\":
            self.escaped = True
        elif character == '"':
            self.in_string = False
            self.complete = self.depth == 0
