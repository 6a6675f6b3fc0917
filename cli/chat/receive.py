"""One answer from the model to the terminal, interruptible with Ctrl-C between two tokens."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxarch.cli.output import is_terminal
from mlxarch.cli.prompt_progress import PromptProgress
from mlxarch.cli.render import NullWriter, Writer
from mlxarch.cli.signals import Reacting

if TYPE_CHECKING:
    from mlxarch.generation.answer import Piece
    from mlxarch.generation.timings import Timings

STOPPED = "stopped"  # finish reason of an answer that Ctrl-C ended
LOOP_NOTE = "stopped, because the answer repeats itself; --no-loop-guard lets it go on"


@dataclass
class Answer:
    """An answer as received; ``finish_reason`` is one of ``Piece`` or ``STOPPED``."""

    text: str
    finish_reason: str
    timings: "Timings"
    thinking: str = ""


def receive_answer(
    pieces: "Iterator[Piece]",
    writer: Writer,
    thinking_writer: Writer | None = None,
    progress: PromptProgress | None = None,
) -> Answer:
    """Write an answer piece by piece, and the thinking to a writer of its own, if there is one.

    Ctrl-C ends the answer between two tokens, where the KV cache is consistent.

    Args:
        progress: line that is erased once the answer begins.

    Raises:
        KeyboardInterrupt: Ctrl-C before the first token, or a second time. The KV cache may then be
            inconsistent and must not be used again.
    """
    progress = progress or PromptProgress()
    texts = {False: "", True: ""}
    writers = {False: writer, True: thinking_writer or NullWriter()}
    thinking = False
    last = None
    with _deferred_interrupt() as interrupt, _echo_off():
        try:
            for last in pieces:
                interrupt.deferred = True
                progress.clear()
                if last.text:
                    if last.thinking != thinking:
                        writers[thinking].finish()
                    thinking = last.thinking
                    texts[thinking] += last.text
                    writers[thinking].add(last.text)
                if interrupt.requested:
                    break
        finally:
            progress.clear()
            getattr(pieces, "close", lambda: None)()
            for each in writers.values():
                each.finish()
    if last is None:
        raise KeyboardInterrupt
    return Answer(texts[False], last.finish_reason or STOPPED, last.timings, texts[True])


def dropped_tokens_note(timings: "Timings") -> str | None:
    """Describe how many tokens a context shift removed; None if there was no shift."""
    if not timings.dropped_tokens:
        return None
    return f"the context was full: {timings.dropped_tokens} tokens behind the opening are left out"


class _Interrupt:
    """Handler of SIGINT: immediate before the first token and the second time, else deferred."""

    deferred = False
    requested = False

    def handle(self, *_: object) -> None:
        if self.requested or not self.deferred:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def _deferred_interrupt() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    previous = signal.signal(signal.SIGINT, Reacting(interrupt.handle))
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _echo_off() -> Iterator[None]:
    """Turn off the terminal's echo: keys typed during the answer wait for the next prompt."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        yield
        return
    import termios

    terminal = sys.stdin.fileno()
    previous = termios.tcgetattr(terminal)
    silent = list(previous)
    silent[0] &= ~termios.ICRNL
    silent[3] &= ~(termios.ECHO | termios.ICANON)  # ISIG stays on, so that Ctrl-C works
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, previous)
