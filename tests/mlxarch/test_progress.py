"""Progress of long operations: units, and one bar at a time."""

import io
import re
import sys

import pytest

from mlxarch.progress import format_step, terminal_progress


class Terminal(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("done", "total", "rate", "text"),
    [
        (6, 7, 2.0, "6 of 7"),  # layers, and no bytes
        (500_000, 2_000_000, 100_000.0, "0.5 MB of 2.0 MB, 0.1 MB/s"),
        (10**9, 54 * 10**9, None, "1.0 GB of 54.0 GB"),
    ],
)
def test_a_step_has_the_unit_of_what_it_counts(
    done: int, total: int, rate: float | None, text: str
) -> None:
    assert format_step(done, total, rate) == text


def test_one_bar_is_shown_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with terminal_progress(None) as report:
        report("downloading a", 1_000_000, 4_000_000)
        report("downloading a", 2_000_000, 4_000_000)  # breaks off here
        report("layers", 3, 7)
    pictures = re.split(r"\x1b\[2K|\r", stream.getvalue())
    assert not any("downloading" in part and "layers" in part for part in pictures)
    [picture, *_] = [part for part in pictures if "layers" in part]
    assert "3 of 7" in picture and "bytes" not in stream.getvalue()


def test_a_file_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with terminal_progress(None) as report:
        report("loading", 1, 2)
    assert stream.getvalue() == ""
