"""Stop strings: texts that end an answer, found across the boundaries of streamed pieces."""

from collections.abc import Sequence

from mlxarch.errors import InvalidInput


class StopStrings:
    """Streaming search for stop strings; text that may begin one is held back.

    Attributes:
        found: whether a stop string has appeared; no text is released afterwards.
        match: the stop string that has appeared.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        self._stops = (
            [stops] if isinstance(stops, str) or not isinstance(stops, Sequence) else list(stops)
        )
        if not all(isinstance(stop, str) and stop for stop in self._stops):
            raise InvalidInput(f"stop must hold texts that are not empty, found {stops!r}")
        self._pending = ""
        self.found = False
        self.match: str | None = None

    def feed(self, text: str) -> str:
        """Add text, and return the text that can no longer be part of a stop string."""
        if self.found:
            return ""
        self._pending += text
        # The stop string that is complete first wins, so that the result does not depend on how the
        # text was cut
        matches = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := self._pending.find(stop)) >= 0
        ]
        if matches:
            self.found = True
            _, released, self.match = min(matches)
        else:
            held_back = max((self._partial_match(stop) for stop in self._stops), default=0)
            released = len(self._pending) - held_back
        result = self._pending[:released]
        self._pending = self._pending[released:]
        return result

    def flush(self, text: str = "") -> str:
        """Add the last text, and return all text held back."""
        result = self.feed(text)
        rest = "" if self.found else self._pending
        self._pending = ""
        return result + rest

    def _partial_match(self, stop: str) -> int:
        """Length of the longest beginning of ``stop`` at the end of the pending text."""
        longest = min(len(stop) - 1, len(self._pending))
        return next((n for n in range(longest, 0, -1) if self._pending.endswith(stop[:n])), 0)
