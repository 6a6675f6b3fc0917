"""Texts on a terminal: lines break between words."""

import io

import pytest

from mlxarch.cli.output import wrap_words


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


TEXT = (
    "the model does not fit into the memory of this machine, so nothing was loaded: /a/" + "b" * 60
)


def test_a_terminal_gets_lines_that_break_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = wrap_words(TEXT, Terminal()).split("\n")
    assert " ".join(lines) == TEXT and max(map(len, lines[:-1])) <= 40
    assert lines[-1] == "/a/" + "b" * 60  # a path stays whole, so that it can be copied
    indented = wrap_words("short\n  " + "word " * 20, Terminal()).split("\n")
    assert indented[0] == "short" and all(line.startswith("  word") for line in indented[1:])


def test_a_file_gets_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert wrap_words(TEXT, io.StringIO()) == TEXT
