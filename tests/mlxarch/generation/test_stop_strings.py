"""Strings that end an answer, however the text is cut into pieces."""

import random

import pytest

from mlxarch.errors import InvalidInput
from mlxarch.generation.stop_strings import StopStrings

TEXTS = ["one two END three", "EN EN END", "no stop here", "aaab", "ababac", "END", "", "E", "xEND"]
STOPS = [["END"], ["aab", "END"], ["abac"], [" two", "END"], ["END", "EN"], ["abac", "b"]]


def passed(text: str, stops: list[str], cuts: random.Random) -> tuple[str, bool, list[str]]:
    matcher, out, rest = StopStrings(stops), [], text
    while rest:
        size = cuts.randint(1, 3)
        out.append(matcher.feed(rest[:size]))
        rest = rest[size:]
    out.append(matcher.flush())
    return "".join(out), matcher.found, out


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stops", STOPS)
def test_the_text_ends_where_the_first_stop_begins(text: str, stops: list[str]) -> None:
    # the stop that is complete first ends the text; among those that end together the one that begins first
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    wanted = text[: min(ends)[1]] if ends else text
    for seed in range(20):
        got, found, _ = passed(text, stops, random.Random(seed))
        assert found == bool(ends)
        assert got == wanted


def test_nothing_is_passed_on_that_may_belong_to_a_stop() -> None:
    matcher = StopStrings("<stop>")
    assert matcher.feed("a<st") == "a"
    assert matcher.feed("op") == ""
    assert matcher.feed("x>") == "<stopx>"
    assert matcher.feed("y<stop") == "y"
    assert matcher.flush() == "<stop"


def test_a_single_text_is_one_stop() -> None:
    assert StopStrings("ab").feed("xaby") == "x"


@pytest.mark.parametrize("stops", ["", ["a", ""], [3], 5])
def test_refuses_what_is_no_text(stops: object) -> None:
    if stops == "":
        assert StopStrings([]).feed("a") == "a"  # no stop at all is fine, an empty one is not
    with pytest.raises(InvalidInput, match="not empty"):
        StopStrings(stops)  # pyright: ignore[reportArgumentType]
