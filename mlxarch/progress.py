"""Progress reports of long operations: downloads, conversions and loading."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A callback for progress, called often: it must be cheap."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """Report a step, named by ``label``; it ends when ``done == total``, both in bytes."""


def silent(label: str, done: int, total: int) -> None:
    """Ignore the report."""


def format_size(count: int) -> str:
    """Format a number of bytes with one decimal: 4.6 GB, 127.3 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


def format_duration(seconds: float) -> str:
    """Format a duration to be expected: 40 seconds, 12 minutes, 7 hours, 3 days."""
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}s"
    return f"{max(seconds, 1):.0f} seconds"


@contextmanager
def terminal_progress(progress: Progress | None) -> Iterator[Progress]:
    """Provide the given callback or, without one, progress bars if standard error is a terminal.

    A bar shows bytes, rate and time left of a step. All bars disappear at the end of the block.
    """
    if progress is not None or not sys.stderr.isatty():
        yield progress or silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    bars = Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    tasks = {}

    def report(label: str, done: int, total: int) -> None:
        bars.start()  # not before the first report: the user may be asked something until then
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
