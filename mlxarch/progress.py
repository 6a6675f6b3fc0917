"""How long work reports how far it is."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called often and cheaply while something is downloaded, converted or loaded."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """``label`` names the step; ``done`` and ``total`` are bytes. ``done == total`` ends the step."""


def silent(label: str, done: int, total: int) -> None:
    """Report to nobody."""


def gigabytes(count: int) -> str:
    """Bytes for a person: 4.6 GB, 127.3 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


@contextmanager
def on_terminal(progress: Progress | None) -> Iterator[Progress]:
    """The given progress; without one, bars on standard error while it is a terminal, and else silence.

    A bar shows the step's bytes, their rate and the time left, and disappears with the block.
    """
    if progress is not None or not sys.stderr.isatty():
        yield progress or silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars = Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    tasks = {}

    def report(label: str, done: int, total: int) -> None:
        bars.start()  # at the first report only: until then, a person may be asked something
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
