"""How the next token is drawn."""

import math
from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.errors import InvalidInput
from mlxarch.generation.sampling import RowSampler, Sampler, Sampling, sample

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -1.5, 1.5, -3.0]


def draws(count: int = 4000, logits: list[float] = LOGITS, **settings: Any) -> np.ndarray:
    """Relative frequency of every token over ``count`` rows with a key of their own each."""
    seen: Counter[int] = Counter()
    sampler = Sampler(Sampling(**{"temperature": 1.0, "seed": 7, **settings}), len(logits), [[]])
    for _ in range(count):
        seen[int(np.asarray(sampler(mx.array([logits])))[0])] += 1
    return np.array([seen[token] / count for token in range(len(logits))])


def chances(keep: set[int], temperature: float = 1.0) -> np.ndarray:
    weights = np.array(
        [math.exp(x / temperature) if i in keep else 0.0 for i, x in enumerate(LOGITS)]
    )
    return weights / weights.sum()


ALL = set(range(8))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, chances(ALL)),
        ({"temperature": 0.5}, chances(ALL, 0.5)),
        ({"top_k": 3}, chances({0, 6, 1})),
        ({"top_k": 100}, chances(ALL)),
        ({"top_p": 0.7}, chances({0, 6, 1})),  # 0.39 + 0.24 = 0.63 is not yet 0.7
        ({"top_p": 0.01}, chances({0})),
        ({"min_p": 0.3}, chances({0, 6, 1})),  # exp(-1) = 0.37 of the most likely, exp(-1.5) = 0.22
        (
            {"top_k": 4, "top_p": 0.85},
            chances({0, 6, 1}),
        ),  # of these four 0.46, 0.28, 0.17 and 0.10
        ({"top_k": 2, "min_p": 0.3, "temperature": 2.0}, chances({0, 6}, 2.0)),
    ],
)
def test_frequencies_are_those_of_the_settings(
    settings: dict[str, Any], wanted: np.ndarray
) -> None:
    got = draws(**settings)
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(wanted))
    assert np.abs(got - wanted).max() < 0.03  # three standard errors of 4000 draws are 0.024
    other = chances(ALL, 5.0)  # what would not pass
    assert np.abs(got - other).max() > 0.05


def test_temperature_zero_takes_the_most_likely() -> None:
    assert draws(5, temperature=0)[0] == 1.0


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-39, 1e-45])
def test_tiny_temperatures_take_the_most_likely(temperature: float) -> None:
    logits = mx.array([[3.0, 20.0, 5.0, 19.0, -4.0]])
    sampler = Sampler(Sampling(temperature=temperature, seed=1), 5, [[0]])
    assert [int(np.asarray(sampler(logits))[0]) for _ in range(8)] == [1] * 8


def test_the_same_seed_gives_the_same_tokens_and_another_does_not() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), 8, [[]])
        return [int(np.asarray(sampler(mx.array([LOGITS])))[0]) for _ in range(40)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)
    assert tokens(2**64 - 1) == tokens(2**64 - 1)


@pytest.mark.parametrize("settings", [{}, {"top_k": 4, "top_p": 0.9}, {"repetition_penalty": 1.5}])
def test_a_row_draws_the_same_alone_and_in_a_batch(settings: dict[str, Any]) -> None:
    sampling = Sampling(temperature=1.0, seed=5, **settings)
    rows = mx.random.normal((3, 50), key=mx.random.key(1))
    together = Sampler(sampling, 50, [[1, 2], [3], [4]])
    alone = Sampler(sampling, 50, [[3]])
    for _ in range(20):
        assert together(rows)[1].item() == alone(rows[1:2])[0].item()


def test_without_a_seed_each_row_has_its_own_random_stream() -> None:
    def rows(seed: int | None) -> list[list[int]]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), 64, [[]] * 8)
        logits = mx.zeros((8, 64))
        return np.array([np.array(sampler(logits)) for _ in range(12)]).T.tolist()

    assert len({tuple(row) for row in rows(None)}) == 8
    assert len({tuple(row) for row in rows(5)}) == 1, "one seed, one stream"


def test_the_penalty_counts_the_prompt_and_what_was_drawn() -> None:
    logits = mx.array([[2.0, 1.9, 1.8, -0.1, -1.0]])
    sampler = Sampler(Sampling(repetition_penalty=1.5), 5, [[1]])
    # 1.9 / 1.5 = 1.27 from the start; then each drawn token falls behind the next
    assert [int(np.asarray(sampler(logits))[0]) for _ in range(4)] == [0, 2, 0, 0]
    plain = Sampler(Sampling(), 5, [[1]])
    assert [int(np.asarray(plain(logits))[0]) for _ in range(2)] == [0, 0]


def test_the_penalty_lowers_negative_logits() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), 3, [[0]])
    assert sampler(mx.array([[-1.0, -1.5, -3.0]])).item() == 1


def test_logit_bias_is_added() -> None:
    logits = mx.array([LOGITS])
    assert Sampler(Sampling(logit_bias={7: 6.0}), 8, [[]])(logits).item() == 7
    assert Sampler(Sampling(logit_bias={0: -100.0, 6: -100.0}), 8, [[]])(logits).item() == 1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"min_p": -0.5}, "min_p"),
        ({"min_p": math.inf}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {2**40: 1.0}}, "logit_bias"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"logit_bias": {5: math.nan}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
    ],
)
def test_refuses_what_is_out_of_range_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        Sampling(**settings)


def test_refuses_a_bias_outside_of_the_vocabulary() -> None:
    Sampler(Sampling(logit_bias={7: 1.0}), 8, [[]])
    with pytest.raises(InvalidInput, match="ends at 7"):
        Sampler(Sampling(logit_bias={8: 1.0}), 8, [[]])


def test_frequency_and_presence_penalties_count_the_answer_and_not_the_prompt() -> None:
    logits = mx.array([[5.0, 4.0, 0.0]])
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"presence_penalty": 1.5}, [0, 1, 0, 0]),
        ({"frequency_penalty": 0.4}, [0, 0, 0, 1]),
        ({"frequency_penalty": -0.4}, [0, 0, 0, 0]),
    ]
    for settings, wanted in cases:
        sampler = Sampler(Sampling(**settings), 3, [[0, 0, 0, 0]])
        assert [sampler(logits).item() for _ in range(4)] == wanted, settings


def test_rows_with_parameters_of_their_own_draw_as_alone() -> None:
    parameters = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.0, seed=2),
        Sampling(temperature=0.5, top_k=3, seed=3),
        Sampling(temperature=1.0, seed=4, presence_penalty=2.0),
        Sampling(logit_bias={3: 100.0}),
    ]
    logits = mx.random.normal((len(parameters), 40), key=mx.random.key(0)) * 2
    masks = [None, None, mx.arange(40) % 2 == 0, None, None, None]
    together = [RowSampler(each, 40, [1]) for each in parameters]
    alone = [RowSampler(each, 40, [1]) for each in parameters]
    for _ in range(5):
        tokens: Any = sample(together, logits, masks).tolist()
        single = [
            sample([row], logits[index : index + 1], [masks[index]]).item()
            for index, row in enumerate(alone)
        ]
        assert tokens == single
        assert tokens[2] % 2 == 0 and tokens[5] == 3
