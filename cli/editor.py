"""Where questions come from: an editor on a terminal, or the lines of a pipe."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from mlxarch.cli.output import is_terminal, say
from mlxarch.cli.signals import Terminated

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding.key_processor import KeyPress

QUOTES = '"""'
PROMPT, MORE = ">>> ", "... "


class Interrupted(Exception):
    """Ctrl-C at the prompt; ``text`` is what stood there and is gone."""

    def __init__(self, text: str) -> None:
        self.text = text


class Editor(Protocol):
    """Reads one input at a time."""

    def read(self) -> str:
        """The next input, stripped; raises EOFError at the end and Interrupted at Ctrl-C."""
        ...


def editor(history: Path, commands: Sequence[str]) -> Editor:
    """The editor where a person types, else the reader of lines."""
    if is_terminal(sys.stdin) and (is_terminal(sys.stdout) or is_terminal(sys.stderr)):
        return Terminal(history, commands)
    return Lines(sys.stdin)


def is_open(text: str) -> bool:
    """Whether a block that begins with three quotes lacks the three that end it."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) < 2


def unquoted(text: str) -> str:
    """What was typed, without the three quotes around it."""
    text = text.strip()
    if text.startswith(QUOTES):
        text = text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


class Lines:
    """Lines of a pipe or a file, each an input of its own; three quotes begin and end one of several lines."""

    def __init__(self, stream: TextIO | None) -> None:
        self._lines = iter(stream or ())

    def read(self) -> str:
        """See Editor; an open block ends with the input."""
        try:
            text = next(self._lines)
            while is_open(text):
                text += next(self._lines, QUOTES)
        except StopIteration:
            raise EOFError from None
        except UnicodeDecodeError as error:
            from mlxarch.errors import InvalidInput

            raise InvalidInput(f"standard input is no text in UTF-8: {error}") from error
        except Terminated:
            raise
        except KeyboardInterrupt:
            raise Interrupted("") from None
        return unquoted(text)


class Terminal:
    """A line editor with history, completion of commands, and inputs of several lines.

    Enter sends; Alt-Enter and Ctrl-J break the line; a paste keeps its line breaks.
    """

    def __init__(self, history: Path, commands: Sequence[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import create_output

        self._session: PromptSession[str] = PromptSession(
            message=PROMPT,
            history=_history(history),
            multiline=True,
            prompt_continuation=lambda width, *_: MORE.rjust(width),
            key_bindings=_keys(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            output=create_output(always_prefer_tty=True),
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """See Editor."""
        with _enter_kept():
            self._take_typed_ahead()
            return unquoted(self._session.prompt())

    def _take_typed_ahead(self) -> None:
        """Lines that were entered where no editor was: the terminal made Enter a line break, as Ctrl-J is."""
        import fcntl
        import termios

        from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
        from prompt_toolkit.input.vt100_parser import Vt100Parser

        terminal, typed = sys.stdin.fileno(), b""
        while int.from_bytes(fcntl.ioctl(terminal, termios.FIONREAD, bytes(4)), sys.byteorder):
            typed += os.read(terminal, 4096)  # of whole lines only; the rest waits for the editor
        keys: list[KeyPress] = get_typeahead(self._session.input)  # what the editor read and has not used
        Vt100Parser(keys.append).feed(typed.decode(errors="replace").replace("\n", "\r"))
        store_typeahead(self._session.input, keys)


@contextmanager
def _enter_kept() -> Iterator[None]:
    """Let Enter arrive as itself from now on, also before the editor has the terminal."""
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    termios.tcsetattr(terminal, termios.TCSANOW, [before[0] & ~termios.ICRNL, *before[1:]])
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def _keys():  # -> KeyBindings, which is imported only here
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        event.app.exit(exception=Interrupted(event.current_buffer.text), style="class:aborting")

    return keys


def _history(path: Path) -> "History":
    """Inputs of earlier times; for their owner's eyes only, and in memory where the file cannot be had."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
    except OSError as error:
        say(f"mlxarch: the input history is not kept: {path}: {error.strerror or error}", dim=True)
        return InMemoryHistory()
    return FileHistory(os.fspath(path))
