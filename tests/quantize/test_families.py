"""Families of rows of a head: likely at the same places, and packed by what they are multiplied with there."""

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks import Quantization
from mlxarch.quantize import families as module
from mlxarch.quantize.families import Families, Likely, families, most
from mlxarch.quantize.gptq import Feedback, Several, pack_fed
from mlxarch.quantize.importance import Inputs
from mlxarch.quantize.packing import Packer
from mlxarch.quantize.rows import Loss

KINDS, EACH, CHANNELS, PLACES = 4, 24, 64, 1600
ROWS, TO = KINDS * EACH, Quantization(3, 64)
KIND_OF_ROW, KIND_OF_PLACE = np.arange(ROWS) % KINDS, np.arange(PLACES) % KINDS


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def head() -> tuple[np.ndarray, np.ndarray]:
    """Rows of four kinds, and states at which those of one kind are likely, each with channels of its own."""
    towards, spread = normal(KINDS, CHANNELS, seed=0), 4 ** normal(KINDS, CHANNELS, seed=1)
    states = towards[KIND_OF_PLACE] + 0.4 * spread[KIND_OF_PLACE] * normal(PLACES, CHANNELS, seed=2)
    return 0.1 * towards[KIND_OF_ROW] + 0.04 * normal(ROWS, CHANNELS, seed=3), states


def chances(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def found(rows: int = ROWS, count: int = KINDS) -> Families:
    weights, states = head()
    return families(states, Likely.of(chances(states @ weights.T)), rows, count)


def test_the_likeliest_tokens_of_a_place_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIKELIEST", 3)
    likely = Likely.of(np.array([[0.1, 0.4, 0.0, 0.2, 0.3]]))
    assert sorted(zip(likely.ids[0].tolist(), likely.chances[0].tolist(), strict=True)) == [
        (1, 0.4),
        (3, 0.2),
        (4, 0.3),
    ]
    assert np.allclose(likely.felt, likely.chances * (1 - likely.chances))
    assert Likely.of(np.array([[0.5, 0.5]])).ids.shape == (1, 2)


def test_rows_that_are_likely_at_the_same_places_come_together_and_weigh_these_most() -> None:
    own = found(rows=ROWS + 7)
    assert (own.of_row[ROWS:] == 0).all() and (own.of_row[:ROWS] > 0).all()
    purest = [np.bincount(own.of_row[:ROWS][kind == KIND_OF_ROW]).max() for kind in range(KINDS)]
    assert sum(purest) > 0.9 * ROWS
    assert np.allclose(own.states.mean(1), 1, atol=1e-3) and (own.states[0] == 1).all()
    for row in range(KINDS):
        weights = own.states[own.of_row[row]]
        assert weights[row == KIND_OF_PLACE].mean() > 1.5 > 1 > weights[row != KIND_OF_PLACE].mean()


def test_a_family_of_few_places_weighs_nearly_as_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sure = found().states[1:].std()
    monkeypatch.setattr(module, "DOUBT", 1e6)
    assert found().states[1:].std() < 0.05 * sure


def divergence(packed: dict[str, mx.array]) -> float:
    """Of the logits, nats per place."""
    weights, states = head()
    own = np.array(mx.dequantize(packed["weight"], packed["scales"], packed["biases"], TO.group_size, TO.bits))
    exact, moved = chances(states @ weights.T), chances(states @ own.T)
    return float((exact * np.log(exact / moved)).sum(1).mean())


def packed_by(related: Families | None) -> float:
    weights, states = head()
    inputs, none = Inputs.of(states, keep=True), np.zeros((0, ROWS), np.float32)
    packer = Packer(inputs, ROWS, lambda expert, start, stop: none[:, start:stop], families=related)
    loss, rows = Loss(), mx.array(weights)
    pieces = [packer.pack(rows[part : part + 40], part, TO, mx.float32, loss) for part in range(0, ROWS, 40)]
    return divergence({name: mx.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})


def test_a_head_packed_by_families_diverges_less_and_by_wrong_ones_more() -> None:
    own, alone = found(), packed_by(None)
    assert packed_by(own) < 0.9 * alone
    wrong = own._replace(of_row=np.random.default_rng(5).permutation(own.of_row))
    assert packed_by(wrong) > alone


def test_several_pack_each_row_as_its_own_feedback_does() -> None:
    weights, states = head()
    feedbacks = [Feedback(states[kind == KIND_OF_PLACE]) for kind in range(KINDS)]
    together, error, plain = pack_fed(Several(feedbacks, KIND_OF_ROW), mx.array(weights), TO, mx.float32)
    for kind in range(KINDS):
        rows = np.flatnonzero(kind == KIND_OF_ROW)
        parts, own_error, own_plain = pack_fed(feedbacks[kind], mx.array(weights[rows]), TO, mx.float32)
        assert mx.array_equal(together["weight"][mx.array(rows)], parts["weight"])
        assert np.allclose(error[rows], own_error, rtol=1e-4) and np.allclose(plain[rows], own_plain, rtol=1e-4)
        other = pack_fed(feedbacks[kind - 1], mx.array(weights[rows]), TO, mx.float32)[0]
        assert not mx.array_equal(other["weight"], parts["weight"])


def test_what_rows_are_looked_up_for_counts_more_where_tokens_are_certain() -> None:
    """Beside a token that is certain, an error of a logit is hardly felt, and one that is looked up as ever."""
    states = np.repeat(normal(2, CHANNELS, seed=6), 50, axis=0)
    ids = np.repeat([[0, 1], [2, 3]], 50, axis=0)
    own = families(states, Likely(ids, np.repeat([[0.98, 0.02], [0.5, 0.5]], 50, axis=0)), 4, 2)
    certain, open_ = own.lookups[own.of_row[0]], own.lookups[own.of_row[2]]
    assert own.of_row[0] == own.of_row[1] != own.of_row[2]
    assert certain > 5 * open_ and own.lookups[0] == 1


def test_wide_rows_have_as_many_families_as_memory_allows() -> None:
    assert most(256) == module.FAMILIES
    assert module.FACTORS // (8 * 1536**2) == most(1536) < module.FAMILIES
    assert most(8192) == 0


def test_what_is_not_finite_makes_families_all_the_same() -> None:
    weights, states = head()
    likely = Likely.of(chances(states @ weights.T))
    states[3] = np.inf
    assert families(states, likely, ROWS, KINDS).of_row.shape == (ROWS,)
