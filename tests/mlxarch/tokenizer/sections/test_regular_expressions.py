"""Worst-case time of regular expressions, decided from their source."""

import pytest

from mlxarch.tokenizer import byte_level
from mlxarch.tokenizer.sections.regular_expressions import CostlyPattern, is_quadratic

WORD = r"[^\r\n\p{L}\p{N}]?"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LINEAR = [
    byte_level.QWEN_PATTERN,
    byte_level.GPT4_PATTERN,
    byte_level.KIMI_PATTERN,
    byte_level.TEKKEN_PATTERN,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s",
    rf"{WORD}{UPPER}*{LOWER}+(?i:'s|'t)?|{WORD}{UPPER}+{LOWER}*(?i:'s|'t)?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"\s?\p{L}+",
    r"\p{N}{1,3}",
    r"\d|[^\d]+",
    r" {2,}",
    r"\A | \z",
    r"(?:'s|'t|\p{L}+)",
    r"(a|aa)+",  # nothing after it can fail
    r"<\|startoftext\|>|<\|endoftext\|>|'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "",
]
QUADRATIC = [
    r"\s*[\r\n]+",
    r"\s*[\r\n]|\s",
    r".*x",
    r" +\z",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    r"\d{1,3}(?=(\d{3})+\b)",
    r"a{0,4000}b",
    r"(?=.*x)a",
    r"(?:ab)*c",
]
COSTLY = {
    r"(a+)+$": "group that repeats",
    r"(?:a*b?)*c": "group that repeats",
    r"(a|aa)+$": "several lengths",
    r"(a|b|ab)*(bc)": "several lengths",
    r"(?:a{1,2})*c": "several lengths",
    r"a*a*b": "two repetitions",
    r".*.*x|.+": "two repetitions",
    r"\s*\s*$|\s+": "two repetitions",
    r"(a*)\1b": "escape",
    r"(?<x>a)\k<x>": "not understood",
    r"(?~abc)": "not understood",
    r"(?(1)a|b)": "not understood",
    r"a**": "repeats a repetition",
    r"(?:a{60}){60}*": "repeats a repetition",
    r"(?=a*a*b)c": "several repetitions",
    r"(?:a?){60}b": "several lengths",
    "a?" * 60 + "b": "ways",
    "(?:a|a)" * 30 + "b": "ways",
    r"(?:(?:a|a)){60}b": "several lengths",
    "|".join("b" * 200): "alternatives",
    r"*a": "repeats nothing",
    r"[a": "does not end",
    r"(a": "lacks",
    r"a)": "not understood",
    r"\X": "escape",
    "(" * 50 + "a" + ")" * 50: "nests",
    "a" * 5000: "characters",
}


@pytest.mark.parametrize("pattern", LINEAR)
def test_published_patterns_and_their_like_are_linear(pattern: str):
    assert not is_quadratic(pattern)


@pytest.mark.parametrize("pattern", QUADRATIC)
def test_one_repetition_before_what_can_fail_is_quadratic(pattern: str):
    assert is_quadratic(pattern)


@pytest.mark.parametrize("pattern", COSTLY)
def test_what_can_take_longer_is_refused_with_a_reason(pattern: str):
    with pytest.raises(CostlyPattern, match=COSTLY[pattern]):
        is_quadratic(pattern)
