"""Input of a chat: a line editor on a terminal, or the lines of a pipe or file."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from mlxarch.cli.options import decode_utf8
from mlxarch.cli.output import is_terminal, print_stderr
from mlxarch.cli.signals import Terminated

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding.key_processor import KeyPress

QUOTES = '"""'
PROMPT = ">>> "
CONTINUATION = "... "


class Interrupted(Exception):
    """Ctrl-C at the prompt; ``text`` is the discarded input."""

    def __init__(self, text: str) -> None:
        self.text = text


class Editor(Protocol):
    """Reader of one input at a time."""

    def read(self) -> str:
        """Return the next input, stripped; raises EOFError at the end, Interrupted at Ctrl-C."""
        ...


def make_editor(history: Path, commands: Sequence[str]) -> Editor:
    """Return a line editor if standard input is a terminal, else a reader of its lines."""
    if is_terminal(sys.stdin) and (is_terminal(sys.stdout) or is_terminal(sys.stderr)):
        return TerminalEditor(history, commands)
    return PipeReader(sys.stdin)


def has_open_quotes(text: str) -> bool:
    """Return whether a block that begins with three quotes lacks the closing three."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) < 2


def strip_quotes(text: str) -> str:
    """Strip blanks and the three quotes around a text."""
    text = text.strip()
    if text.startswith(QUOTES):
        text = text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


class PipeReader:
    """Lines of a pipe or file, one input each; three quotes enclose an input of several lines."""

    def __init__(self, stream: TextIO | None) -> None:
        self._lines = _decoded_lines(stream)

    def read(self) -> str:
        """Return the next input; an open block ends with the stream (see ``Editor.read``).

        Raises:
            InvalidInput: the stream is not UTF-8.
        """
        try:
            text = next(self._lines)
            while has_open_quotes(text):
                text += next(self._lines, QUOTES)
        except StopIteration:
            raise EOFError from None
        except Terminated:
            raise
        except KeyboardInterrupt:
            raise Interrupted("") from None
        return strip_quotes(text)


def _decoded_lines(stream: TextIO | None) -> Iterator[str]:
    """Lines of a stream; its bytes are decoded here, since Python hides what is no UTF-8."""
    for number, line in enumerate(getattr(stream, "buffer", None) or stream or (), 1):
        yield (
            line
            if isinstance(line, str)
            else decode_utf8(line, f"standard input, line {number},", "")
        )


class TerminalEditor:
    """A line editor with history, command completion and multi-line input.

    Enter sends; Alt-Enter and Ctrl-J break the line; pasted text keeps its line breaks.
    """

    def __init__(self, history: Path, commands: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import create_output

        self._session: PromptSession[str] = PromptSession(
            message=PROMPT,
            history=_open_history(history),
            multiline=True,
            prompt_continuation=lambda width, *_: CONTINUATION.rjust(width),
            key_bindings=_make_key_bindings(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            output=create_output(always_prefer_tty=True),
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """Prompt for the next input (see ``Editor.read``)."""
        with _enter_untranslated():
            self._feed_typeahead()
            return strip_quotes(self._session.prompt())

    def _feed_typeahead(self) -> None:
        """Feed the editor lines typed before it was ready.

        The terminal translated Enter into a line feed, which the editor would take for Ctrl-J, so
        it is translated back.
        """
        import fcntl
        import termios

        from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
        from prompt_toolkit.input.vt100_parser import Vt100Parser

        terminal = sys.stdin.fileno()
        typed = b""
        while int.from_bytes(fcntl.ioctl(terminal, termios.FIONREAD, bytes(4)), sys.byteorder):
            typed += os.read(terminal, 4096)  # complete lines; the editor reads the rest itself
        # keys that the editor has read and not used come first
        keys: list[KeyPress] = get_typeahead(self._session.input)
        Vt100Parser(keys.append).feed(typed.decode(errors="replace").replace("\n", "\r"))
        store_typeahead(self._session.input, keys)


@contextmanager
def _enter_untranslated() -> Iterator[None]:
    """Keep the terminal from translating Enter into a line feed, also before the editor starts."""
    import termios

    terminal = sys.stdin.fileno()
    previous = termios.tcgetattr(terminal)
    termios.tcsetattr(terminal, termios.TCSANOW, [previous[0] & ~termios.ICRNL, *previous[1:]])
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, previous)


def _make_key_bindings():  # -> KeyBindings, which is imported only here
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        if has_open_quotes(event.current_buffer.text):
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-z")
    def _(event: KeyPressEvent) -> None:
        event.app.suspend_to_background()

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        event.app.exit(exception=Interrupted(event.current_buffer.text), style="class:aborting")

    return keys


def _open_history(path: Path) -> "History":
    """Open the input history, readable by its owner only; in memory if that fails."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
    except OSError as error:
        reason = error.strerror or error
        print_stderr(f"mlxarch: the input history is not kept: {path}: {reason}", dim=True)
        return InMemoryHistory()
    return FileHistory(os.fspath(path))
