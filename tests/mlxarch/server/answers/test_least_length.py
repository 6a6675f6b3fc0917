"""No end token is chosen before an answer has its least length."""

import numpy as np

from mlxarch.server.answers.least_length import LeastLength


class Inner:
    """A constraint that allows some tokens."""

    stopped = False

    def __init__(self, *allowed: int) -> None:
        self.allowed = np.isin(np.arange(6), allowed)
        self.consumed: list[int] = []

    def mask(self) -> np.ndarray:
        return self.allowed

    def consume(self, token: int) -> None:
        self.consumed.append(token)


def test_end_tokens_are_forbidden_at_first():
    matcher = LeastLength({5, 2, 99}, 2, 6, None)
    for token in (0, 1):
        mask = matcher.mask()
        assert mask is not None and list(np.flatnonzero(mask)) == [0, 1, 3, 4]
        matcher.consume(token)
    assert matcher.mask() is None


def test_end_tokens_can_be_forbidden_for_ever():
    matcher = LeastLength({5}, None, 6, None)
    for _ in range(3):
        mask = matcher.mask()
        assert mask is not None and not mask[5]
        matcher.consume(0)


def test_a_constraint_within_is_held_as_well():
    inner = Inner(1, 5)
    matcher = LeastLength({5}, 2, 6, inner)
    mask = matcher.mask()
    assert mask is not None and list(np.flatnonzero(mask)) == [1]
    matcher.consume(1)
    assert inner.consumed == [1]
    complete = LeastLength({5}, 2, 6, Inner(5)).mask()
    assert complete is not None and list(np.flatnonzero(complete)) == [5]  # it can only end
    inner.stopped = True
    assert matcher.stopped
