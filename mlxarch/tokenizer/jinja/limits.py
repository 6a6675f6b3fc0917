"""Limits on the time and memory that a chat template uses while it renders.

A template is untrusted: it comes with the model. Jinja's sandbox keeps it away from Python's
internals, yet a few characters of it can demand hours or gigabytes: ``"a" * 10**9``, two nested
loops, a list that contains itself twice, thirty levels deep. ``Limits`` checks the cost before each
such step. Every value is bounded when it is created, so later operations on it (printing,
comparing, sorting) are bounded as well.
"""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2.utils import Namespace

from mlxarch.errors import ChatTemplateError

MAX_SECONDS = 2.0
"""Time to parse a template, and again to render it once, in seconds."""
MAX_CHARACTERS = 4_000_000
"""Length of the output, of one string, and of all contents of one list or mapping."""
MAX_ITEMS = 100_000
"""Length of one list, and iterations of an operation that works item by item."""
MAX_ALLOCATED_BYTES = 256 << 20
"""Size of all values together that one rendering creates."""
MAX_BITS = 4096
"""Size of an integer."""
MAX_WIDTH = 1000
"""Width of a field in a format string."""
MAX_DEPTH = 100
"""Nesting of lists."""

_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_UNCACHED_SIZE = 64  # containers up to this size are measured again each time
_CACHE_ENTRY_BYTES = 200
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?")


def limit_error(what: str) -> ChatTemplateError:
    """Create the error for a limit that a template exceeds."""
    return ChatTemplateError(
        f"The chat template exceeds a limit: {what}. Shorten the messages, or use a model whose "
        "template needs less."
    )


class Limits:
    """Resource limits of one rendering.

    Every method raises ChatTemplateError if a limit is exceeded.
    """

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._allocated_bytes = 0
        # id -> (container, its size). The sandbox is immutable, so a container never changes.
        self._sizes: dict[int, tuple[Any, int]] = {}

    def tick(self, allocated: int = 0) -> None:
        """Check the clock, and count ``allocated`` bytes that a step created."""
        self._allocated_bytes += allocated
        if self._allocated_bytes > MAX_ALLOCATED_BYTES:
            raise limit_error(
                f"it makes more than {MAX_ALLOCATED_BYTES >> 20} MiB of text and lists"
            )
        if time.monotonic() > self._deadline:
            raise limit_error(f"it takes longer than {MAX_SECONDS:g} s")

    def tick_each(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the items, with a ``tick`` for each."""
        for item in items:
            self.tick()
            yield item

    def check_operand(self, value: Any) -> Any:
        """Check a value that the template passes to an operation, and return it."""
        if isinstance(value, str):
            self.check_characters(len(value))
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
        elif isinstance(value, (list, tuple, dict, set, *_VIEWS)):
            self._measure(value, _UNCACHED_SIZE, 0)
        return value

    def check_result(self, value: Any) -> Any:
        """Check a value that an operation created, and return it."""
        self.tick(sys.getsizeof(value))
        if isinstance(value, (list, tuple, dict, set)):
            self.check_items(len(value))
        return self.check_operand(value)

    def check_variables(self, variables: Any) -> None:
        """Check the variables of the template; the size of each container is cached."""
        self._measure(variables, 0, 0)

    def check_characters(self, count: int) -> None:
        """Check the length of a text."""
        if count > MAX_CHARACTERS:
            raise limit_error(f"it makes a text of more than {MAX_CHARACTERS} characters")

    def check_items(self, count: int) -> None:
        """Check the length of a list, or a number of iterations."""
        if count > MAX_ITEMS:
            raise limit_error(f"it works on more than {MAX_ITEMS} items")

    def check_bits(self, count: int) -> None:
        """Check the size of an integer."""
        if count > MAX_BITS:
            raise limit_error(f"it makes a number of more than {MAX_BITS} bits")

    def check_replace(self, text: str, old: str, new: str) -> None:
        """Check ``text.replace(old, new)``."""
        count = text.count(old) if old else len(text) + 1
        self.check_characters(len(text) + count * max(0, len(new) - len(old)))

    def check_join(self, separator: str, items: Iterable[Any]) -> list[Any]:
        """Check ``separator.join(items)``, and return the items as a list."""
        parts = list(self.tick_each(items))
        self.check_result(parts)
        self.check_characters(len(separator) * len(parts))
        return parts

    def check_percent_format(self, text: str, values: Any) -> None:
        """Check ``text % values``."""
        widest = 0
        for width, precision in _PERCENT.findall(text):
            for number in (width, precision):
                if number and (number == "*" or len(number) > 4 or int(number) > MAX_WIDTH):
                    raise limit_error(f"it formats a field wider than {MAX_WIDTH}")
                widest = max(widest, int(number or 0))
        values_size = self._measure([values], _UNCACHED_SIZE, 0)
        self.check_characters(len(text) + text.count("%") * (widest + values_size))

    def check_format_spec(self, spec: str) -> None:
        """Check ``format(value, spec)``."""
        if any(len(number) > 4 or int(number) > MAX_WIDTH for number in re.findall(r"\d+", spec)):
            raise limit_error(f"it formats a field wider than {MAX_WIDTH}")

    def _measure(self, value: Any, uncached: int, depth: int) -> int:
        """Return the number of characters and items in a value.

        A container that occurs twice counts twice. Sizes above ``uncached`` are cached.
        """
        if isinstance(value, str):
            return 1 + len(value)
        if isinstance(value, dict):
            items: Iterable[Any] = (part for pair in value.items() for part in pair)
        elif isinstance(value, (list, tuple, set, *_VIEWS)):
            items = value
        elif isinstance(value, Namespace) and depth:
            # a namespace can change later, and contain the list itself
            raise limit_error("it puts a namespace into a list")
        else:
            return 1
        if id(value) in self._sizes:
            return self._sizes[id(value)][1]
        if depth > MAX_DEPTH:
            raise limit_error(f"it nests lists deeper than {MAX_DEPTH}")
        total = 1
        for item in items:
            total += self._measure(item, uncached, depth + 1)
            self.check_characters(total)
        if total > uncached and not isinstance(value, _VIEWS):
            self._sizes[id(value)] = (value, total)
            self.tick(_CACHE_ENTRY_BYTES)
        return total
