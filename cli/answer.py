"""One answer, from the model to the writer, with Ctrl-C as its brake."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxarch.cli.output import is_terminal
from mlxarch.cli.render import Silence, Writer

if TYPE_CHECKING:
    from mlxarch.generation import Timings
    from mlxarch.language_model import Piece

STOPPED = "stopped"  # the finish reason of an answer that Ctrl-C ended


@dataclass
class Answer:
    """What became of it; ``finish_reason`` is "stop", "length" or ``STOPPED``."""

    text: str
    finish_reason: str
    timings: "Timings"
    thinking: str = ""


def receive(pieces: "Iterator[Piece]", writer: Writer, thoughts: Writer | None = None) -> Answer:
    """Pass an answer on as it comes, and the thinking before it to a writer of its own, where there is one.

    Ctrl-C ends it between two tokens, where the conversation's caches are sound. Before the first token, or pressed
    twice, it raises KeyboardInterrupt at once, and the caches can be used no more.
    """
    texts, last, writers = {False: "", True: ""}, None, {False: writer, True: thoughts or Silence()}
    now = False  # whether it thinks
    with _brake() as brake, _no_echo():
        try:
            for last in pieces:
                brake.gentle = True
                if last.text:
                    if last.thinking != now:
                        writers[now].finish()
                    now = last.thinking
                    texts[now] += last.text
                    writers[now].add(last.text)
                if brake.pulled:
                    break
        finally:
            getattr(pieces, "close", lambda: None)()
            for each in writers.values():
                each.finish()
    if last is None:
        raise KeyboardInterrupt
    return Answer(texts[False], last.finish_reason or STOPPED, last.timings, texts[True])


def left_out(timings: "Timings") -> str | None:
    """What is to be said where the context was full."""
    if not timings.dropped_tokens:
        return None
    return f"the context was full: {timings.dropped_tokens} tokens behind the opening are left out"


class _Brake:
    gentle = False  # the first token is there: wait for the next moment between two
    pulled = False

    def pull(self, *_: object) -> None:
        if self.pulled or not self.gentle:
            raise KeyboardInterrupt
        self.pulled = True


@contextmanager
def _brake() -> Iterator[_Brake]:
    brake = _Brake()
    before = signal.signal(signal.SIGINT, brake.pull)
    try:
        yield brake
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _no_echo() -> Iterator[None]:
    """What is typed while the answer appears is kept for the next prompt as typed, and not shown in its midst."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    silent = list(before)
    silent[0] &= ~termios.ICRNL
    silent[3] &= ~(termios.ECHO | termios.ICANON)  # ISIG stays, and with it Ctrl-C
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
