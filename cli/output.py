"""Where words go: answers to standard output, everything else to standard error; and what they look like there."""

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

# What moves the cursor, rings, or begins an escape sequence is shown as its symbol and never reaches a terminal.
_SYMBOLS: dict[int, int | None] = {code: 0x2400 + code for code in range(32)}
_SYMBOLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD) | {0x7F: 0x2421, ord("\r"): None}
_SYMBOLS = {code: symbol for code, symbol in _SYMBOLS.items() if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """The text with its control characters, all but newline and tab, turned into visible symbols."""
    return text.translate(_SYMBOLS)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sits at the other end; a stream that is closed or missing is none."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def colored(stream: TextIO) -> bool:
    """Whether styles and cursor movements are welcome: a terminal that has them, and no NO_COLOR."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def say(text: str, *, dim: bool = False) -> None:
    """A line to standard error."""
    text = visible(text)
    print(f"\x1b[2m{text}\x1b[0m" if dim and colored(sys.stderr) else text, file=sys.stderr, flush=True)


def fail(text: str) -> None:
    """The line that every failure ends with."""
    say(f"mlxarch: error: {text}")


def answer(text: str = "") -> None:
    """A line to standard output."""
    print(visible(text), flush=True)


def answer_json(value: Any) -> None:
    """A JSON value to standard output, on one line; DEL and C1 controls are escaped as JSON escapes the others."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    print(re.sub(r"[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def size(count: int) -> str:
    """Bytes for a person."""
    from mlxarch.progress import gigabytes

    return gigabytes(count)


def table(rows: Iterable[Sequence[str]]) -> None:
    """Rows of equal length to standard output, in aligned columns."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)


def prepare_streams() -> None:
    """Let neither a stream that is closed nor a character that it cannot encode end a command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        if reconfigure := getattr(getattr(sys, name), "reconfigure", None):
            reconfigure(errors="replace")
