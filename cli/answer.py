"""One answer, from the model to the writer, with Ctrl-C as its brake."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


def stats_line(timings: "Timings", *, long: bool = False) -> str:
    """How fast it was, for a person."""
    parts = [
        f"first token after {timings.time_to_first_token:.2f} s",
        f"{timings.decode_rate:.1f} tokens/s",
        f"{timings.generated_tokens} tokens",
        f"prompt {timings.prompt_tokens} tokens"
        + (f", {timings.reused_tokens} reused" if timings.reused_tokens else ""),
    ]
    return " · ".join([*parts, f"prefill {timings.prefill_rate:.0f} tokens/s"] if long else parts)


def stats(timings: "Timings") -> dict[str, Any]:
    """The same for a program: counts of tokens, seconds, and tokens per second."""
    return {
        "prompt_tokens": timings.prompt_tokens,
        "reused_tokens": timings.reused_tokens,
        "generated_tokens": timings.generated_tokens,
        "time_to_first_token": round(timings.time_to_first_token, 6),
        "prefill_seconds": round(timings.prefill_seconds, 6),
        "decode_seconds": round(timings.decode_seconds, 6),
        "prefill_rate": round(timings.prefill_rate, 3),
        "decode_rate": round(timings.decode_rate, 3),
    }


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
