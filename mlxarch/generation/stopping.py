"""Ends of an answer besides its end token: stop strings, and repetition without end."""

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


class LoopGuard:
    """Detection of an answer that repeats itself without end.

    The last tokens are a loop if they are one block of at most ``LONGEST_BLOCK`` tokens, repeated at
    least ``MIN_REPEATS`` times over at least ``MIN_TOKENS`` tokens. Rows of a table or lines of code
    that differ in a single token are none.
    """

    LONGEST_BLOCK = 64
    MIN_REPEATS = 8
    MIN_TOKENS = 128

    def __init__(self) -> None:
        self._tokens: list[int] = []
        # for each length of a block: how many of the last tokens equal the one a block earlier
        self._equal = [0] * (self.LONGEST_BLOCK + 1)

    def add(self, token: int) -> bool:
        """Add a token; return whether the answer is in a loop now."""
        self._tokens.append(token)
        count = len(self._tokens)
        looping = False
        for length in range(1, min(self.LONGEST_BLOCK, count - 1) + 1):
            same = self._tokens[-1 - length] == token
            self._equal[length] = self._equal[length] + 1 if same else 0
            repeated = self._equal[length] + length  # tokens that consist of this block
            looping |= repeated >= max(self.MIN_TOKENS, self.MIN_REPEATS * length)
        return looping
