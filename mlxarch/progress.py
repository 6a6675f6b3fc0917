"""How long work reports how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Called often and cheaply while something is downloaded, converted or loaded."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """``label`` names the step; ``done`` and ``total`` are bytes. ``done == total`` ends the step."""


def silent(label: str, done: int, total: int) -> None:
    """Report to nobody."""
