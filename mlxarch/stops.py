"""Strings that end an answer."""

from collections.abc import Sequence

from mlxarch.errors import InvalidInput


class StopStrings:
    """Passes a text on in pieces, and holds back what may turn out to be the beginning of a stop string.

    Attributes:
        found: whether one has appeared; nothing is passed on any more then.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops) if isinstance(stops, Sequence) else [stops]
        if not all(isinstance(stop, str) and stop for stop in self._stops):
            raise InvalidInput(f"stop must hold texts that are not empty, found {stops!r}")
        self._held, self.found = "", False

    def feed(self, text: str) -> str:
        """Take in more text, and return what is certain by now."""
        if self.found:
            return ""
        self._held += text
        # the one that is complete first, so that the result does not depend on how the text was cut
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found, certain = True, min(ends)[1]
        else:
            certain = len(self._held) - max((self._beginning(stop) for stop in self._stops), default=0)
        out, self._held = self._held[:certain], self._held[certain:]
        return out

    def _beginning(self, stop: str) -> int:
        """How many characters at the end of what is held begin ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def flush(self, text: str = "") -> str:
        """The last text, and what was held back: the answer is over."""
        out = self.feed(text)
        rest, self._held = "" if self.found else self._held, ""
        return out + rest
