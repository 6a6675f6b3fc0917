"""What a chat template may use while it renders: time, memory, output, and the size of every value that it makes.

A template comes with the model, from whoever made it. Jinja's sandbox keeps it from Python's internals, yet a few
characters of it can ask for hours or for gigabytes: ``"a" * 10**9``, two nested loops, a list that holds itself twice,
thirty times over. ``Limits`` is asked before each such step. All that a template can make is bounded when it is made,
so whatever reads a value afterwards (printing, comparing, sorting) is bounded as well.
"""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.utils import Namespace

from mlxarch.errors import ChatTemplateError

MAX_SECONDS = 2.0
"""For parsing a template, and again for each rendering."""
MAX_CHARACTERS = 4_000_000
"""Of the output, of one string, of all that one list or mapping holds."""
MAX_ITEMS = 100_000
"""Of one list, and repetitions of what works item by item."""
MAX_WORK_BYTES = 256 << 20
"""Of all values together that one rendering makes."""
MAX_BITS = 4096
"""Of an integer."""
MAX_WIDTH = 1000
"""Of a field in a format string."""
MAX_DEPTH = 100
"""Of lists in lists."""

_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_SMALL = 64  # what weighs less is weighed again each time
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


def exceeded(what: str) -> ChatTemplateError:
    """The error for a limit that a template ran into."""
    return ChatTemplateError(
        f"The chat template exceeds a limit: {what}. Shorten the messages, or use a model whose template needs less."
    )


class Limits:
    """The limits of one rendering; every method raises ChatTemplateError where one is exceeded."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._work = 0
        # id → (the container, how much it holds). Containers never change: the sandbox is an immutable one.
        self._weights: dict[int, tuple[Any, int]] = {}

    def tick(self, nbytes: int = 0) -> None:
        """Called at each step; ``nbytes`` is the size of what the step made."""
        self._work += nbytes
        if self._work > MAX_WORK_BYTES:
            raise exceeded(f"it makes more than {MAX_WORK_BYTES >> 20} MiB of text and lists")
        if time.monotonic() > self._deadline:
            raise exceeded(f"it takes longer than {MAX_SECONDS:g} s")

    def ticking(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, with a tick at each."""
        for item in items:
            self.tick()
            yield item

    def given(self, value: Any) -> Any:
        """A value that the template hands to an operation."""
        if isinstance(value, str):
            self.characters(len(value))
        elif isinstance(value, int):
            self.bits(value.bit_length())
        elif isinstance(value, (list, tuple, dict, set, *_VIEWS)):
            self._weigh(value, _SMALL, 0)
        return value

    def made(self, value: Any) -> Any:
        """A value that an operation made."""
        self.tick(sys.getsizeof(value))
        if isinstance(value, (list, tuple, dict, set)):
            self.items(len(value))
        return self.given(value)

    def inputs(self, value: Any) -> Any:
        """The variables that the template starts with: weighed once, part by part."""
        self._weigh(value, 0, 0)
        return value

    def characters(self, count: int) -> None:
        """``count`` characters of text in one value."""
        if count > MAX_CHARACTERS:
            raise exceeded(f"it makes a text of more than {MAX_CHARACTERS} characters")

    def items(self, count: int) -> None:
        """``count`` items in one list, or repetitions."""
        if count > MAX_ITEMS:
            raise exceeded(f"it works on more than {MAX_ITEMS} items")

    def bits(self, count: int) -> None:
        """``count`` bits in one integer."""
        if count > MAX_BITS:
            raise exceeded(f"it makes a number of more than {MAX_BITS} bits")

    def replacement(self, text: str, old: str, new: str) -> None:
        """``text.replace(old, new)``"""
        self.characters(len(text) + (text.count(old) if old else len(text) + 1) * max(0, len(new) - len(old)))

    def joined(self, separator: str, items: Iterable[Any]) -> list[Any]:
        """The items of ``separator.join(items)``, as a list."""
        parts = list(self.ticking(items))
        self.made(parts)
        self.characters(len(separator) * len(parts))
        return parts

    def percent_format(self, text: str, values: Any) -> None:
        """``text % values``"""
        widest = 0
        for width, precision in _PERCENT.findall(text):
            for number in (width, precision):
                if number and (number == "*" or len(number) > 4 or int(number) > MAX_WIDTH):
                    raise exceeded(f"it formats a field wider than {MAX_WIDTH}")
                widest = max(widest, int(number or 0))
        self.characters(len(text) + text.count("%") * (widest + self._weigh([values], _SMALL, 0)))

    def format_spec(self, spec: str) -> None:
        """``format(value, spec)``"""
        if any(len(number) > 4 or int(number) > MAX_WIDTH for number in re.findall(r"\d+", spec)):
            raise exceeded(f"it formats a field wider than {MAX_WIDTH}")

    def _weigh(self, value: Any, small: int, depth: int) -> int:
        """Characters and items in a value, whatever stands in it twice counted twice."""
        if isinstance(value, str):
            return 1 + len(value)
        if isinstance(value, dict):
            parts: Iterable[Any] = (part for item in value.items() for part in item)
        elif isinstance(value, (list, tuple, set, *_VIEWS)):
            parts = value
        elif isinstance(value, Namespace) and depth:
            raise exceeded("it puts a namespace into a list")  # it can change, and hold the list itself
        else:
            return 1
        if id(value) in self._weights:
            return self._weights[id(value)][1]
        if depth > MAX_DEPTH:
            raise exceeded(f"it nests lists deeper than {MAX_DEPTH}")
        total = 1
        for part in parts:
            total += self._weigh(part, small, depth + 1)
            self.characters(total)
        if total > small and not isinstance(value, _VIEWS):
            self._weights[id(value)] = (value, total)
            self.tick(200)
        return total
