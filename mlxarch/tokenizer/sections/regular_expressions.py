r"""Worst-case time of the regular expressions of a tokenizer.json.

The library's engine backtracks. The time that it takes for a text of n characters is

- linear if in each alternative nothing that can fail follows a repetition without end. ``\s*[\r\n]+``
  may follow one, if another alternative, such as ``\s+``, takes what was read in vain: then each
  character is read a few times.
- quadratic if one such repetition is followed by what can fail: ``.*x`` reads to the end from each
  character.
- cubic or worse otherwise, exponential for nested repetitions. These are refused, as is everything
  that is not understood here: back-references, named groups, conditions, absent operators.

All published patterns that are known are linear, but those that count digits from the right.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_LENGTH = 4096
"""Largest length of a regular expression, in characters."""
_MANY = 64  # a repetition of more counts as one without end
_MAX_NESTING = 16
_MAX_ALTERNATIVES = 128
_MAX_WAYS = 4096  # in which the parts of an alternative, endless repetitions aside, can match

_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?[A-Za-z_ =-]{1,40}\}|[sSdDwWhHrntfvae]|x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]{1,8}\}"
    r"|u[0-9A-Fa-f]{4}|[^A-Za-z0-9])",
    re.DOTALL,
)
_ANCHOR = re.compile(r"\\[bBAzZ]|[\^$]")
_GROUP = re.compile(r"\((?:\?(?:[imx]*(?:-[imx]+)?:|=|!|<=|<!|>))?")
_OPTIONS = re.compile(r"\(\?[imx]+(?:-[imx]+)?\)")
_QUANTIFIER = re.compile(r"[*+?][+?]?|\{(\d{1,5})?(,)?(\d{1,5})?\}\??")


class CostlyPattern(ValueError):
    """A regular expression that can take far too long; the message says why."""


@dataclass
class _Item:
    """Part of an alternative: a character, an assertion or a group, and how often it may occur.

    Attributes:
        text: its source without the quantifier.
        branches: alternatives of a group; empty for a character or an anchor.
        width: 1 for a character, 0 for an assertion, None for a group.
        least, most: bounds of the quantifier; ``most`` is None without end.
    """

    text: str
    branches: "list[list[_Item]]"
    width: int | None
    least: int = 1
    most: int | None = 1

    @property
    def endless(self) -> bool:
        return self.most is None or self.most > _MANY

    @property
    def can_fail(self) -> bool:
        if self.width is None and self.least:
            return all(any(item.can_fail for item in branch) for branch in self.branches)
        return self.least > 0


def is_quadratic(pattern: str) -> bool:
    """Return whether a regular expression can take quadratic time, rather than linear.

    Raises:
        CostlyPattern: it can take longer, or is not understood.
    """
    if len(pattern) > MAX_LENGTH:
        raise CostlyPattern(f"has {len(pattern)} characters, and may have {MAX_LENGTH}")
    parser = _Parser(pattern)
    branches = parser.alternatives()
    if parser.position < len(pattern):
        raise CostlyPattern(f"is not understood at character {parser.position}")
    if parser.alternatives_seen > _MAX_ALTERNATIVES:
        raise CostlyPattern(f"has more than {_MAX_ALTERNATIVES} alternatives")
    expanded = [each for branch in branches for each in _inlined(branch)]
    return any([_branch_is_quadratic(branch, expanded) for branch in expanded])


def _inlined(branch: list[_Item]) -> list[list[_Item]]:
    """Return a branch with a group at its only or last place replaced by its alternatives."""
    if len(branch) == 1 and branch[0].width is None and (branch[0].least, branch[0].most) == (1, 1):
        return [each for inner in branch[0].branches for each in _inlined(inner)]
    return [branch]


def _branch_is_quadratic(branch: list[_Item], others: Sequence[list[_Item]]) -> bool:
    ways = 1
    for item in _flat(branch):
        ways *= max(len(item.branches), 1)
        ways *= 1 if item.most is None else item.most - item.least + 1
    if ways > _MAX_WAYS:
        raise CostlyPattern(f"can match the same text in more than {_MAX_WAYS} ways")
    retried: list[_Item] = []  # endless, and followed by what can fail
    quadratic = False
    for index, item in enumerate(branch):
        fails_later = any(later.can_fail for later in branch[index + 1 :])
        if item.branches:
            quadratic |= _group_is_quadratic(item, fails_later, retried)
        elif item.endless and fails_later:
            retried.append(item)
    if len(retried) > 1:
        raise CostlyPattern("has two repetitions without end before what can fail")
    if retried and not (not quadratic and any(_takes_all(other, retried[0]) for other in others)):
        quadratic = True
    return quadratic


def _group_is_quadratic(group: _Item, fails_later: bool, retried: list[_Item]) -> bool:
    """Check a group within an alternative; note in ``retried`` what is repeated in it."""
    inner = [item for branch in group.branches for item in _flat(branch)]
    endless = [item for item in inner if item.endless]
    repeated = group.most is None or group.most > 1
    if repeated and endless:
        raise CostlyPattern("repeats a group that repeats without end")
    if repeated:
        fixed = len(group.branches) == 1 and all(
            item.least == item.most and len(item.branches) < 2 for item in inner
        )
        if not fixed and fails_later:
            raise CostlyPattern("repeats a group with several lengths before what can fail")
        if fails_later:
            retried.append(group)
        return False
    if group.width == 0:  # read anew at each character
        if len(endless) > 1 or any(len(item.branches) > 1 for item in endless):
            raise CostlyPattern("looks around with several repetitions without end")
        return bool(endless)
    for branch in group.branches:
        for index, item in enumerate(branch):
            after = any(later.can_fail for later in branch[index + 1 :])
            if item.endless and (after or fails_later):
                retried.append(item)
            elif item.branches:
                _group_is_quadratic(item, after or fails_later, retried)
    return False


def _flat(branch: list[_Item]) -> list[_Item]:
    """Return the items of an alternative, and those of its groups."""
    return [
        each
        for item in branch
        for each in (item, *(deep for inner in item.branches for deep in _flat(inner)))
    ]


def _takes_all(branch: list[_Item], run: _Item) -> bool:
    """Return whether an alternative takes a whole run of the characters of ``run``, whatever follows.

    Characters in front may be optional. ``\\s+(?!\\S)`` leaves the last one at most.
    """
    if run.width != 1:
        return False
    rest = list(branch)
    while rest and rest[0].text != run.text and not rest[0].can_fail and not rest[0].endless:
        rest.pop(0)
    if not rest or rest[0].text != run.text or not rest[0].endless or rest[0].least > 1:
        return False
    after = rest[1:]
    if run.text == r"\s" and [item.text for item in after] == [r"(?!\S)"]:
        return True
    return not any(item.can_fail for item in after)


class _Parser:
    """Parser of the subset of Oniguruma's notation that tokenizers use."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.position = 0
        self.alternatives_seen = 0
        self._depth = 0

    def alternatives(self) -> list[list[_Item]]:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise CostlyPattern("nests too deeply")
        branches: list[list[_Item]] = [[]]
        while self.position < len(self.pattern) and self.pattern[self.position] != ")":
            if self.pattern[self.position] == "|":
                self.position += 1
                branches.append([])
            elif options := _OPTIONS.match(self.pattern, self.position):
                self.position = options.end()
            else:
                branches[-1].append(self._item())
        self._depth -= 1
        self.alternatives_seen += len(branches)
        return branches

    def _item(self) -> _Item:
        start = self.position
        character = self.pattern[start]
        branches: list[list[_Item]] = []
        width: int | None = 1
        if anchor := _ANCHOR.match(self.pattern, start):
            self.position = anchor.end()
            width = 0
        elif character == "\\":
            self._escape()
        elif character == "[":
            self._character_class()
        elif character == "(":
            opening = _GROUP.match(self.pattern, start)
            assert opening is not None
            self.position = opening.end()
            if self.pattern[self.position : self.position + 1] == "?":
                raise CostlyPattern(f"has a group that is not understood at character {start}")
            branches = self.alternatives()
            self._expect(")")
            width = 0 if opening[0] in ("(?=", "(?!", "(?<=", "(?<!") else None
        elif character in "*+?":
            raise CostlyPattern(f"repeats nothing at character {start}")
        else:
            self.position += 1
        return self._quantified(_Item(self.pattern[start : self.position], branches, width))

    def _quantified(self, item: _Item) -> _Item:
        for count in range(3):
            found = _QUANTIFIER.match(self.pattern, self.position)
            if found is None or found[0] in ("{}", "{,}"):
                return item
            if count == 2 or (count and (found[0] not in ("+", "?") or item.branches)):
                raise CostlyPattern(f"repeats a repetition at character {self.position}")
            self.position = found.end()
            if found[0][0] == "{":
                least, comma, most = found.groups()
                item.least = int(least or 0)
                item.most = int(most) if most else (None if comma else item.least)
            elif count:  # {1,3}+, which means a repetition of the repetition
                item.most = None if found[0] == "+" else item.most
                item.least = item.least if found[0] == "+" else 0
            else:
                item.least = int(found[0][0] == "+")
                item.most = 1 if found[0][0] == "?" else None
        return item

    def _escape(self) -> None:
        found = _ESCAPE.match(self.pattern, self.position)
        if found is None:
            raise CostlyPattern(
                f"has an escape that is not understood at character {self.position}"
            )
        self.position = found.end()

    def _character_class(self) -> None:
        depth = 0
        while self.position < len(self.pattern):
            character = self.pattern[self.position]
            if character == "\\":
                self._escape()
                continue
            self.position += 1
            if character == "[":
                depth += 1
                if self.pattern[self.position : self.position + 1] == "^":
                    self.position += 1
                if self.pattern[self.position : self.position + 1] == "]":
                    raise CostlyPattern(f"has an empty class at character {self.position}")
            elif character == "]":
                depth -= 1
                if not depth:
                    return
        raise CostlyPattern("has a class that does not end")

    def _expect(self, character: str) -> None:
        if self.pattern[self.position : self.position + 1] != character:
            raise CostlyPattern(f"lacks a {character!r} at character {self.position}")
        self.position += 1
