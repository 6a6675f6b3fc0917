"""An answer on its way to standard output: Markdown that is rendered while it grows, or the text as it comes."""

import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from mlxarch.cli.output import colored, is_terminal, visible

if TYPE_CHECKING:
    from rich.markdown import Markdown as RichMarkdown
    from rich.text import Text as RichText


class Writer(Protocol):
    """Takes an answer piece by piece."""

    def add(self, text: str) -> None:
        """More of it."""
        ...

    def finish(self) -> None:
        """That was all for now: end the line, if one has begun."""
        ...


def writer(plain: bool = False) -> Writer:
    """The renderer where standard output is a terminal with colors, unless ``plain``; else the text itself."""
    return Text() if plain or not colored(sys.stdout) else Markdown()


def thoughts(hidden: bool = False) -> Writer:
    """Shows the thinking where standard error is a terminal, unless ``hidden``."""
    return Thoughts() if is_terminal(sys.stderr) and not hidden else Silence()


class Thoughts:
    """What a model thinks, on standard error: dim, or between two lines that say so; an empty line follows."""

    def __init__(self) -> None:
        colors = colored(sys.stderr)
        self._before, self._after = ("\x1b[2m", "\x1b[0m") if colors else ("", "")
        self._head, self._foot = ("", "\n") if colors else ("(thinking)\n", "(answer)\n")
        self._last = ""  # character that was written; "" outside of a thought

    def add(self, text: str) -> None:
        """Write it at once."""
        if text := visible(text):
            head = "" if self._last else self._head
            self._last = text[-1]
            self._write(f"{head}{self._before}{text}{self._after}")

    def finish(self) -> None:
        """End the line."""
        if self._last:
            self._write(("" if self._last == "\n" else "\n") + self._foot)
            self._last = ""

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


class Silence:
    """Shows nothing."""

    def add(self, text: str) -> None:
        """Ignore it."""

    def finish(self) -> None:
        """Nothing to end."""


class Text:
    """The text itself, with control characters made visible; it ends with a newline."""

    _last = "\n"

    def add(self, text: str) -> None:
        """Write it at once."""
        if text := visible(text):
            self._last = text[-1]
            sys.stdout.write(text)
            sys.stdout.flush()

    def finish(self) -> None:
        """End the line, unless the text did."""
        if self._last != "\n":
            self._last = "\n"
            sys.stdout.write("\n")
            sys.stdout.flush()


class Markdown:
    """Markdown on a terminal. A finished block is written once; only the last one is written anew as it grows."""

    def __init__(self) -> None:
        from markdown_it import MarkdownIt
        from rich.console import Console

        # HTML would be swallowed, and with it what a model wraps in tags of its own; so would be the address of an
        # image
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("image")
        self._blocks = MarkdownIt("commonmark", {"html": False}).enable("table").disable("inline")
        self._console = Console(file=sys.stdout)
        self._tail = _Tail()
        self._source = ""  # of what is not finished
        self._next = 0.0  # when to write next, on the clock of time.monotonic

    def add(self, text: str) -> None:
        """Show it, soon: a screen needs no more than 25 pictures in a second, and each may take a fifth of the time."""
        self._source += visible(text)
        begin = time.monotonic()
        if begin >= self._next:
            self._show(_presentable(self._source))
            self._next = begin + max(0.04, 5 * (time.monotonic() - begin))

    def finish(self) -> None:
        """Show the rest, and end the line."""
        self._show(self._source)
        self._source = ""
        self._tail.end()

    def _show(self, source: str) -> None:
        columns, rows = self._console.size
        done = self._finished(source)
        lines = self._rendered(source[done:], columns)
        if done:
            finished = [*self._rendered(source[:done], columns), ""]
            self._tail.show([*finished, *lines], columns, rows)
            self._tail.release(len(finished))
            self._source = self._source[done:]
        else:
            self._tail.show(lines, columns, rows)

    def _finished(self, source: str) -> int:
        """Where the last block begins: what stands before it can change no more, whatever follows.

        Only whole lines count, since what a line is may depend on its end.
        """
        lines = source.split("\n")[:-1]
        tokens = self._blocks.parse("\n".join(lines))
        starts = [token.map[0] for token in tokens if token.level == 0 and token.nesting >= 0 and token.map]
        return sum(len(line) + 1 for line in lines[: starts[-1]]) if len(starts) > 1 else 0

    def _rendered(self, source: str, columns: int) -> list[str]:
        if not source.strip():
            return []
        document = _document()
        document.parsed = self._parser.parse(source)
        for token in document.parsed:
            for child in token.children or ():
                if child.type == "softbreak":  # a model that ends a line means it
                    child.type = "hardbreak"
        with self._console.capture() as captured:
            self._console.print(document, width=columns - 1)
        return [_trimmed(line) for line in captured.get().strip("\n").split("\n")]


def _document() -> "RichMarkdown":
    """An empty document: a link shows where it leads, and a heading stands on the left."""
    from rich import markdown

    class Heading(markdown.Heading):
        def __rich_console__(self, console: object, options: object) -> Iterator["RichText"]:  # type: ignore[override]
            self.text.justify = "left"
            yield self.text

    document = markdown.Markdown("", code_theme="ansi_dark", hyperlinks=False)
    document.elements = {**document.elements, "heading_open": Heading}  # type: ignore[misc]
    return document


_UNDECIDED = re.compile(r"(?:[\s>]*[-=#*_`~+|:>]*|\s*\d+[.)]?)\s*\Z")


def _presentable(source: str) -> str:
    """Without a last line that consists of marks alone: what they mean shows in what follows."""
    start = source.rfind("\n") + 1
    return source[:start] if _UNDECIDED.match(source, start) else source


_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_PADDING = re.compile(r"(?: |\x1b\[0?m)+\Z")


def _trimmed(line: str) -> str:
    """Without the spaces that fill a line up to the width; a style that is open at their place is closed."""
    line = _PADDING.sub("", line)
    last = _STYLE.findall(line)[-1:]
    return f"{line}\x1b[0m" if last and last[0] not in ("\x1b[0m", "\x1b[m") else line


class _Tail:
    """The last lines on the terminal, which may still change. The cursor stands behind the last of them."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def show(self, lines: list[str], columns: int, rows: int) -> None:
        """Turn the lines that are shown into ``lines``, writing from the first that differs on, all in one piece.

        What has left the screen at its top cannot be changed, and is not written a second time.
        """
        old = self._lines
        if not lines or lines == old:
            return
        same = next((i for i, pair in enumerate(zip(old, lines, strict=False)) if pair[0] != pair[1]), len(old))
        start = max(min(same, len(lines) - 1), len(old) - rows, 0)
        new = lines[start:] or [""]
        if start >= len(old):
            text = ("\n" if old else "") + "\n".join(new)
        elif start == len(old) - 1 and new[0].startswith(old[start]):
            text = "\n".join(new)[len(old[start]) :]
        else:
            up = sum(_height(line, columns) for line in old[start:]) - 1
            # line by line: erasing from the top of the screen on would send all of it to the scrollback of some
            text = (f"\x1b[{up}A" if up else "") + "\r" + "\n".join(f"{line}\x1b[K" for line in new)
            text += "\x1b[J" if len(new) < len(old) - start or up >= len(old) - start else ""
        self._lines = [*old[:start], *new]
        sys.stdout.write(text)
        sys.stdout.flush()

    def release(self, count: int) -> None:
        """The first ``count`` lines will not change any more."""
        del self._lines[:count]

    def end(self) -> None:
        """End the last line."""
        if self._lines:
            self._lines = []
            sys.stdout.write("\n")
            sys.stdout.flush()


def _height(line: str, columns: int) -> int:
    """Rows that a line takes; more than one only after the window became narrower."""
    from rich.cells import cell_len

    return max(1, -(-cell_len(_STYLE.sub("", line)) // columns))
