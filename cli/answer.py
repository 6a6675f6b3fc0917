"""One answer, from the model to the writer, with Ctrl-C as its brake."""

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxarch.cli.output import is_terminal, size
from mlxarch.cli.render import Silence, Writer

if TYPE_CHECKING:
    from mlxarch.generation import Timings
    from mlxarch.language_model import LanguageModel, Piece
    from mlxarch.streaming.rows import RowStats

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


def left_out(timings: "Timings") -> str | None:
    """What is to be said where the context was full."""
    if not timings.dropped_tokens:
        return None
    return f"the context was full: {timings.dropped_tokens} tokens behind the opening are left out"


def stats(timings: "Timings") -> dict[str, Any]:
    """The same for a program: counts of tokens, seconds, and tokens per second."""
    return {
        "prompt_tokens": timings.prompt_tokens,
        "reused_tokens": timings.reused_tokens,
        "dropped_tokens": timings.dropped_tokens,
        "generated_tokens": timings.generated_tokens,
        "time_to_first_token": round(timings.time_to_first_token, 6),
        "prefill_seconds": round(timings.prefill_seconds, 6),
        "decode_seconds": round(timings.decode_seconds, 6),
        "prefill_rate": round(timings.prefill_rate, 3),
        "decode_rate": round(timings.decode_rate, 3),
    }


def streaming_line(model: "LanguageModel") -> str | None:
    """What was read from the disk since the model was loaded, and what memory it took, for a person."""
    found = streaming_stats(model)
    if found is None:
        return None
    planned = f" of {size(found['planned_bytes'])} planned" if found["planned_bytes"] else ""
    memory = f"peak memory {size(found['peak_bytes'])}{planned}"
    if model.streaming is None:
        parts = [
            f"per-layer embeddings from the disk: {found['bytes_per_token'] / 1000:.1f} kB a token",
            f"{found['hit_rate']:.0%} were in memory, {found['recent_hit_rate']:.0%} of the last 64",
            f"{found['read_seconds']:.2f} s reading",
            memory,
        ]
        return " · ".join(parts)
    seconds = f"{found['read_seconds']:.1f} s reading, {found['router_seconds']:.1f} s waiting for routers"
    parts = [
        f"experts from the disk: {size(found['bytes_per_token'])} a token",
        f"{found['hit_rate']:.0%} were in memory, {found['recent_hit_rate']:.0%} for the last 64 tokens",
        f"{seconds}, {found['expert_seconds']:.1f} s for experts",
        memory,
    ]
    return " · ".join(parts)


def streaming_stats(model: "LanguageModel") -> dict[str, Any] | None:
    """The same for a program: None where nothing is read from the disk."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = {"peak_bytes": peak, "planned_bytes": model.plan.total if model.plan else None}
    if model.streaming is None:
        return _row_stats(model.streamed_rows.stats) | memory if model.streamed_rows else None
    counted = model.streaming.stats
    return memory | {
        "bytes_read": counted.bytes_read,
        "bytes_per_token": round(counted.bytes_per_token),
        "hit_rate": round(counted.hit_rate, 4),
        "recent_hit_rate": round(counted.steady_hit_rate, 4),
        "read_seconds": round(counted.read_seconds, 6),
        "router_seconds": round(counted.sync_seconds, 6),
        "expert_seconds": round(counted.compute_seconds, 6),
        "bank_bytes": model.streaming.nbytes,
    }


def _row_stats(counted: "RowStats") -> dict[str, Any]:
    return {
        "bytes_read": counted.bytes_read,
        "bytes_per_token": round(counted.bytes_read / max(counted.rows, 1)),
        "hit_rate": round(counted.hit_rate, 4),
        "recent_hit_rate": round(counted.steady_hit_rate, 4),
        "read_seconds": round(counted.read_seconds, 6),
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
