"""Strings that end an answer, however the text is cut into pieces."""

import random

import pytest

from mlxarch.errors import InvalidInput
from mlxarch.generation.stopping import LoopGuard, StopStrings

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


def first_loop(tokens: list[int]) -> int | None:
    """How many tokens the guard has seen when it first finds a loop."""
    guard = LoopGuard()
    return next((index + 1 for index, token in enumerate(tokens) if guard.add(token)), None)


@pytest.mark.parametrize("block", [1, 2, 7, 16, 40, 64])
def test_a_block_that_repeats_without_end_is_a_loop(block: int) -> None:
    begin, repeated = list(range(1000, 1030)), list(range(block))
    needed = max(LoopGuard.MIN_TOKENS, LoopGuard.MIN_REPEATS * block)
    assert first_loop(begin + repeated * 200) == len(begin) + needed


def test_what_differs_now_and_then_is_no_loop() -> None:
    table = [token for row in range(100) for token in (1, 2, 1000 + row, 3, 4)]
    assert first_loop(table) is None
    few = list(range(30)) * 7  # a refrain
    assert first_loop(few + list(range(500, 600)) + few) is None
    assert first_loop(list(range(65)) * 50) is None  # longer than any block that is looked for
    assert first_loop([5] * 127 + [6] + [5] * 127) is None
