"""Progress reports of long operations: downloads, conversions and loading."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A callback for progress, called often: it must be cheap."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """Report a step, named by ``label``; it ends when ``done == total``, mostly in bytes."""


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


SMALLEST_BYTES = 100_000  # a step of a smaller total counts something else: layers, matrices, files


def format_step(done: int, total: int, rate: float | None) -> str:
    """Format how far a step is: 12.3 of 54.0 GB, 8.1 MB/s; or 6 of 7, where it counts no bytes."""
    if total < SMALLEST_BYTES:
        return f"{done} of {total}"
    text = f"{format_size(done)} of {format_size(total)}"
    return f"{text}, {format_size(round(rate))}/s" if rate else text


@contextmanager
def terminal_progress(progress: Progress | None) -> Iterator[Progress]:
    """Provide the given callback or, without one, progress bars if standard error is a terminal.

    The bar shows how far a step is, its rate and the time left; a new step replaces it. It
    disappears at the end of the block.
    """
    if progress is not None or not sys.stderr.isatty():
        yield progress or silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[step]}"))
    bars = Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def report(label: str, done: int, total: int) -> None:
        bars.start()  # not before the first report: the user may be asked something until then
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total, step="", visible=False)
        for each in bars.tasks:  # one bar at a time: that of the step that goes on
            shown = each.id == tasks[label]
            if shown:
                step = format_step(done, total, each.speed)
                bars.update(each.id, completed=done, total=total, step=step, visible=True)
            elif each.visible:
                bars.update(each.id, visible=False)

    try:
        yield report
    finally:
        bars.stop()
