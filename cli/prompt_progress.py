"""Progress line on standard error while the model reads a long prompt."""

import sys
import time

from mlxarch.cli.output import is_terminal

PATIENCE_SECONDS = 2.0  # a prompt that takes less shows nothing


class PromptProgress:
    """Callback for ``on_prompt`` of ``LanguageModel.stream``: a line that is redrawn in place.

    It appears as soon as the prompt is expected to take longer than ``PATIENCE_SECONDS``, and only
    on a terminal.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._begin = 0  # tokens of earlier turns, which are not read again
        self._width = 0  # of the line that is shown
        self._enabled = is_terminal(sys.stderr)

    def __call__(self, done: int, total: int) -> None:
        """Redraw the line: ``done`` of ``total`` tokens are read."""
        if not self._enabled:
            return
        seconds = time.monotonic() - self._start
        self._begin = self._begin or done
        read = max(done - self._begin, 1)
        left = seconds / read * (total - done)
        if done >= total:
            self.clear()
        elif self._width or (seconds >= PATIENCE_SECONDS / 4 and seconds + left > PATIENCE_SECONDS):
            self._show(f"reading the prompt: {done} of {total} tokens, {_format_time(left)} left")

    def clear(self) -> None:
        """Erase the line, if there is one."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0

    def _show(self, line: str) -> None:
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = max(self._width, len(line))


def _format_time(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min"
