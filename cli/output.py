"""Output to the terminal: answers on standard output, everything else on standard error.

Control characters of any text are made visible, so that no model or file name moves the cursor or
starts an escape sequence.
"""

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

# C0, DEL and C1 control characters except newline and tab, each mapped to a visible symbol
_SYMBOLS: dict[int, int | None] = {code: 0x2400 + code for code in range(32)}
_SYMBOLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD) | {0x7F: 0x2421, ord("\r"): None}
_SYMBOLS = {code: symbol for code, symbol in _SYMBOLS.items() if chr(code) not in "\n\t"}


def show_control_characters(text: str) -> str:
    """Replace control characters, except newline and tab, by visible symbols."""
    return text.translate(_SYMBOLS)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; a closed or missing stream is not."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def supports_color(stream: TextIO) -> bool:
    """Return whether a stream is a terminal with styles and cursor movement, without NO_COLOR."""
    return (
        is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def wrap_words(text: str, stream: TextIO) -> str:
    """Break lines that are longer than the terminal between words, as it would within them.

    Continued lines are indented as the first one. A word that is longer than a line, such as a
    path, stays whole. Without a terminal the text stays as it is.
    """
    if not is_terminal(stream):
        return text
    columns = shutil.get_terminal_size().columns
    lines: list[str] = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip(" "))]
        wrapped = textwrap.wrap(
            line,
            max(columns, 20),
            subsequent_indent=indent,
            expand_tabs=False,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += wrapped if len(line) > columns else [line]
    return "\n".join(lines)


def print_stderr(text: str, *, dim: bool = False) -> None:
    """Print a text to standard error; ``dim`` if the terminal supports styles."""
    text = wrap_words(show_control_characters(text), sys.stderr)
    print(
        f"\x1b[2m{text}\x1b[0m" if dim and supports_color(sys.stderr) else text,
        file=sys.stderr,
        flush=True,
    )


def print_error(text: str) -> None:
    """Print the error line with which every failed command ends."""
    print_stderr(f"mlxarch: error: {text}")


def print_line(text: str = "") -> None:
    """Print a text to standard output."""
    print(wrap_words(show_control_characters(text), sys.stdout), flush=True)


def print_json(value: Any) -> None:
    """Print a JSON value to standard output, on one line.

    DEL, C1 controls and lone surrogates are escaped as JSON escapes other control characters.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    print(
        re.sub(r"[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text),
        flush=True,
    )


def print_table(rows: Iterable[Sequence[str]], optional: Iterable[int] = ()) -> None:
    """Print rows of equal length to standard output, in aligned columns.

    Args:
        optional: indices of columns that are left out, the first ones first, until a line fits
            on the terminal.
    """
    cells = [[show_control_characters(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    shown = list(range(len(widths)))
    columns = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else sys.maxsize
    for index in optional:
        if sum(widths[each] + 2 for each in shown) - 2 <= columns:
            break
        shown.remove(index)
    for row in cells:
        print("  ".join(row[index].ljust(widths[index]) for index in shown).rstrip(), flush=True)


def configure_streams() -> None:
    """Make standard output and error safe to write to.

    A closed stream becomes the null device, and a character that the encoding lacks is replaced.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if reconfigure := getattr(getattr(sys, name), "reconfigure", None):
            reconfigure(errors="replace")
