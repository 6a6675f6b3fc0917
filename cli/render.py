"""Writers for an answer while it is generated: rendered Markdown on a terminal, else plain text."""

import re
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from mlxarch.cli.code_blocks import CodeBlocks
from mlxarch.cli.output import is_terminal, show_control_characters, supports_color

if TYPE_CHECKING:
    from rich.markdown import Markdown
    from rich.text import Text


class Writer(Protocol):
    """Output of an answer that arrives in pieces."""

    def add(self, text: str) -> None:
        """Write the next piece."""
        ...

    def finish(self) -> None:
        """End the line, if one has begun; more may follow with ``add``."""
        ...


def make_answer_writer(plain: bool = False) -> Writer:
    """Return a Markdown renderer if standard output supports color, unless ``plain``; else text."""
    return PlainTextWriter() if plain or not supports_color(sys.stdout) else MarkdownWriter()


def make_thinking_writer(hidden: bool = False) -> Writer:
    """Return a writer of the thinking if standard error is a terminal, unless ``hidden``."""
    return ThinkingWriter() if is_terminal(sys.stderr) and not hidden else NullWriter()


class ThinkingWriter:
    """The thinking on standard error: dim, or without colors between two marker lines."""

    def __init__(self) -> None:
        colors = supports_color(sys.stderr)
        self._style, self._reset = ("\x1b[2m", "\x1b[0m") if colors else ("", "")
        self._header, self._footer = ("", "\n") if colors else ("(thinking)\n", "(answer)\n")
        self._last_character = ""  # "" while no thinking has been written

    def add(self, text: str) -> None:
        """Write the text at once."""
        if text := show_control_characters(text):
            header = "" if self._last_character else self._header
            self._last_character = text[-1]
            self._write(f"{header}{self._style}{text}{self._reset}")

    def finish(self) -> None:
        """End the line and write the footer, if any thinking was written."""
        if self._last_character:
            self._write(("" if self._last_character == "\n" else "\n") + self._footer)
            self._last_character = ""

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


class NullWriter:
    """A writer that discards everything."""

    def add(self, text: str) -> None:
        """Discard the text."""

    def finish(self) -> None:
        """Do nothing."""


class PlainTextWriter:
    """The text as it is, with control characters made visible and a newline at the end."""

    _last_character = "\n"

    def add(self, text: str) -> None:
        """Write the text at once."""
        if text := show_control_characters(text):
            self._last_character = text[-1]
            sys.stdout.write(text)
            sys.stdout.flush()

    def finish(self) -> None:
        """End the line, unless the text did."""
        if self._last_character != "\n":
            self._last_character = "\n"
            sys.stdout.write("\n")
            sys.stdout.flush()


class MarkdownWriter:
    """Markdown on a terminal: a finished block is written once, only the last one is redrawn."""

    def __init__(self) -> None:
        from markdown_it import MarkdownIt
        from rich.console import Console

        # Rendering HTML would hide tags of the model's own, and an image would hide its address.
        self._parser = (
            MarkdownIt("commonmark", {"html": False})
            .enable(["strikethrough", "table"])
            .disable("image")
        )
        self._block_parser = (
            MarkdownIt("commonmark", {"html": False}).enable("table").disable("inline")
        )
        self._console = Console(file=sys.stdout)
        self._live_lines = _LiveLines()
        self._source = ""  # Markdown of the unfinished blocks
        self._next_draw = 0.0  # earliest time of the next redraw, by time.monotonic

    def add(self, text: str) -> None:
        """Append text; drawing is limited to 25 times per second and a fifth of the time."""
        self._source += show_control_characters(text)
        begin = time.monotonic()
        if begin >= self._next_draw:
            self._draw(_without_ambiguous_last_line(self._source))
            self._next_draw = begin + max(0.04, 5 * (time.monotonic() - begin))

    def finish(self) -> None:
        """Draw the rest and end the line."""
        self._draw(self._source)
        self._source = ""
        self._live_lines.end()

    def _draw(self, source: str) -> None:
        columns, rows = self._console.size
        finished_length = self._finished_length(source)
        lines = self._render(source[finished_length:], columns)
        if finished_length:
            finished = [*self._render(source[:finished_length], columns), ""]
            self._live_lines.show([*finished, *lines], columns, rows)
            self._live_lines.release(len(finished))
            self._source = self._source[finished_length:]
        else:
            self._live_lines.show(lines, columns, rows)

    def _finished_length(self, source: str) -> int:
        """Return the offset of the last block; no later text can change the blocks before it.

        Only whole lines count, since the end of a line may decide its kind.
        """
        lines = source.split("\n")[:-1]
        tokens = self._block_parser.parse("\n".join(lines))
        starts = [
            token.map[0]
            for token in tokens
            if token.level == 0 and token.nesting >= 0 and token.map
        ]
        return sum(len(line) + 1 for line in lines[: starts[-1]]) if len(starts) > 1 else 0

    def _render(self, source: str, columns: int) -> list[str]:
        if not source.strip():
            return []
        document = _make_document()
        code = CodeBlocks()
        document.parsed = code.take_out(self._parser.parse(source))
        for token in document.parsed:
            for child in token.children or ():
                if child.type == "softbreak":  # models end a line where they want a line break
                    child.type = "hardbreak"
        with self._console.capture() as captured:
            self._console.print(document, width=columns - 1)
        return code.put_in(
            [_strip_padding(line) for line in captured.get().strip("\n").split("\n")]
        )


def _make_document() -> "Markdown":
    """Make an empty document with visible link targets and left-aligned headings."""
    from rich import markdown

    class Heading(markdown.Heading):
        def __rich_console__(self, console: object, options: object) -> Iterator["Text"]:  # type: ignore[override]
            self.text.justify = "left"
            yield self.text

    document = markdown.Markdown("", code_theme="ansi_dark", hyperlinks=False)
    document.elements = {**document.elements, "heading_open": Heading}  # type: ignore[misc]
    return document


_AMBIGUOUS_LINE = re.compile(r"(?:[\s>]*[-=#*_`~+|:>]*|\s*\d+[.)]?)\s*\Z")


def _without_ambiguous_last_line(source: str) -> str:
    """Drop a last line of markup characters only: the next characters decide its meaning."""
    start = source.rfind("\n") + 1
    return source[:start] if _AMBIGUOUS_LINE.match(source, start) else source


_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_PADDING = re.compile(r"(?: |\x1b\[0?m)+\Z")


def _strip_padding(line: str) -> str:
    """Strip the spaces that pad a line to the full width, closing a style open before them."""
    line = _PADDING.sub("", line)
    last = _STYLE.findall(line)[-1:]
    return f"{line}\x1b[0m" if last and last[0] not in ("\x1b[0m", "\x1b[m") else line


class _LiveLines:
    """The last lines on the terminal, which can be redrawn; the cursor is at their end."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def show(self, lines: list[str], columns: int, rows: int) -> None:
        """Replace the shown lines by ``lines``, in one write from the first difference on.

        Lines that have scrolled off the top cannot be changed and are not written again.
        """
        old = self._lines
        if not lines or lines == old:
            return
        same = next(
            (i for i, pair in enumerate(zip(old, lines, strict=False)) if pair[0] != pair[1]),
            len(old),
        )
        start = max(min(same, len(lines) - 1), len(old) - rows, 0)
        new = lines[start:] or [""]
        if start >= len(old):
            text = ("\n" if old else "") + "\n".join(new)
        elif start == len(old) - 1 and new[0].startswith(old[start]):
            text = "\n".join(new)[len(old[start]) :]
        else:
            up = sum(_count_rows(line, columns) for line in old[start:]) - 1
            # Erase line by line: erasing the whole screen below the cursor would push it into the
            # scrollback of some terminals.
            text = (f"\x1b[{up}A" if up else "") + "\r" + "\n".join(f"{line}\x1b[K" for line in new)
            text += "\x1b[J" if len(new) < len(old) - start or up >= len(old) - start else ""
        self._lines = [*old[:start], *new]
        sys.stdout.write(text)
        sys.stdout.flush()

    def release(self, count: int) -> None:
        """Make the first ``count`` lines final."""
        del self._lines[:count]

    def end(self) -> None:
        """Make all lines final and begin a new line."""
        if self._lines:
            self._lines = []
            sys.stdout.write("\n")
            sys.stdout.flush()


def _count_rows(line: str, columns: int) -> int:
    """Count the terminal rows of a line; more than one for a long line of code."""
    from rich.cells import cell_len

    return max(1, -(-cell_len(_STYLE.sub("", line).expandtabs(8)) // columns))
