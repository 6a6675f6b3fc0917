"""The line that shows how much of a prompt is read."""

import io
import sys

import pytest
from terminal import Screen

from mlxarch.cli import prompt_progress
from mlxarch.cli.prompt_progress import PromptProgress


class Terminal(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(prompt_progress.time, "monotonic", lambda: now[0])
    return now


def shown(stream: io.StringIO) -> list[str]:
    screen = Screen(80, 24)
    screen.write(stream.getvalue())
    return screen.text()


def test_a_long_prompt_shows_a_line_that_goes_away(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    progress = PromptProgress()
    for seconds, done, line in [
        (0.1, 100, ""),
        (1.0, 600, "reading the prompt: 600 of 9100 tokens, 17 s left"),
        (9.0, 5100, "reading the prompt: 5100 of 9100 tokens, 7 s left"),
        (15.9, 9100, ""),
    ]:
        clock[0] = seconds
        progress(done, 9100)
        assert shown(stream) == [line]


def test_a_short_prompt_shows_nothing(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    progress = PromptProgress()
    for seconds, done in [(0.1, 100), (1.0, 800), (1.8, 1000)]:
        clock[0] = seconds
        progress(done, 1000)
    assert stream.getvalue() == ""


def test_a_file_gets_nothing(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    progress = PromptProgress()
    clock[0] = 60
    progress(1, 1000)
    progress.clear()
    assert stream.getvalue() == ""
