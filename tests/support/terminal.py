"""Two terminals: a screen that obeys what is written to it, and one at which a person types to a program."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

from rich.cells import cell_len

_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", re.DOTALL)
# makes standard input the controlling terminal, so that its Ctrl-C arrives as a signal, which a suite that runs in the
# background was told to ignore, and all its children with it
_LAUNCH = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Screen:
    """A terminal of ``rows`` rows; ``scrolled`` are the lines that left it at the top, which nothing can change."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.scrolled: list[str] = []
        self.lines, self.row, self.column = [""], 0, 0

    def write(self, text: str) -> None:
        for parameters, command, character in _TOKEN.findall(text):
            if character == "\n":  # the terminal's driver adds the carriage return
                self._down()
            elif character == "\r":
                self.column = 0
            elif character == "\t":
                self.column = min(self.column // 8 * 8 + 8, self.columns - 1)
            elif character:
                self._put(character)
            else:
                self._obey(parameters, command)

    def text(self) -> list[str]:
        return [line.rstrip() for line in [*self.scrolled, *self.lines]]

    def _down(self) -> None:
        self.column, self.row = 0, self.row + 1
        if self.row == len(self.lines):
            self.lines.append("")
        if len(self.lines) > self.rows:
            self.scrolled.append(self.lines.pop(0))
            self.row -= 1

    def _put(self, character: str) -> None:
        if ord(character) < 32:
            raise ValueError(f"control character {character!r} reached the terminal")
        width = cell_len(character)
        if self.column + width > self.columns:
            self._down()
        line = self.lines[self.row].ljust(self.column)
        cut = _at(line, self.column)
        self.lines[self.row] = line[:cut] + character + line[_at(line, self.column + width) :]
        self.column += width

    def _obey(self, parameters: str, command: str) -> None:
        line = self.lines[self.row]
        if command == "A":
            self.row = max(0, self.row - int(parameters or 1))
        elif command == "K":
            self.lines[self.row] = line[: _at(line, self.column)]
        elif command == "J":
            self.lines[self.row] = line[: _at(line, self.column)]
            del self.lines[self.row + 1 :]
        elif command != "m":
            raise ValueError(f"escape sequence {parameters}{command} is not known")


def _at(line: str, column: int) -> int:
    """Index of the character that begins at a column."""
    width = 0
    for index, character in enumerate(line):
        if width >= column:
            return index
        width += cell_len(character)
    return len(line)


class Person:
    """Types to a program that runs on a terminal of its own, and reads what it shows."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.terminal, inside = pty.openpty()
        fcntl.ioctl(
            inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0)
        )  # status lines on one line
        plain = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "", "LINES": ""}
        self.program = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *command],
            **dict.fromkeys(("stdin", "stdout", "stderr"), inside),  # type: ignore[arg-type]
            env=os.environ | plain | environment,
            start_new_session=True,
        )
        os.close(inside)
        self.shown = ""

    def __enter__(self) -> "Person":
        return self

    def __exit__(self, *_: object) -> None:
        if self.program.poll() is None:
            os.killpg(self.program.pid, signal.SIGKILL)
        self.program.wait()
        os.close(self.terminal)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def enters(self, text: str, answer: str) -> str:
        """Type a line, and wait for the answer and for the prompt after it; returns what was shown until then."""
        self.type(f"{text}\r")
        return self.sees(answer) + self.sees(">>>")

    def sees(self, pattern: str, seconds: float = 30) -> str:
        """Wait until the pattern is shown, and take all up to its end; what is taken is not seen again."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{pattern!r} was not shown; there was {self.shown!r}")
        taken, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return taken

    def leaves(self, seconds: float = 30) -> int:
        """Wait for the program's end; returns its exit code."""
        deadline = time.monotonic() + seconds
        while self._read(deadline - time.monotonic()):
            pass
        return self.program.wait(max(deadline - time.monotonic(), 1))

    def _read(self, seconds: float) -> bool:
        if seconds <= 0 or not select.select([self.terminal], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.terminal, 1 << 16)
        except OSError:  # Linux: the other side is closed
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)
